"""Spans, poolings, heads and finishing steps as config values: taken as meant, or refused."""

import re
from pathlib import Path
from typing import Any

import pytest

from embedjob.config import heads, pooling
from embedjob.config.job_file import recipe_from
from embedjob.errors import ConfigError

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
HEADS = {
    "pooler": ({"pooler": True}, heads.Pooler),
    "dense": ({"dense": "2_Dense"}, heads.Dense),
    "a folder inside a folder": ({"dense": "heads/2_Dense"}, heads.Dense),
    "layer_norm": ({"layer_norm": "3_LayerNorm"}, heads.LayerNorm),
    "normalize": ({"normalize": True}, pooling.Normalize),
    "sparse_lm": ({"sparse_lm": {}}, heads.SparseHead),
    "router": ({"router": {"join": "concat"}}, heads.RouterHead),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown head": ({"heads": [{"denser": "2_Dense"}]}, "object with one of the keys pooler"),
    "a folder elsewhere": (
        {"heads": [{"dense": "../2_Dense"}]},
        "inside the model folder, such as",
    ),
    "an absolute folder": (
        {"heads": [{"layer_norm": "/norm"}]},
        "inside the model folder, such as",
    ),
    "an unknown pooling": ({"pooling": "median"}, "pooling"),
    "no part": ({"pooling": []}, "pooling"),
    "a weight of nothing": ({"pooling": [{"weighted_mean": 0}]}, "greater than or equal to 1"),
    "an unknown span": ({"span": "every"}, "span"),
    "no dimension": ({"finish": [{"truncate": 0}]}, "greater than or equal to 1"),
    "two steps in one": ({"finish": [{"whiten": "a", "flow": "b"}]}, "got whiten and flow"),
    "an empty step": ({"finish": [{}]}, "an object with one of the keys normalize, truncate, "),
    "a misspelt step": ({"finish": [{"whitten": "w"}]}, "one of the keys .*, whiten, pca, "),
    "two steps of two kinds": (
        {"finish": [{"normalize": True, "truncate": 5}]},
        r"finish\.0\.truncate: got normalize and truncate together; write each as an entry",
    ),
}


def recipe(**knobs: Any) -> Any:
    return recipe_from({"model": "m", "templates": ["{text}"], **knobs}, {})


@pytest.mark.parametrize(("written", "kind"), HEADS.values(), ids=HEADS)
def test_a_head_is_known_by_its_key(written: dict[str, Any], kind: type) -> None:
    [head] = recipe(heads=[written]).heads
    assert type(head) is kind


@pytest.mark.parametrize(("knobs", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_meant_is_refused_with_the_reason(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe(**knobs)


def test_parts_of_a_pooling_stand_in_their_order() -> None:
    parts = recipe(pooling=["first", {"weighted_mean": 3}, "last"]).pooling
    assert parts == ("first", pooling.WeightedFrom(weighted_mean=3), "last")


def test_the_docs_list_what_late_chunk_may_divide() -> None:
    text = OPERATIONS.read_text(encoding="utf-8")
    spans, poolings = re.findall(
        r"the spans (`[^;]*?), one of the poolings (.*?), and no cleaning", text, re.DOTALL
    )[0]
    assert {*re.findall(r"`(\w+)`", spans)} == {*pooling.DIVISIBLE_SPANS}
    divisible = {key for key, kind in pooling.POOLINGS.items() if kind.single and kind.divisible}
    assert {*re.findall(r"`(\w+)`", poolings)} == divisible
