"""Sampling: a seeded part of a corpus, the same however the work is divided.

Every chunk and every row has a key of 64 bits, a hash of the seed and of its place. A sample is
what has the smallest keys: whole chunks until they hold several times the rows that are wanted, and
of these the rows. So each worker decides by itself what belongs to it, and a corpus that grows
keeps most of its sample.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from embedjob.config.job import Sample

Keys = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.integer]
# One row is taken of so many that are read: neighbouring rows are often alike.
_READ_PER_ROW = 4
# SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): its increment and its two multipliers.
_INCREMENT, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class SamplePlace(NamedTuple):
    """Rows [start, stop) of a shard that are read, or left out, together."""

    shard: str
    start: int
    stop: int


def all_rows(places: Sequence[SamplePlace]) -> Iterable[Rows]:
    """Return the numbers of all rows of each place."""
    return (np.arange(place.start, place.stop) for place in places)


def sample_of(
    places: Iterable[SamplePlace],
    *,
    rows: int,
    seed: int,
    counted: Callable[[Sequence[SamplePlace]], Iterable[Rows]] = all_rows,
) -> Sample | None:
    """Return the sample of so many rows; None where there are no more rows than that.

    `counted` gives the numbers of the rows of each place that may be in a sample, one place after
    the other: it may have to read them, and no more are asked for than are needed.
    """
    ordered = sorted(places, key=lambda place: chunk_key(place.shard, place.start, seed=seed))
    bound, held = 0, 0
    keys: list[Keys] = []
    for place, numbers in zip(ordered, counted(ordered), strict=True):
        bound, held = chunk_key(place.shard, place.start, seed=seed), held + len(numbers)
        keys.append(row_keys(place.shard, numbers, seed=seed))
        if held >= max(_READ_PER_ROW * rows, rows + 1):
            break
    if held <= rows:
        return None
    last = np.partition(np.concatenate(keys), rows - 1)[rows - 1]
    return Sample(seed=seed, chunks=bound, rows=int(last))


def has_chunk(sample: Sample, shard: str, start: int) -> bool:
    """Return whether the chunk that begins at this row of a shard belongs to a sample."""
    return chunk_key(shard, start, seed=sample.seed) <= sample.chunks


def sampled_rows(
    sample: Sample, shard: str, rows: npt.NDArray[np.integer]
) -> npt.NDArray[np.bool_]:
    """Return which rows of a shard belong to a sample, if their chunk does [R]."""
    chosen: npt.NDArray[np.bool_] = row_keys(shard, rows, seed=sample.seed) <= np.uint64(
        sample.rows
    )
    return chosen


def chunk_key(shard: str, start: int, *, seed: int) -> int:
    """Return the key of the chunk that begins at this row of a shard."""
    return _digest(f"embedjob sample 1: {seed} {start} {shard}")


def row_keys(shard: str, rows: Sequence[int] | npt.NDArray[np.integer], *, seed: int) -> Keys:
    """Return the keys of rows of a shard [R]."""
    begin = _digest(f"embedjob row 1: {seed} {shard}")
    return mixed(np.asarray(rows).astype(np.uint64), begin)


def mixed(numbers: Keys, begin: int = 0) -> Keys:
    """Return what SplitMix64 draws in these places from `begin` on: a hash of each number."""
    with np.errstate(over="ignore"):  # the arithmetic is modulo 2^64
        state = np.uint64(begin) + (numbers + np.uint64(1)) * np.uint64(_INCREMENT)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(_FIRST)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(_SECOND)
    drawn: Keys = state ^ (state >> np.uint64(31))
    return drawn


def _digest(text: str) -> int:
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
