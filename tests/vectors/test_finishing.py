import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.config.fits.fit_kinds import FITS
from embedjob.config.pooling import FitStep, Normalize, Truncate
from embedjob.config.recipe import Recipe
from embedjob.errors import ConfigError
from embedjob.vectors.aggregation import AGGREGATIONS
from embedjob.vectors.finishing import finish, normalize, width
from embedjob.vectors.fits.fit_arithmetic import ARITHMETIC
from embedjob.vectors.fits.fitted import Fitted

UNIT = Normalize(normalize=True)


def test_each_kind_of_fit_has_its_arithmetic_and_each_step_is_applied_by_it() -> None:
    assert ARITHMETIC.keys() == FITS.keys()
    steps = [kind for kind, one in FITS.items() if one.is_step]
    assert [kind for kind in steps if ARITHMETIC[kind].apply is None] == []


def test_order_decides() -> None:
    embeddings_RD = torch.tensor([[3.0, 4.0, 12.0]])
    cut_last = finish(embeddings_RD, [UNIT, Truncate(truncate=2)])
    cut_first = finish(embeddings_RD, [Truncate(truncate=2), UNIT])
    torch.testing.assert_close(cut_last, torch.tensor([[3 / 13, 4 / 13]]))
    torch.testing.assert_close(cut_first, torch.tensor([[0.6, 0.8]]))
    assert finish(embeddings_RD, []).tolist() == embeddings_RD.tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_any_finite_vector_gets_unit_norm_and_zero_stays_zero(values: list[float]) -> None:
    finished = normalize(torch.tensor([values]))[0]
    # Below the smallest normal float32 a value has lost its precision already.
    if max(map(abs, values)) >= torch.finfo(torch.float32).tiny:
        assert math.isclose(float(finished.double().norm()), 1.0, abs_tol=1e-5)
    else:
        assert torch.isfinite(finished).all()
    if not any(values):
        assert finished.tolist() == [0.0] * len(values)


def test_a_bad_vector_stays_visible() -> None:
    finished = normalize(torch.tensor([[math.nan, 1.0], [3.0, 4.0]]))
    assert not torch.isfinite(finished[0]).all()
    torch.testing.assert_close(finished[1], torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("aggregation", sorted(AGGREGATIONS))
@pytest.mark.parametrize("steps", [(), (UNIT,), (Truncate(truncate=3), UNIT)])
def test_width_is_what_comes_out(aggregation: str, steps: tuple[Normalize | Truncate]) -> None:
    recipe = Recipe(model="m", aggregation=aggregation, finish=steps)
    joined = AGGREGATIONS[aggregation](torch.randn(2, 4, 5), torch.ones(4))
    assert finish(joined, steps).shape[1] == width(5, views=4, recipe=recipe)


def test_truncation_to_more_than_there_is_names_both_widths() -> None:
    recipe = Recipe(model="m", finish=(Truncate(truncate=8), UNIT))
    with pytest.raises(ConfigError, match=r"truncate: 8.*5 wide"):
        width(5, views=1, recipe=recipe)


def test_what_a_fit_left_is_applied_in_its_place() -> None:
    tensors = {"mean": np.array([1.0, 2.0, 3.0]), "matrix": np.eye(3)[:, [2, 0]] * 2}
    fitted = {"0a": Fitted("whiten", rows=9, width=3, tensors=tensors)}
    steps = [FitStep(whiten="0a"), UNIT]
    embeddings_RD = torch.tensor([[4.0, 0.0, 7.0], [1.0, 9.0, 4.0]])
    found = finish(embeddings_RD, steps, fitted)
    torch.testing.assert_close(found, torch.tensor([[0.8, 0.6], [1.0, 0.0]]))
    recipe = Recipe(model="m", finish=tuple(steps))
    assert width(3, views=1, recipe=recipe, fitted={"0a": 2}) == 2
    assert width(3, views=1, recipe=recipe) == 3
    with pytest.raises(ConfigError, match="whiten: 0a of dimensions: 4, but the embedding is 3"):
        width(3, views=1, recipe=recipe, fitted={"0a": 4})
