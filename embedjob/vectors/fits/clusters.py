"""Centroids by k-means: Lloyd's passes over all vectors from k-means++ on a sample of them.

Sources: Lloyd, "Least squares quantization in PCM" (1982); Arthur and Vassilvitskii, k-means++
(SODA 2007); spherical k-means: Dhillon and Modha (Machine Learning 42, 2001).

Shapes: R rows, D width, C clusters.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedjob.errors import FitError, amount
from embedjob.vectors.encoded import Vectors
from embedjob.vectors.fits.fitted import Block, Fitted, Wide, require_finite

# The sample in which k-means++ looks: so many vectors for each centroid, within so much memory.
_SEEDS_EACH, _FEWEST_SEEDS, _SEED_NUMBERS = 16, 4096, 16 * 2**20


@dataclass(frozen=True)
class Seeds:
    """The vectors with the smallest keys [R, D], of so many that were seen."""

    rows: int
    keys_R: npt.NDArray[np.uint64]
    vectors_RD: Vectors


@dataclass(frozen=True)
class Sums:
    """What the vectors nearest to each centroid add up to [C, D], and how many they are [C].

    `inertia` is the sum of the squares of their distances.
    """

    counts_C: npt.NDArray[np.int64]
    sums_CD: Wide
    inertia: float


@dataclass(frozen=True)
class SeedPass:
    """Collects a sample of the vectors, and begins with `clusters` of them."""

    clusters: int
    spherical: bool
    iterations: int
    tolerance: float
    seed: int

    def partial(self, block: Block) -> Seeds:
        """Return the vectors of a block with the smallest keys."""
        require_finite(block.vectors_RD)
        return self._fewest(len(block.keys_R), block.keys_R, block.vectors_RD)

    def merge(self, left: Seeds, right: Seeds) -> Seeds:
        """Return the vectors of both with the smallest keys."""
        keys_R = np.concatenate([left.keys_R, right.keys_R])
        vectors_RD = np.concatenate([left.vectors_RD, right.vectors_RD])
        return self._fewest(left.rows + right.rows, keys_R, vectors_RD)

    def finish(self, state: Seeds) -> "LloydPass":
        """Return the first of Lloyd's passes; FitError where there are fewer vectors than asked."""
        if state.rows < self.clusters:
            raise FitError(
                f"got {amount(state.rows, 'vector')}, and {self.clusters} clusters need as many at"
                " least; set fewer clusters, or a larger sample"
            )
        vectors_RD = _scaled(state.vectors_RD.astype(np.float64), self.spherical)
        chosen = np.random.default_rng(self.seed)
        return LloydPass(self, _plus_plus(vectors_RD, self.clusters, chosen))

    def _fewest(self, rows: int, keys_R: npt.NDArray[np.uint64], vectors_RD: Vectors) -> Seeds:
        wanted = max(_SEEDS_EACH * self.clusters, _FEWEST_SEEDS)
        most = max(self.clusters, min(wanted, _SEED_NUMBERS // max(1, vectors_RD.shape[1])))
        first = np.argsort(keys_R, kind="stable")[:most]
        return Seeds(rows, keys_R[first], vectors_RD[first])


@dataclass(frozen=True)
class LloydPass:
    """Moves each centroid to the mean of the vectors that are nearest to it."""

    how: SeedPass
    centroids_CD: Wide
    done: int = 0

    def partial(self, block: Block) -> Sums:
        """Return the sums of a block's vectors, by the nearest centroid."""
        vectors_RD = _scaled(block.vectors_RD.astype(np.float64), self.how.spherical)
        squares_RC = _squared_distances(vectors_RD, self.centroids_CD)
        nearest_R = squares_RC.argmin(axis=1)
        sums_CD = np.zeros_like(self.centroids_CD)
        np.add.at(sums_CD, nearest_R, vectors_RD)
        counts_C = np.bincount(nearest_R, minlength=len(sums_CD))
        return Sums(counts_C, sums_CD, float(squares_RC.min(axis=1).sum()))

    def merge(self, left: Sums, right: Sums) -> Sums:
        """Return the sums of both."""
        return Sums(
            left.counts_C + right.counts_C,
            left.sums_CD + right.sums_CD,
            left.inertia + right.inertia,
        )

    def finish(self, state: Sums) -> "LloydPass | Fitted":
        """Return the next pass; the centroids [C, D] once they stand still, or enough was done.

        A centroid that no vector is nearest to stays where it is.
        """
        counts_C1 = state.counts_C[:, None]
        means_CD = state.sums_CD / np.maximum(counts_C1, 1)
        moved_CD = _scaled(np.where(counts_C1 > 0, means_CD, self.centroids_CD), self.how.spherical)
        shift = float(((moved_CD - self.centroids_CD) ** 2).sum())
        size = float((moved_CD**2).mean()) * moved_CD.shape[1]
        passes = self.done + 1
        if passes < self.how.iterations and shift > self.how.tolerance * size:
            return LloydPass(self.how, moved_CD, passes)
        rows = int(state.counts_C.sum())
        facts = {
            "passes": passes,
            # Of the centroids before the last move: those after it are seen by no pass.
            "mean_squared_distance": float(f"{state.inertia / rows:.6g}"),
            "empty_clusters": int((state.counts_C == 0).sum()),
        }
        tensors = {"centroids": moved_CD.astype(np.float32)}
        return Fitted("kmeans", rows, moved_CD.shape[1], tensors, facts)


def nearest_centroids(fitted: Fitted, vectors_RD: Vectors) -> npt.NDArray[np.int64]:
    """Return the number of each vector's nearest centroid [R]."""
    centroids_CD = fitted.tensors["centroids"].astype(np.float64)
    squares_RC = _squared_distances(vectors_RD.astype(np.float64), centroids_CD)
    nearest_R: npt.NDArray[np.int64] = squares_RC.argmin(axis=1)
    return nearest_R


def _plus_plus(vectors_RD: Wide, clusters: int, chosen: np.random.Generator) -> Wide:
    """Return centroids, each drawn by the square of its distance to those before it."""
    centroids = [vectors_RD[chosen.integers(len(vectors_RD))]]
    squares_R = _squared_distances(vectors_RD, centroids[0][None])[:, 0]
    while len(centroids) < clusters:
        total = squares_R.sum()
        # All vectors are centroids already: any is as good.
        shares_R = squares_R / total if total > 0 else None
        centroids.append(vectors_RD[chosen.choice(len(vectors_RD), p=shares_R)])
        squares_R = np.minimum(squares_R, _squared_distances(vectors_RD, centroids[-1][None])[:, 0])
    return np.stack(centroids)


def _squared_distances(vectors_RD: Wide, centroids_CD: Wide) -> Wide:
    products_RC = vectors_RD @ centroids_CD.T
    squares_R1 = np.einsum("rd,rd->r", vectors_RD, vectors_RD)[:, None]
    squares_C = np.einsum("cd,cd->c", centroids_CD, centroids_CD)
    distances_RC: Wide = np.maximum(squares_R1 - 2 * products_RC + squares_C, 0)
    return distances_RC


def _scaled(vectors_RD: Wide, spherical: bool) -> Wide:
    """Return unit vectors where directions are clustered; a zero vector stays zero."""
    if not spherical:
        return vectors_RD
    norms_R1 = np.linalg.norm(vectors_RD, axis=1, keepdims=True)
    scaled_RD: Wide = vectors_RD / np.where(norms_R1 == 0, 1, norms_R1)
    return scaled_RD
