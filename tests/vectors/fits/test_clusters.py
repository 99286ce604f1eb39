import warnings
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from embedjob.config.fits.fit_kinds import Kmeans
from embedjob.errors import FitError
from embedjob.vectors.fits.clusters import LloydPass, nearest_centroids
from embedjob.vectors.fits.fit_arithmetic import first_pass, problem_of
from embedjob.vectors.fits.fitted import Block, Fitted

Matrix = npt.NDArray[np.float32]
CUTS = st.lists(st.integers(0, 400), max_size=6).map(sorted)


def blobs(*, apart: float = 6.0, seed: int = 0) -> Matrix:
    """400 vectors around eight corners of a cube."""
    numbers = np.random.default_rng(seed)
    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)]) * apart
    return (np.repeat(corners, 50, axis=0) + numbers.normal(size=(400, 3))).astype(np.float32)


def passes(vectors_RD: Matrix, cuts: list[int], **settings: Any) -> tuple[list[Any], Fitted]:
    """All passes of a fit over vectors that are cut there, and what it left."""
    section = Kmeans(kind="kmeans", name="k", **{"clusters": 8, **settings})
    keys = np.random.default_rng(1).integers(2**63, size=len(vectors_RD)).astype(np.uint64)
    parts = zip(np.split(vectors_RD, cuts), np.split(keys, cuts), strict=True)
    blocks = [Block(part, key) for part, key in parts]
    steps: list[Any] = [first_pass(section)]
    while not isinstance(steps[-1], Fitted):
        state = reduce(steps[-1].merge, map(steps[-1].partial, blocks))
        steps.append(steps[-1].finish(state))
    return steps[:-1], steps[-1]


@pytest.mark.parametrize("tolerance", [0.0, 1e-4])
def test_the_centroids_are_those_of_scikit_learn_from_the_same_beginning(tolerance: float) -> None:
    vectors_RD = blobs(apart=2.5)  # they overlap, so that it takes many passes
    steps, fitted = passes(vectors_RD, [], tolerance=tolerance, iterations=200)
    begin = steps[1]
    assert isinstance(begin, LloydPass)
    reference = KMeans(
        8, init=begin.centroids_CD, n_init=1, max_iter=200, tol=tolerance, algorithm="lloyd"
    ).fit(vectors_RD.astype(np.float64))
    if tolerance == 0:
        np.testing.assert_allclose(
            fitted.tensors["centroids"], reference.cluster_centers_, atol=1e-5
        )
        assert (nearest_centroids(fitted, vectors_RD) == reference.labels_).all()
    inertia = fitted.facts["mean_squared_distance"] * 400
    assert inertia == pytest.approx(reference.inertia_, rel=1e-2)
    assert (problem_of(fitted), fitted.rows, fitted.width) == (None, 400, 3)
    assert fitted.facts["passes"] == len(steps) - 1 > 2


@settings(max_examples=15)
@given(cuts=CUTS)
def test_they_are_the_same_however_the_vectors_are_cut(cuts: list[int]) -> None:
    vectors_RD = blobs()
    whole, fitted = passes(vectors_RD, [])
    steps, cut = passes(vectors_RD, cuts)
    np.testing.assert_array_equal(whole[1].centroids_CD, steps[1].centroids_CD)
    np.testing.assert_allclose(cut.tensors["centroids"], fitted.tensors["centroids"], atol=1e-6)


def test_clusters_that_are_apart_are_found() -> None:
    vectors_RD = blobs(apart=40.0)
    _, fitted = passes(vectors_RD, [123])
    found = nearest_centroids(fitted, vectors_RD).reshape(8, 50)
    assert (found == found[:, :1]).all()
    assert len(np.unique(found)) == 8


def test_spherical_centroids_are_directions() -> None:
    vectors_RD = blobs(apart=40.0) - 20
    vectors_RD *= np.random.default_rng(5).uniform(0.1, 10, size=(400, 1)).astype(np.float32)
    _, fitted = passes(vectors_RD, [50, 60], spherical=True)
    centroids = fitted.tensors["centroids"]
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)
    found = nearest_centroids(fitted, vectors_RD / np.linalg.norm(vectors_RD, axis=1)[:, None])
    assert (found.reshape(8, 50) == found.reshape(8, 50)[:, :1]).all()


def test_another_seed_begins_elsewhere_and_the_same_seed_in_the_same_place() -> None:
    begins = [passes(blobs(), [], seed=seed)[0][1].centroids_CD for seed in (1, 1, 2)]
    assert np.array_equal(begins[0], begins[1])
    assert not np.array_equal(begins[0], begins[2])


def test_fewer_texts_than_clusters_leave_some_empty() -> None:
    """Equal vectors are no more clusters than one; whoever reads the head sees it."""
    vectors_RD = np.ones((20, 3), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        _, fitted = passes(vectors_RD, [])
    assert fitted.facts["empty_clusters"] == 7
    np.testing.assert_array_equal(fitted.tensors["centroids"], np.ones((8, 3)))


def test_too_few_vectors_and_vectors_that_are_not_finite_are_refused() -> None:
    with pytest.raises(FitError, match="got 5 vectors, and 8 clusters need as many at least"):
        passes(blobs()[:5], [])
    with pytest.raises(FitError, match="NaN"):
        passes(blobs() * np.nan, [])
