"""The ranges from which an output's embeddings are quantised, and the rows that gave them.

They decide values, so one set holds for every chunk and every run: that of the output's claim.
"""

import heapq
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from embedjob.input.chunks import Chunk
from embedjob.output.file_names import digest

SAMPLE_ROWS = 1024
# Below this sentence-transformers warns that buckets are unstable, and so do we.
ENOUGH_VECTORS = 100
_CHUNKS = 32
# Of the rows that are read, so many to one that is taken: neighbours are often alike.
_READ_PER_ROW = 16


@dataclass(frozen=True)
class Calibration:
    """The smallest and the largest value of each dimension [2, D] over a sample of embeddings."""

    ranges: Sequence[Sequence[float]]
    vectors: int

    @classmethod
    def of(cls, ranges_2D: npt.NDArray[np.float32], *, vectors: int) -> "Calibration":
        """The calibration of ranges, in the shortest decimals that name these float32 values."""
        ranges = tuple(tuple(float(str(value)) for value in side) for side in ranges_2D)
        return cls(ranges, vectors)

    @property
    def array(self) -> npt.NDArray[np.float32]:
        """The ranges [2, D], as every chunk and every query takes them."""
        return np.asarray(self.ranges, np.float32)

    def as_dict(self) -> dict[str, Any]:
        """The calibration as plain JSON values."""
        return asdict(self)


def sampled(chunks: Sequence[Chunk]) -> tuple[Chunk, ...]:
    """Some of a corpus' chunks, whichever were chosen before: by a hash of what they hold."""
    return tuple(heapq.nsmallest(_CHUNKS, chunks, key=_order))


def rows_each(chunks: Sequence[Chunk]) -> int:
    """How many rows of each sampled chunk are to be embedded."""
    return -(-SAMPLE_ROWS // max(1, len(chunks)))


def beginning(chunk: Chunk, *, rows: int) -> Chunk:
    """The part of a chunk that is read for so many rows; together no more than a usual chunk."""
    return replace(chunk, stop=min(chunk.stop, chunk.start + _READ_PER_ROW * rows))


def _order(chunk: Chunk) -> str:
    return digest(f"embedjob calibration 1: {chunk.shard.url} {chunk.start}")
