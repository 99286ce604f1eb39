import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.config.pooling import POOLINGS, WeightedFrom
from embedjob.config.recipe import Recipe
from embedjob.vectors.poolers import POOLERS, pooler

PADDING = 999.0


def _padded(
    rows: list[list[float]], side: str, filling: float, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of width 2 (value and its negative), padded to one length, and their mask."""
    longest = max(map(len, rows))
    hidden_VTD = torch.full((len(rows), longest, 2), filling, dtype=dtype)
    mask_VT = torch.zeros(len(rows), longest, dtype=torch.bool)
    for view, row in enumerate(rows):
        start = longest - len(row) if side == "left" else 0
        states = torch.tensor(row, dtype=dtype)
        hidden_VTD[view, start : start + len(row)] = torch.stack([states, -states], dim=1)
        mask_VT[view, start : start + len(row)] = True
    return hidden_VTD, mask_VT


_EXPECTED = {
    "mean": lambda row: sum(row) / len(row),
    "weighted_mean": lambda row: (
        sum(i * x for i, x in enumerate(row, 1)) / (len(row) * (len(row) + 1) / 2)
    ),
    "max": max,
    "mean_sqrt_len": lambda row: sum(row) / math.sqrt(len(row)),
    "first": lambda row: row[0],
    "last": lambda row: row[-1],
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("filling", [PADDING, math.nan, math.inf])
@pytest.mark.parametrize("pooling", sorted(_EXPECTED))
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_a_pooling_is_its_formula_and_ignores_padding_on_either_side(
    pooling: str, filling: float, side: str, data: st.DataObject
) -> None:
    values = st.floats(-100, 100, width=32)
    rows = data.draw(st.lists(st.lists(values, min_size=1, max_size=12), min_size=1, max_size=4))
    pooled = POOLERS[pooling](*_padded(rows, side, filling))
    formula = _EXPECTED[pooling]
    expected = [[formula(row), formula([-value for value in row])] for row in rows]
    torch.testing.assert_close(pooled, torch.tensor(expected), rtol=1e-5, atol=1e-3)


def test_every_pooling_without_weights_has_its_formula_here() -> None:
    assert set(_EXPECTED) == set(POOLERS)


@pytest.mark.parametrize("pooling", sorted(POOLERS))
def test_a_span_of_one_token_is_that_token(pooling: str) -> None:
    hidden_VTD = torch.arange(10.0)[None, :, None].expand(1, 10, 3)
    for position in range(10):
        mask_VT = torch.zeros(1, 10, dtype=torch.bool)
        mask_VT[0, position] = True
        assert POOLERS[pooling](hidden_VTD, mask_VT).tolist() == [[float(position)] * 3]


def test_half_precision_states_are_summed_in_float32() -> None:
    # In bfloat16 a sum of ones stays at 256.
    hidden_VTD = torch.ones(1, 3000, 1, dtype=torch.bfloat16)
    pooled = POOLERS["mean"](hidden_VTD, torch.ones(1, 3000, dtype=torch.bool))
    assert pooled.dtype is torch.float32
    assert pooled.item() == pytest.approx(1.0)


def test_several_poolings_stand_one_after_another() -> None:
    padded = _padded([[1.0, -2.0, 4.0], [-5.0]], "left", math.nan)
    pooled = pooler(("max", "last", "mean"))(*padded)
    assert pooled.tolist() == [[4.0, 2.0, 4.0, -4.0, 1.0, -1.0], [-5.0, 5.0] * 3]


def test_weights_may_be_counted_from_before_the_span() -> None:
    pooled = pooler(WeightedFrom(weighted_mean=2))(*_padded([[1.0, -2.0], [5.0]], "left", math.nan))
    assert pooled[:, 0].tolist() == pytest.approx([(3 * 1 - 4 * 2) / 7, 5])


def test_first_and_last_are_poolings_only_among_others() -> None:
    single = {name for name, kind in POOLINGS.items() if kind.single}
    assert set(POOLERS) - single == {"first", "last"}
    for part in POOLERS:
        assert Recipe(model="m", pooling=(part, "mean")).pooling == (part, "mean")
    for pooling in ("first", ("latent_attention",), ()):
        with pytest.raises(ValueError, match="pooling"):
            Recipe(model="m", pooling=pooling)


def test_a_recipe_may_name_what_the_table_says() -> None:
    for pooling, kind in POOLINGS.items():
        assert (pooling in POOLERS) != kind.weights
        if kind.single:
            assert Recipe(model="m", pooling=pooling).pooling == pooling
