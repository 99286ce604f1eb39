"""Whitening, principal components and z-scores, against numpy's and scikit-learn's own.

Covers: embedjob.vectors.fits.fitted, embedjob.vectors.fits.fit_arithmetic
"""

from functools import reduce

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from embedjob.config.fits.fit_kinds import Pca, Standardize, Whiten
from embedjob.errors import FitError
from embedjob.vectors.fits.fit_arithmetic import applied, first_pass, problem_of, width_after
from embedjob.vectors.fits.fitted import Block, Fitted
from embedjob.vectors.fits.moments import joined_moments, moments_of
from tests.vectors.fits.authors_whitening import bert_whitening

Matrix = npt.NDArray[np.float32]


def correlated(rows: int, width: int, *, seed: int = 0, mean: float = 3.0) -> Matrix:
    """Vectors of unequal variances, mixed, far from the origin."""
    numbers = np.random.default_rng(seed)
    mixing = numbers.normal(size=(width, width)) * np.geomspace(1, 0.05, width)
    return (numbers.normal(size=(rows, width)) @ mixing + mean).astype(np.float32)


def fit(section: object, *parts: Matrix) -> Fitted:
    """What a fit leaves of vectors that come in these parts."""
    step = first_pass(section)
    states = [step.partial(Block(part, np.zeros(len(part), np.uint64))) for part in parts]
    done = step.finish(reduce(step.merge, states))
    assert isinstance(done, Fitted)
    assert problem_of(done) is None
    return done


CUTS = st.lists(st.integers(0, 300), max_size=8).map(sorted)


@settings(max_examples=25)
@given(cuts=CUTS, seed=st.integers(0, 5))
def test_whitening_is_that_of_the_whole_matrix_however_it_is_cut(
    cuts: list[int], seed: int
) -> None:
    vectors_RD = correlated(300, 12, seed=seed)
    fitted = fit(Whiten(kind="whiten", name="w", dimensions=5), *np.split(vectors_RD, cuts))
    kernel, bias = bert_whitening(vectors_RD, 5)
    np.testing.assert_allclose(fitted.tensors["mean"], -bias[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(fitted.tensors["matrix"], kernel, rtol=0, atol=1e-6)
    after = applied(fitted, vectors_RD)
    wanted = (vectors_RD.astype(np.float64) + bias) @ kernel
    np.testing.assert_allclose(after, wanted, rtol=0, atol=1e-5)
    assert (after.dtype, fitted.rows, fitted.width, width_after(fitted)) == ("float32", 300, 12, 5)


def test_whitened_vectors_have_the_identity_as_covariance() -> None:
    vectors_RD = correlated(5000, 64)
    after = applied(fit(Whiten(kind="whiten", name="w"), vectors_RD), vectors_RD)
    np.testing.assert_allclose(np.cov(after.T), np.eye(64), rtol=0, atol=1e-3)
    # Before it is far from that, or any vectors would do.
    assert np.abs(np.cov(vectors_RD.T) - np.eye(64)).max() > 1


@given(cuts=CUTS)
@settings(max_examples=10)
def test_principal_components_are_those_of_scikit_learn(cuts: list[int]) -> None:
    vectors_RD = correlated(300, 12)
    fitted = fit(Pca(kind="pca", name="p", dimensions=4), *np.split(vectors_RD, cuts))
    reference = PCA(4, svd_solver="full").fit(vectors_RD.astype(np.float64))
    np.testing.assert_allclose(fitted.tensors["matrix"], reference.components_.T, atol=1e-6)
    wanted = reference.transform(vectors_RD.astype(np.float64))
    np.testing.assert_allclose(applied(fitted, vectors_RD), wanted, rtol=0, atol=1e-5)
    share = reference.explained_variance_ratio_.sum()
    assert fitted.facts["variance_kept"] == pytest.approx(share, abs=1e-6)


@given(cuts=CUTS)
@settings(max_examples=10)
def test_z_scores_are_those_of_scikit_learn(cuts: list[int]) -> None:
    vectors_RD = correlated(300, 12)
    vectors_RD[:, 3] = 0.1  # no float32 has this value in float64: its deviation is rounding
    fitted = fit(Standardize(kind="standardize", name="s"), *np.split(vectors_RD, cuts))
    wanted = StandardScaler().fit_transform(vectors_RD.astype(np.float64))
    after = applied(fitted, vectors_RD)
    np.testing.assert_allclose(after, wanted, rtol=0, atol=1e-5)
    assert np.abs(after[:, 3]).max() < 1e-6
    assert fitted.facts == {"constant_dimensions": 1}


def test_a_mean_far_from_the_origin_takes_no_digits() -> None:
    """Sums of squares would lose all of them: the variance is 1 beside a mean of 10^6."""
    numbers = np.random.default_rng(3).normal(size=(1000, 2)) + 1e6
    parts = [moments_of(part, crossed=True) for part in np.split(numbers, 7 * [100])]
    whole = reduce(joined_moments, [moments_of(one[None], crossed=True) for one in numbers])
    for state in (reduce(joined_moments, parts), whole):
        if state.rows == 1000:
            covariance = state.scatter / 999
            np.testing.assert_allclose(covariance, np.cov(numbers.T), rtol=1e-6)


@pytest.mark.parametrize(
    ("section", "vectors_RD", "words"),
    [
        (
            Whiten(kind="whiten", name="w", dimensions=4),
            correlated(4, 8),
            "got 4 vectors, and 4 dimensions need 5 at least",
        ),
        (
            Whiten(kind="whiten", name="w"),
            np.repeat(correlated(50, 4), 2, axis=1),
            "vary in 4 of 8 directions.*set dimensions: 4",
        ),
        (
            Pca(kind="pca", name="w"),
            np.full((20, 3), np.nan, np.float32),
            "NaN",
        ),
        (Standardize(kind="standardize", name="s"), np.full((9, 2), np.inf, np.float32), "NaN"),
    ],
)
def test_vectors_that_do_not_give_it_are_refused(
    section: object, vectors_RD: Matrix, words: str
) -> None:
    with np.errstate(invalid="ignore"), pytest.raises(FitError, match=words):
        fit(section, vectors_RD)


def test_vectors_of_another_width_are_refused() -> None:
    fitted = fit(Standardize(kind="standardize", name="s"), correlated(20, 4))
    with pytest.raises(FitError, match="width 4, got 5"):
        applied(fitted, correlated(2, 5))


def test_tensors_that_no_fit_leaves_are_told_apart() -> None:
    good = fit(Whiten(kind="whiten", name="w", dimensions=2), correlated(20, 4)).tensors
    others = {
        "no matrix": {"mean": good["mean"]},
        "a short mean": {**good, "mean": good["mean"][:3]},
        "a vector": {**good, "matrix": good["matrix"][:, 0]},
        "integers": {**good, "mean": np.zeros(4, np.int64)},
        "NaN": {**good, "mean": good["mean"] * np.nan},
    }
    for name, tensors in others.items():
        assert problem_of(Fitted("whiten", 20, 4, tensors)), name
