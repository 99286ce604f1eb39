"""Fits from means and covariances: standardize, principal components, whitening.

Blocks are merged by Chan's update (Chan, Golub and LeVeque, 1979), in float64, which loses nothing
where a mean is large beside its deviations. The sign of a direction is such that its largest
number is positive.
Sources: BERT-whitening is the recipe of Su et al. (arXiv:2103.15316): W = U diag(S^-1/2) of the
covariance, of which the first dimensions are kept; the z-score is that of MoEE (arXiv:2410.10814).

Shapes: R rows, D width, K dimensions kept.
"""

from dataclasses import dataclass

import numpy as np

from embedjob.errors import FitError, amount
from embedjob.vectors.encoded import Vectors
from embedjob.vectors.fits.fitted import Block, Fitted, Wide, require_finite

# So many rows are in float64 at a time.
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Moments:
    """The mean of `rows` vectors [D], and the sums of the products of their deviations from it.

    `scatter` is [D, D], or [D] where only the squares are wanted.
    """

    rows: int
    mean_D: Wide
    scatter: Wide

    @property
    def width(self) -> int:
        """Return the width of the vectors."""
        return len(self.mean_D)


def moments_of(vectors_RD: Vectors, *, crossed: bool) -> Moments:
    """Return the moments of vectors; with `crossed` those of each two dimensions."""
    wide = vectors_RD.shape[1]
    total = Moments(0, np.zeros(wide), np.zeros((wide, wide) if crossed else wide))
    for start in range(0, len(vectors_RD), _ROWS_AT_ONCE):
        rows_RD = vectors_RD[start : start + _ROWS_AT_ONCE].astype(np.float64)
        mean_D = rows_RD.mean(axis=0)
        rows_RD -= mean_D
        scatter = rows_RD.T @ rows_RD if crossed else np.einsum("rd,rd->d", rows_RD, rows_RD)
        total = joined_moments(total, Moments(len(rows_RD), mean_D, scatter))
    return total


def joined_moments(left: Moments, right: Moments) -> Moments:
    """Return the moments of the vectors of both."""
    rows = left.rows + right.rows
    if not left.rows or not right.rows:
        return left if left.rows else right
    apart_D = right.mean_D - left.mean_D
    share = right.rows / rows
    products = np.outer(apart_D, apart_D) if left.scatter.ndim > 1 else apart_D**2
    scatter = left.scatter + right.scatter + products * (left.rows * share)
    return Moments(rows, left.mean_D + apart_D * share, scatter)


@dataclass(frozen=True)
class StandardizePass:
    """Means and standard deviations, these over all rows and not over one row less."""

    def partial(self, block: Block) -> Moments:
        """Return the moments of a block."""
        return moments_of(block.vectors_RD, crossed=False)

    def merge(self, left: Moments, right: Moments) -> Moments:
        """Return the moments of both."""
        return joined_moments(left, right)

    def finish(self, state: Moments) -> Fitted:
        """Return the mean [D] and the scale [D], 1 where a dimension does not vary."""
        require_finite(state.mean_D, state.scatter)
        deviation_D = np.sqrt(state.scatter / max(1, state.rows))
        # Rounding alone: a dimension that is the same everywhere is 0 afterwards.
        still_D = deviation_D <= np.finfo(np.float32).eps * np.abs(state.mean_D)
        scale_D = np.where(still_D, 1.0, deviation_D)
        tensors = {"mean": state.mean_D, "scale": scale_D}
        facts = {"constant_dimensions": int(still_D.sum())}
        return Fitted("standardize", state.rows, state.width, tensors, facts)


@dataclass(frozen=True)
class ComponentsPass:
    """Principal components, `whiten` with each divided by its deviation, of `dimensions` or all."""

    kind: str
    dimensions: int | None = None

    def partial(self, block: Block) -> Moments:
        """Return the moments of a block."""
        return moments_of(block.vectors_RD, crossed=True)

    def merge(self, left: Moments, right: Moments) -> Moments:
        """Return the moments of both."""
        return joined_moments(left, right)

    def finish(self, state: Moments) -> Fitted:
        """Return the mean [D] and the matrix [D, K] that vectors are multiplied by after it.

        FitError where the vectors vary in fewer than K directions.
        """
        kept = self.dimensions or state.width
        require_finite(state.mean_D, state.scatter)
        if state.rows <= kept:
            raise FitError(
                f"got {amount(state.rows, 'vector')}, and {kept} dimensions need {kept + 1} at"
                " least; set fewer dimensions, or a larger sample"
            )
        variances_D, directions_DD = np.linalg.eigh(state.scatter / (state.rows - 1))
        variances_D, directions_DD = variances_D[::-1], directions_DD[:, ::-1]
        rank = int((variances_D > _rounding(state, variances_D[0])).sum())
        if self.kind == "whiten" and kept > rank:
            raise FitError(
                f"the vectors vary in {rank} of {state.width} directions, and whitening would"
                f" divide by 0 in the others; set dimensions: {rank} or fewer"
            )
        matrix_DK = directions_DD[:, :kept]
        largest_K = np.take_along_axis(matrix_DK, np.abs(matrix_DK).argmax(axis=0)[None], axis=0)
        matrix_DK = matrix_DK * np.where(largest_K < 0, -1.0, 1.0)
        if self.kind == "whiten":
            matrix_DK = matrix_DK / np.sqrt(variances_D[:kept])
        share = float(variances_D[:kept].sum() / max(variances_D.sum(), np.finfo(float).tiny))
        tensors = {"mean": state.mean_D, "matrix": np.ascontiguousarray(matrix_DK)}
        facts = {"variance_kept": round(share, 6)}
        return Fitted(self.kind, state.rows, state.width, tensors, facts)


def standardized(fitted: Fitted, vectors_RD: Vectors) -> Vectors:
    """Return the vectors with mean 0 and variance 1 in each dimension [R, D]."""
    mean_D, scale_D = fitted.tensors["mean"], fitted.tensors["scale"]
    scores_RD: Wide = (vectors_RD.astype(np.float64) - mean_D) / scale_D
    return scores_RD.astype(np.float32)


def projected(fitted: Fitted, vectors_RD: Vectors) -> Vectors:
    """Return the vectors without their mean, in the directions of a matrix [R, K]."""
    mean_D, matrix_DK = fitted.tensors["mean"], fitted.tensors["matrix"]
    projected_RK: Wide = (vectors_RD.astype(np.float64) - mean_D) @ matrix_DK
    return projected_RK.astype(np.float32)


def _rounding(state: Moments, largest: float) -> float:
    """Return the variance up to which a direction may be nothing but rounding."""
    of_sums = largest * state.width * np.finfo(np.float64).eps
    of_numbers = (np.finfo(np.float32).eps * np.abs(state.mean_D).max()) ** 2
    return float(max(of_sums, of_numbers))
