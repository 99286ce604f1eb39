"""Weights of rare words, and the direction that means of words have in common.

Sources: smooth inverse frequency, a / (a + p), and the removal of the first singular vector are SIF
(Arora, Liang and Ma, "A Simple but Tough-to-Beat Baseline for Sentence Embeddings", ICLR 2017);
idf is scikit-learn's.

Shapes: R rows, D width, V words of a table.
"""

from dataclasses import dataclass

import numpy as np

from embedjob.config.pooling import WordWeights
from embedjob.errors import FitError
from embedjob.vectors.encoded import Vectors
from embedjob.vectors.fits.fitted import Block, Fitted, Wide

# So many rows are in float64 at a time.
_ROWS_AT_ONCE = 8192


def word_weights(counts: Fitted, pooling: WordWeights) -> Vectors:
    """Return the weight of each word of a table [V], by its counts in a corpus of texts."""
    if pooling.idf is not None:
        documents_V = counts.tensors["documents"].astype(np.float64)
        weights_V: Wide = np.log((1.0 + counts.rows) / (1.0 + documents_V)) + 1.0
    else:
        occurrences_V = counts.tensors["occurrences"].astype(np.float64)
        share_V = occurrences_V / max(1.0, float(occurrences_V.sum()))
        weights_V = pooling.a / (pooling.a + share_V)
    return weights_V.astype(np.float32)


def word_counts_problem(fitted: Fitted) -> str | None:
    """Return why tensors are no counts of words; None where they are."""
    if set(fitted.tensors) != {"documents", "occurrences"}:
        return f"it holds {', '.join(fitted.tensors) or 'nothing'}"
    documents_V, occurrences_V = (fitted.tensors[name] for name in ("documents", "occurrences"))
    if documents_V.shape != (fitted.width,) or occurrences_V.shape != (fitted.width,):
        return f"it has no count for each of {fitted.width} words"
    if documents_V.dtype != np.int64 or occurrences_V.dtype != np.int64:
        return "its counts are no whole numbers"
    in_order = (documents_V >= 0) & (documents_V <= occurrences_V) & (documents_V <= fitted.rows)
    return None if in_order.all() else "a word is in more texts than there are"


@dataclass(frozen=True)
class Products:
    """The number of vectors, and the sums of the products of each two dimensions [D, D]."""

    rows: int
    products_DD: Wide


@dataclass(frozen=True)
class CommonComponentPass:
    """The first right singular vector of all vectors, by the products of their dimensions."""

    def partial(self, block: Block) -> Products:
        """Return the products of a block."""
        wide = block.vectors_RD.shape[1]
        products_DD = np.zeros((wide, wide))
        for start in range(0, len(block.vectors_RD), _ROWS_AT_ONCE):
            rows_RD = block.vectors_RD[start : start + _ROWS_AT_ONCE].astype(np.float64)
            products_DD += rows_RD.T @ rows_RD
        return Products(len(block.vectors_RD), products_DD)

    def merge(self, left: Products, right: Products) -> Products:
        """Return the products of both."""
        return Products(left.rows + right.rows, left.products_DD + right.products_DD)

    def finish(self, state: Products) -> Fitted:
        """Return the direction [D], its largest number positive; FitError where there is none."""
        if not np.isfinite(state.products_DD).all() or not state.products_DD.any():
            raise FitError("got vectors with NaN or infinite numbers, or zeros alone")
        squares_D, directions_DD = np.linalg.eigh(state.products_DD)
        direction_D = directions_DD[:, -1]
        direction_D = direction_D * np.sign(direction_D[np.abs(direction_D).argmax()])
        share = float(squares_D[-1] / squares_D.sum())
        tensors = {"direction": np.ascontiguousarray(direction_D)}
        facts = {"share_of_squares": round(share, 6)}
        return Fitted("common_component", state.rows, len(direction_D), tensors, facts)


def without_common_component(fitted: Fitted, vectors_RD: Vectors) -> Vectors:
    """Return the vectors without their part along the direction [R, D]."""
    direction_D = fitted.tensors["direction"].astype(np.float64)
    wide_RD = vectors_RD.astype(np.float64)
    left_RD: Wide = wide_RD - np.outer(wide_RD @ direction_D, direction_D)
    return left_RD.astype(np.float32)
