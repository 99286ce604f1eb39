"""Sparse vectors as flat arrays: the entries of all rows, and where each row begins.

Shapes: R rows, N entries of all rows together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Offsets = npt.NDArray[np.int64]
EntryIds = npt.NDArray[np.uint32]
Weights = npt.NDArray[np.float32]
Row = tuple[EntryIds, Weights]
NO_ENTRIES: Row = (np.empty(0, np.uint32), np.empty(0, np.float32))


@dataclass(frozen=True)
class Sparse:
    """Sparse rows [R]: row r is `indices[offsets[r]:offsets[r + 1]]`, ascending, with `values`."""

    offsets: Offsets
    indices: EntryIds
    values: Weights

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.offsets) - 1

    def row(self, which: int) -> Row:
        """Return the indices and values of one row."""
        entries = slice(self.offsets[which], self.offsets[which + 1])
        return self.indices[entries], self.values[entries]

    def take(self, rows: npt.NDArray[np.integer]) -> "Sparse":
        """Return these rows in this order; a row may be repeated."""
        sizes = np.diff(self.offsets)[rows]
        offsets = _offsets(sizes)
        entries = np.repeat(self.offsets[rows] - offsets[:-1], sizes) + np.arange(offsets[-1])
        return Sparse(offsets, self.indices[entries], self.values[entries])


def sparse(rows: Sequence[Row]) -> Sparse:
    """Join rows into one Sparse."""
    sizes = np.fromiter((len(indices) for indices, _ in rows), np.int64, len(rows))
    indices = np.concatenate([NO_ENTRIES[0], *(ids for ids, _ in rows)])
    values = np.concatenate([NO_ENTRIES[1], *(weights for _, weights in rows)])
    return Sparse(_offsets(sizes), indices, values)


def heaviest(indices: EntryIds, values: Weights, *, top_k: int | None, scale: float | None) -> Row:
    """Return the `top_k` largest of ascending entries, rint(scale * value) of each, zeros left out.

    Among equals the lower index is kept. A value that is not finite is never left out.
    """
    if not np.isfinite(values).all():
        return indices, values
    if top_k is not None and len(values) > top_k:
        chosen = np.sort(np.argsort(-values, kind="stable")[:top_k])
        indices, values = indices[chosen], values[chosen]
    if scale is not None:
        values = np.rint(np.float32(scale) * values)
    kept = values != 0
    return indices[kept], values[kept]


def _offsets(sizes: npt.NDArray[np.integer]) -> Offsets:
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets
