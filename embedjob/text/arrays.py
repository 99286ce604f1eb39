"""Rows of different lengths, one after the other in one array, and where each begins."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.uint32]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


def offsets_of(sizes: npt.NDArray[np.integer]) -> Ints:
    """Where each of N runs begins, and where the last ends [N + 1]."""
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def gather(offsets: Ints, runs: Ints) -> tuple[Ints, Ints]:
    """The places of these runs, one run after the other, and the runs' offsets among them."""
    sizes = np.diff(offsets)[runs]
    found = offsets_of(sizes)
    return np.repeat(offsets[runs] - found[:-1], sizes) + np.arange(found[-1]), found


def flatten(rows: Sequence[Sequence[int]]) -> tuple[Ids, Ints]:
    """All ids in one array, and the offsets of the rows in it."""
    sizes = np.fromiter(map(len, rows), np.int64, len(rows))
    offsets = offsets_of(sizes)
    return np.fromiter(chain.from_iterable(rows), np.uint32, int(offsets[-1])), offsets
