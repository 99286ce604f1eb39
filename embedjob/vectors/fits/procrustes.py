"""Orthogonal Procrustes: the rotation from one space of embeddings to another's.

Source: Schönemann, "A generalized solution of the orthogonal Procrustes problem" (1966); where the
widths differ, the map has orthonormal rows or columns.

Shapes: R rows, D width of the vectors, K width of the others.
"""

from dataclasses import dataclass

import numpy as np

from embedjob.errors import FitError, amount
from embedjob.vectors.encoded import Vectors
from embedjob.vectors.fits.fitted import Block, Fitted, Wide, require_finite

# A tenth of the rows is left out of the rotation, and measures it.
_MEASURED = np.uint64(10)


@dataclass(frozen=True)
class CrossProducts:
    """The products of the vectors of so many rows with those of the other space [D, K]."""

    rows: int
    products_DK: Wide


@dataclass(frozen=True)
class RotationPass:
    """Sums the products of both spaces; the rotation follows from their singular vectors."""

    def partial(self, block: Block) -> CrossProducts:
        """Return the products of a block's rows, but for those that measure."""
        left_RD, right_RK = _pairs(block, measured=False)
        return CrossProducts(len(left_RD), left_RD.T @ right_RK)

    def merge(self, left: CrossProducts, right: CrossProducts) -> CrossProducts:
        """Return the products of both."""
        return CrossProducts(left.rows + right.rows, left.products_DK + right.products_DK)

    def finish(self, state: CrossProducts) -> "LossPass":
        """Return the pass that measures the rotation; FitError where too few rows give it."""
        require_finite(state.products_DK)
        least = max(state.products_DK.shape)
        if state.rows < least:
            raise FitError(
                f"got {amount(state.rows, 'row')} that both outputs have, and {least} are needed at"
                " least; set a larger sample, or give an output of the same input as from"
            )
        left_DN, _, right_NK = np.linalg.svd(state.products_DK, full_matrices=False)
        return LossPass(left_DN @ right_NK, state.rows)


@dataclass(frozen=True)
class Cosines:
    """The sums, over rows, of the cosine between the spaces as they are rotated, and its square."""

    rows: int
    total: float
    squares: float


@dataclass(frozen=True)
class LossPass:
    """Measures a rotation [D, K] on rows that it was not computed from."""

    rotation_DK: Wide
    rows: int

    def partial(self, block: Block) -> Cosines:
        """Return the cosines of a block's measuring rows."""
        left_RD, right_RK = _pairs(block, measured=True)
        rotated_RK = left_RD @ self.rotation_DK
        norms_R = np.linalg.norm(rotated_RK, axis=1) * np.linalg.norm(right_RK, axis=1)
        cosines_R = np.einsum("rk,rk->r", rotated_RK, right_RK) / np.where(norms_R == 0, 1, norms_R)
        return Cosines(len(cosines_R), float(cosines_R.sum()), float((cosines_R**2).sum()))

    def merge(self, left: Cosines, right: Cosines) -> Cosines:
        """Return the cosines of both."""
        return Cosines(
            left.rows + right.rows, left.total + right.total, left.squares + right.squares
        )

    def finish(self, state: Cosines) -> Fitted:
        """Return the rotation [D, K] with its loss: one less the mean cosine."""
        mean = state.total / state.rows if state.rows else None
        facts = {
            "measured_rows": state.rows,
            "loss": None if mean is None else round(1 - mean, 6),
            "cosine_deviation": None
            if mean is None
            else round(float(np.sqrt(max(0.0, state.squares / state.rows - mean**2))), 6),
        }
        tensors = {"rotation": self.rotation_DK}
        return Fitted("align", self.rows, len(self.rotation_DK), tensors, facts)


def rotated(fitted: Fitted, vectors_RD: Vectors) -> Vectors:
    """Return vectors in the other space [R, K]."""
    rotated_RK: Wide = vectors_RD.astype(np.float64) @ fitted.tensors["rotation"]
    return rotated_RK.astype(np.float32)


def _pairs(block: Block, *, measured: bool) -> tuple[Wide, Wide]:
    assert block.others_RK is not None, "align reads two outputs"
    chosen_R = (block.keys_R % _MEASURED == 0) == measured
    left_RD, right_RK = block.vectors_RD[chosen_R], block.others_RK[chosen_R]
    return left_RD.astype(np.float64), right_RK.astype(np.float64)
