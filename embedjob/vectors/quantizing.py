"""Scalar and binary quantization, to the bit as sentence-transformers quantises.

int8 and uint8 count from 0 to 255 how many steps of (high - low) / 255 a value lies above the low
end of its dimension's range: value = low + step * number, where number is code + 128 in int8.
Values outside the range are clipped. binary and ubinary keep signs, eight to a byte, the first
dimension in the highest bit; if the width is no multiple of 8, the last byte is filled with zeros.
Source: the quantisation of sentence-transformers (Reimers and Gurevych, EMNLP 2019,
arXiv:1908.10084; Shakir, Aarsen and Lee, "Binary and Scalar Embedding Quantization", 2024).

Shapes: R rows, D width, B = ceil(D / 8) bytes; a range is [2, D], smallest values first.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedjob.errors import ConfigError, FitError, amount
from embedjob.vectors.encoded import Vectors
from embedjob.vectors.fits.fitted import Block, Fitted, require_finite

Codes = npt.NDArray[np.floating] | npt.NDArray[np.int8] | npt.NDArray[np.uint8]

CALIBRATED = frozenset({"int8", "uint8"})
_LAST_BUCKET = 255
# The arithmetic needs several copies in float32, of a block of rows at a time.
_ROWS_AT_ONCE = 1024


def quantize(embeddings_RD: Vectors, dtype: str, *, ranges_2D: Vectors | None = None) -> Codes:
    """Return the embeddings [R, D], or [R, B] where packed, in a vector dtype of the recipe.

    ConfigError where int8 or uint8 come without ranges.
    """
    if dtype in CALIBRATED:
        if ranges_2D is None:
            raise ConfigError(
                f"encoder.vector_dtype: {dtype} needs the smallest and largest value of each"
                " dimension, but got none; Encoder.from_output reads the ranges of an output"
            )
        return _bucketed(embeddings_RD, dtype, ranges_2D)
    return _UNCALIBRATED[dtype](embeddings_RD)


def ranges_of(embeddings_RD: Vectors) -> Vectors:
    """Return the smallest and the largest value of each dimension [2, D]."""
    return np.vstack([embeddings_RD.min(axis=0), embeddings_RD.max(axis=0)])


@dataclass(frozen=True)
class Ranges:
    """The smallest and the largest value of each dimension [2, D] of so many vectors."""

    rows: int
    ranges_2D: Vectors


@dataclass(frozen=True)
class CalibratePass:
    """The ranges as a fit: one pass, and nothing to compute at its end."""

    def partial(self, block: Block) -> Ranges:
        """Return the ranges of a block; FitError where a number is not finite."""
        require_finite(block.vectors_RD)
        return Ranges(len(block.vectors_RD), ranges_of(block.vectors_RD))

    def merge(self, left: Ranges, right: Ranges) -> Ranges:
        """Return the ranges of both."""
        both = np.concatenate([left.ranges_2D, right.ranges_2D])
        return Ranges(left.rows + right.rows, ranges_of(both))

    def finish(self, state: Ranges) -> Fitted:
        """Return the ranges; FitError where there are fewer than two vectors."""
        if state.rows < 2:
            raise FitError(
                f"got {amount(state.rows, 'vector')}, and ranges need at least 2; set a larger"
                " sample, or leave the fit out"
            )
        width = state.ranges_2D.shape[1]
        return Fitted("calibrate", state.rows, width, {"ranges": state.ranges_2D})


def _bucketed(embeddings_RD: Vectors, dtype: str, ranges_2D: Vectors) -> Codes:
    low_D, high_D = ranges_2D.astype(np.float32, copy=False)
    steps_D = (high_D - low_D) / _LAST_BUCKET
    steps_D = np.where(steps_D == 0, 1, steps_D)
    codes_RD = np.empty(embeddings_RD.shape, np.uint8)
    for start in range(0, len(embeddings_RD), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        with np.errstate(over="ignore"):  # far outside a tiny range is the last bucket all the same
            buckets = np.floor((embeddings_RD[rows] - low_D) / steps_D)
        codes_RD[rows] = np.clip(buckets, 0, _LAST_BUCKET)
    return _signed(codes_RD) if dtype == "int8" else codes_RD


def _packed(embeddings_RD: Vectors) -> npt.NDArray[np.uint8]:
    return np.packbits(embeddings_RD > 0, axis=-1)


def _signed(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    """Shift bytes by -128 and keep their order, by flipping the first bit."""
    return (codes ^ 0x80).view(np.int8)


def _half(embeddings_RD: Vectors) -> Codes:
    with np.errstate(over="ignore"):  # the caller looks for infinities
        return embeddings_RD.astype(np.float16, copy=False)


_UNCALIBRATED: Mapping[str, Callable[[Vectors], Codes]] = {
    "float32": lambda embeddings_RD: embeddings_RD,
    "float16": _half,
    "binary": lambda embeddings_RD: _signed(_packed(embeddings_RD)),
    "ubinary": _packed,
}
