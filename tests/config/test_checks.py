"""The table of rules across keys: when each is decided, and what its message says.

What each rule refuses is tested where its keys are.

Covers: embedjob.config.model_rules
"""

import string
from dataclasses import dataclass
from typing import Any

import pytest

from embedjob.config.checks import REQUIREMENTS, RULES, check_rules
from embedjob.config.heads import HEADS
from embedjob.config.job_file import recipe_from
from embedjob.config.recipe import Recipe, Split
from embedjob.errors import ConfigError, ModelError


@dataclass(frozen=True)
class Sizes:
    """A model of four blocks."""

    causal: bool = True
    layers: int = 4
    max_positions: int | None = 64
    length_bound: bool = False
    static: bool = False
    counts_terms: bool = False
    kind: str = "a transformer"


def recipe(**knobs: Any) -> Recipe:
    return Recipe(**{"model": "m", "max_tokens": 32, **knobs})


def test_passages_fit_the_views_and_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"got 400, but encoder.max_tokens is 32"):
        recipe(long_text="split")
    with pytest.raises(ConfigError, match=r"only long_text: split reads it, got .* bad; set"):
        check_rules(recipe(long_text="bad", split=Split(overlap=1)), "in a job")
    check_rules(recipe(long_text="split", split=Split(max_tokens=30)), "in a job")


def test_heads_require_rules_that_there_are() -> None:
    required = {name for kind in HEADS.values() for name in kind.requires}
    assert required - {"at most one"} <= set(REQUIREMENTS)


def test_every_message_says_what_was_got_or_what_to_do() -> None:
    words = ("got", "allowed", "leave", "set ", "need", "goes with")
    for rule in RULES:
        fields = {name for _, name, _, _ in string.Formatter().parse(rule.message) if name}
        assert any(word in rule.message for word in words), rule.message
        assert all(field.split(".")[0].isidentifier() for field in fields)


@pytest.mark.parametrize(
    ("knobs", "sizes", "said"),
    [
        ({}, Sizes(causal=False), "attention: got causal, but m is an encoder"),
        ({"layer": 5}, Sizes(), r"layer: got 5, allowed is -5 to 4 \(0 is the embeddings"),
        ({"layer": (0, -6)}, Sizes(), "layer: got -6"),
        ({"max_tokens": 65}, Sizes(), "max_tokens: got 65, but m has 64 positions; set .*: 64$"),
        ({"max_tokens": 65}, Sizes(length_bound=True), r"\(longrope\); set encoder.max_tokens: 64"),
    ],
)
def test_what_the_model_cannot_do_is_known_with_the_model(
    knobs: dict[str, Any], sizes: Sizes, said: str
) -> None:
    made = recipe(**knobs)
    with pytest.raises(ModelError, match=said):
        check_rules(made, "with model", model=sizes)
    check_rules(recipe(), "with model", model=Sizes())


def test_words_that_are_decoded_need_positions_too() -> None:
    knobs = {"max_tokens": 60, "span": "last_token", "decode": {"max_tokens": 6}}
    made = recipe_from({"model": "m", **knobs}, {})
    with pytest.raises(ModelError, match=r"max_tokens: got 60, but m has 64 .*max_tokens: 59$"):
        check_rules(made, "with model", model=Sizes())


def test_a_weight_that_nothing_reads_is_refused_in_a_job_alone() -> None:
    knobs = {"templates": [{"template": "{text}", "weight": 0.5}]}
    made = recipe_from({"model": "m", **knobs}, {})
    with pytest.raises(ConfigError, match=r"aggregation: got mean, but .* weight: 0.5"):
        check_rules(made, "in a job")


def test_the_first_broken_rule_of_the_table_is_told() -> None:
    knobs = {"word_cut": 9, "long_text": "chunk_mean", "heads": [{"sparse_lm": {}}]}
    with pytest.raises(ConfigError, match="heads: sparse_lm gives one line per text"):
        recipe_from({"model": "m", **knobs}, {})
