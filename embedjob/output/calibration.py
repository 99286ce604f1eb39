"""Calibration: the ranges by which an output's embeddings are quantised, and the sampled rows.

They decide values, so one set holds for every chunk and every run: the set in the output's claim.
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
# With fewer, sentence-transformers warns that buckets are unstable, and so does embedjob.
ENOUGH_VECTORS = 100
_CHUNKS = 32
# Rows read per row sampled: neighbours are often alike.
_READ_PER_ROW = 16


@dataclass(frozen=True)
class Calibration:
    """The smallest and the largest value of each dimension [2, D] over a sample of embeddings."""

    ranges: Sequence[Sequence[float]]
    vectors: int

    @classmethod
    def of(cls, ranges_2D: npt.NDArray[np.float32], *, vectors: int) -> "Calibration":
        """Build from ranges, as the shortest decimals that name their float32 values."""
        ranges = tuple(tuple(float(str(value)) for value in side) for side in ranges_2D)
        return cls(ranges, vectors)

    @property
    def array(self) -> npt.NDArray[np.float32]:
        """Return the ranges [2, D], as every chunk and every query uses them."""
        return np.asarray(self.ranges, np.float32)

    def as_dict(self) -> dict[str, Any]:
        """Return the calibration as plain JSON values."""
        return asdict(self)


def sampled_chunks(chunks: Sequence[Chunk]) -> tuple[Chunk, ...]:
    """Return a deterministic sample of a corpus' chunks, ordered by a hash of their place."""
    return tuple(heapq.nsmallest(_CHUNKS, chunks, key=_order))


def rows_each(chunks: Sequence[Chunk]) -> int:
    """Return how many rows to embed of each sampled chunk."""
    return -(-SAMPLE_ROWS // max(1, len(chunks)))


def beginning(chunk: Chunk, *, rows: int) -> Chunk:
    """Return the part of a chunk to read for `rows` rows; all parts are at most a usual chunk."""
    return replace(chunk, stop=min(chunk.stop, chunk.start + _READ_PER_ROW * rows))


def _order(chunk: Chunk) -> str:
    return digest(f"embedjob calibration 1: {chunk.shard.url} {chunk.start}")
