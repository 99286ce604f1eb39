from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from scipy.stats import ortho_group

from embedjob.config.fits.fit_kinds import Align
from embedjob.errors import FitError
from embedjob.vectors.fits.fit_arithmetic import applied, first_pass, problem_of, width_after
from embedjob.vectors.fits.fitted import Block, Fitted

KEYS = np.random.default_rng(2).integers(2**63, size=500).astype(np.uint64)


def fit(left: np.ndarray, right: np.ndarray, cuts: list[int] | None = None) -> Fitted:
    step = first_pass(Align.model_validate({"kind": "align", "name": "a", "from": "old"}))
    blocks = [
        Block(*part)
        for part in zip(
            np.split(left.astype(np.float32), cuts or []),
            np.split(KEYS[: len(left)], cuts or []),
            np.split(right.astype(np.float32), cuts or []),
            strict=True,
        )
    ]
    while not isinstance(step, Fitted):
        step = step.finish(reduce(step.merge, map(step.partial, blocks)))
    assert problem_of(step) is None
    return step


@settings(max_examples=20)
@given(cuts=st.lists(st.integers(0, 500), max_size=5).map(sorted), seed=st.integers(0, 9))
def test_a_random_rotation_is_recovered(cuts: list[int], seed: int) -> None:
    left = np.random.default_rng(seed).normal(size=(500, 16))
    rotation = ortho_group.rvs(16, random_state=seed)
    fitted = fit(left, left @ rotation, cuts)
    np.testing.assert_allclose(fitted.tensors["rotation"], rotation, atol=1e-5)
    np.testing.assert_allclose(applied(fitted, left.astype(np.float32)), left @ rotation, atol=1e-4)
    assert fitted.facts["loss"] == pytest.approx(0, abs=1e-6)
    assert fitted.rows + fitted.facts["measured_rows"] == 500


def test_noise_is_a_loss_that_is_measured_on_other_rows() -> None:
    numbers = np.random.default_rng(4)
    left = numbers.normal(size=(500, 16))
    right = left @ ortho_group.rvs(16, random_state=4) + 0.5 * numbers.normal(size=(500, 16))
    fitted = fit(left, right)
    measured = KEYS % 10 == 0
    reference, _ = orthogonal_procrustes(left[~measured], right[~measured])
    np.testing.assert_allclose(fitted.tensors["rotation"], reference, atol=1e-5)
    turned, others = left[measured] @ reference, right[measured]
    norms = np.linalg.norm(turned, axis=1) * np.linalg.norm(others, axis=1)
    cosines = np.einsum("rd,rd->r", turned, others) / norms
    assert fitted.facts["loss"] == pytest.approx(1 - cosines.mean(), abs=1e-5)
    assert fitted.facts["cosine_deviation"] == pytest.approx(cosines.std(), abs=1e-5)
    assert 0.05 < fitted.facts["loss"] < 0.2
    # Unrelated spaces have a large one.
    assert fit(left, numbers.normal(size=(500, 16))).facts["loss"] > 0.6


@pytest.mark.parametrize(("width", "other"), [(16, 12), (12, 16)])
def test_spaces_of_other_widths_are_mapped_orthonormally(width: int, other: int) -> None:
    """What lies in a plane of the wider space is carried over as it is."""
    numbers = np.random.default_rng(6)
    plane = numbers.normal(size=(500, 8))
    left = plane @ np.linalg.qr(numbers.normal(size=(width, 8)))[0].T
    right = plane @ np.linalg.qr(numbers.normal(size=(other, 8)))[0].T
    fitted = fit(left, right)
    assert width_after(fitted) == other
    np.testing.assert_allclose(applied(fitted, left.astype(np.float32)), right, atol=1e-4)


def test_too_few_rows_in_common_are_refused() -> None:
    with pytest.raises(FitError, match="rows that both outputs have, and 16 are needed at least"):
        fit(np.ones((10, 16)), np.ones((10, 16)))
    with pytest.raises(FitError, match="NaN"):
        fit(np.full((100, 4), np.nan), np.ones((100, 4)))
