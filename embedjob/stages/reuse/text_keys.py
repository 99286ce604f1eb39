"""Text keys: which texts of new chunks have their vectors in old files, found by hashes alone.

A key is the hash of a text, 16 bytes, as two numbers. Hashes are uniform, so that a range of the
first number is a partition, and what each task found is kept in order of it: a partition is then a
slice. Partitions are joined one by one, each by a sort.

Shapes: N keys.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

HASH = pa.binary(16)
# Hashes are of uint64, numbers of chunks, files and lines of uint32.
Column = npt.NDArray[Any]
# To sort so many keys takes half a second of a core, and some 100 MB.
PARTITION_KEYS = 1_000_000


class TextKeys(NamedTuple):
    """The distinct texts of chunks [N]: a text that two chunks have stands here twice."""

    high: Column
    low: Column
    chunk: Column


class OldKeys(NamedTuple):
    """The texts of old files [N], each with its first line there, and the number of its lines."""

    high: Column
    low: Column
    file: Column
    line: Column
    lines: Column


class Places(NamedTuple):
    """Where the vectors of chunks' texts lie [N], in the order of files and of their lines."""

    file: Column
    line: Column
    lines: Column
    chunk: Column
    high: Column
    low: Column

    def within(self, first: int, last: int) -> "Places":
        """Return the places in files of these numbers, the last one among them."""
        ends = np.searchsorted(self.file, [first, last + 1])
        return Places(*(column[ends[0] : ends[1]] for column in self))

    def take(self, which: npt.NDArray[Any]) -> "Places":
        """Return some of the places, in this order."""
        return Places(*(column[which] for column in self))


_KeysT = TypeVar("_KeysT", TextKeys, OldKeys)


def numbers_of(hashes: bytes | pa.Buffer) -> tuple[Column, Column]:
    """Return hashes of 16 bytes, one behind the other, as two numbers each [N]."""
    raw = memoryview(hashes)
    if not raw.nbytes:
        return np.empty(0, np.uint64), np.empty(0, np.uint64)
    both = np.frombuffer(raw, ">u8").reshape(-1, 2).astype(np.uint64)
    return np.ascontiguousarray(both[:, 0]), np.ascontiguousarray(both[:, 1])


def hashes_of(high: Column, low: Column) -> pa.Array:
    """Return the hashes [N] that `numbers_of` has read."""
    both = np.stack([high, low], axis=1).astype(">u8")
    return pa.FixedSizeBinaryArray.from_buffers(HASH, len(high), [None, pa.py_buffer(both)])


def column_numbers(column: pa.ChunkedArray) -> tuple[Column, Column]:
    """Return a column of hashes, none of them null, as two numbers each [N]."""
    whole = column.combine_chunks()
    if not len(whole):
        return numbers_of(b"")
    return numbers_of(whole.buffers()[1].slice(16 * whole.offset, 16 * len(whole)))


def in_order(keys: _KeysT) -> _KeysT:
    """Return keys in the order of their first numbers, so that a partition is a slice."""
    order = np.argsort(keys.high, kind="stable")
    return type(keys)(*(column[order] for column in keys))


def all_of(parts: Sequence[_KeysT], empty: _KeysT) -> _KeysT:
    """Return the keys of several parts, one after the other."""
    if not parts:
        return empty
    return type(empty)(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


NO_TEXTS = TextKeys(np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.uint32))
NO_OLD = OldKeys(
    np.empty(0, np.uint64),
    np.empty(0, np.uint64),
    np.empty(0, np.uint32),
    np.empty(0, np.uint32),
    np.empty(0, np.uint32),
)


def join_partition(
    part: int, parts: int, texts: Sequence[TextKeys], olds: Sequence[OldKeys]
) -> tuple[Places, TextKeys]:
    """Return where the vectors of texts lie, of those in partition `part` of `parts`.

    Of several old lines with one text, those in the file of the lowest number are taken. Beside
    them, the texts that have none and are in several chunks, in the order of chunks.

    Args:
        part: the partition, from 0.
        parts: how many there are.
        texts: keys of chunks, each in order.
        olds: keys of old files, each in order.
    """
    new = all_of([_partition(one, part, parts) for one in texts], NO_TEXTS)
    old = all_of([_partition(one, part, parts) for one in olds], NO_OLD)
    high, low = (np.concatenate(both) for both in ((old.high, new.high), (old.low, new.low)))
    is_new = np.arange(len(high)) >= len(old.high)
    # Old lines stand before the texts that are equal to them, that of the lowest file first.
    within = np.concatenate([old.file, new.chunk])
    order = np.lexsort((within, is_new, low, high))
    high, low = high[order], low[order]
    begins = np.ones(len(order), np.bool_)
    begins[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    first = np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))
    found = is_new[order] & ~is_new[order[first]]
    source, text = order[first[found]], order[found] - len(old.high)
    made = Places(
        old.file[source],
        old.line[source],
        old.lines[source],
        new.chunk[text],
        new.high[text],
        new.low[text],
    )
    ends = np.append(begins[1:], np.True_)
    text = order[is_new[order[first]] & ~(begins & ends)] - len(old.high)
    text = text[np.argsort(new.chunk[text], kind="stable")]
    repeated = TextKeys(new.high[text], new.low[text], new.chunk[text])
    return made.take(np.lexsort((made.line, made.file))), repeated


def _partition(keys: _KeysT, part: int, parts: int) -> _KeysT:
    """Return the keys whose first number is in one of `parts` equal ranges."""
    ends = [0, len(keys.high)]
    for place in (part, part + 1):
        if 0 < place < parts:
            bound = np.uint64(place * 2**64 // parts)
            ends[place - part] = int(np.searchsorted(keys.high, bound))
    return type(keys)(*(column[ends[0] : ends[1]] for column in keys))
