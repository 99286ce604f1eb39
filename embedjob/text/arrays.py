"""Ragged arrays: rows of different lengths in one flat array, with the offset of each row."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.uint32]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


def offsets_of(sizes: npt.NDArray[np.integer]) -> Ints:
    """Return where each of N rows begins, and where the last one ends [N + 1]."""
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def gather(offsets: Ints, runs: Ints) -> tuple[Ints, Ints]:
    """Return the positions of these rows' entries, row after row, and the rows' new offsets."""
    sizes = np.diff(offsets)[runs]
    new_offsets = offsets_of(sizes)
    starts = np.repeat(offsets[runs] - new_offsets[:-1], sizes)
    return starts + np.arange(new_offsets[-1]), new_offsets


def flatten(rows: Sequence[Sequence[int]]) -> tuple[Ids, Ints]:
    """Return all ids in one array, and the offsets of the rows in it."""
    sizes = np.fromiter(map(len, rows), np.int64, len(rows))
    offsets = offsets_of(sizes)
    return np.fromiter(chain.from_iterable(rows), np.uint32, int(offsets[-1])), offsets
