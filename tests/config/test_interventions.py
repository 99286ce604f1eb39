"""Interventions as a job writes them: what can be meant, and what is refused with the reason."""

from typing import Any

import pytest

from embedjob.config.interventions import INTERVENTIONS, Contrast, Prepend, given
from embedjob.config.job_file import recipe_from
from embedjob.errors import ConfigError

KINDS = ", ".join(INTERVENTIONS)

PREPEND = {"prepend": {"slot": "<PST>", "start": 1, "exit": 3}}
CONTRAST = {"contrast": {"template": "Not {text}", "layer": 4, "alpha": 2}}


def _prepend(**changes: Any) -> dict[str, Any]:
    return {"prepend": {**PREPEND["prepend"], **changes}}


def _contrast(**changes: Any) -> dict[str, Any]:
    return {"contrast": {**CONTRAST["contrast"], **changes}}


def test_both_may_be_given_in_any_order() -> None:
    for written in ([PREPEND, CONTRAST], [CONTRAST, PREPEND]):
        recipe = recipe_from({"model": "m", "interventions": written}, {})
        assert {one.key: one.settings for one in given(recipe.interventions)} == {
            "prepend": Prepend(slot="<PST>", start=1, exit=3),
            "contrast": Contrast(template="Not {text}", layer=4, alpha=2.0),
        }
    assert list(given(recipe_from({"model": "m"}, {}).interventions)) == []


def test_token_views_carry_the_slot_and_the_auxiliary_view_of_one_kind_each() -> None:
    kinds = INTERVENTIONS.values()
    assert sum(kind.slot is not None for kind in kinds) <= 1
    assert sum(kind.template is not None for kind in kinds) <= 1


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (
            [PREPEND, PREPEND],
            rf"got a kind twice; allowed is at most one of each kind \({KINDS}\)",
        ),
        ([{"steer": {}}], f"one of the keys {KINDS}"),
        ([_prepend(start=3)], "start must be less than exit; got 3 and 3"),
        ([_prepend(start=-1)], r"0\.prepend\.start: got -1, allowed is greater than or equal to 0"),
        ([_prepend(slot="")], r"slot"),
        ([_prepend(embedding="")], r"embedding"),
        (
            [_prepend(embedding="!", seed=3)],
            "seed draws an embedding, and embedding: '!' names one; leave one of the two out",
        ),
        ([_contrast(mode="half")], "mode"),
        ([_contrast(alpha=None)], "alpha belongs to mode: scaled, which needs it"),
        ([_contrast(mode="norm")], "alpha belongs to mode: scaled"),
    ],
)
def test_what_cannot_be_meant_is_refused(written: list[Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe_from({"model": "m", "interventions": written}, {})


def test_attention_that_sees_the_end_needs_none() -> None:
    knobs = {"model": "m", "attention": "bidirectional", "interventions": [PREPEND]}
    with pytest.raises(ConfigError, match="interventions need attention: causal"):
        recipe_from(knobs, {})


@pytest.mark.parametrize("long_text", ["chunk_mean", "late_chunk"])
def test_chunks_of_a_text_are_not_intervened_in(long_text: str) -> None:
    with pytest.raises(ConfigError, match=f"interventions: got long_text: {long_text}; allowed"):
        recipe_from({"model": "m", "long_text": long_text, "interventions": [PREPEND]}, {})


def test_what_is_decoded_is_not_intervened_in() -> None:
    knobs = {"model": "m", "decode": {}, "span": "last_token", "interventions": [PREPEND]}
    said = "interventions: got long_text: truncate, with decode; allowed is .*, without decode"
    with pytest.raises(ConfigError, match=said):
        recipe_from(knobs, {})
