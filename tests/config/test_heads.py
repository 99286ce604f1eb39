"""What a recipe asks for beside its vector, as config values."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from embedjob.config.heads import HEADS, Decode, WeightedSum
from embedjob.config.job_file import JobSource, Layer, recipe_from, validate_partial
from embedjob.config.recipe import Recipe
from embedjob.errors import ConfigError
from embedjob.job.resolve import layer_recipes


@pytest.mark.parametrize(
    ("heads", "similarity", "told"),
    [
        ([], {"sparse": 1.0}, "weight for sparse, but no head writes that column"),
        ([{"router": {"join": "concat"}}], {"router": 1.0}, "weight for router, but no head"),
        ([{"sparse_lm": {}}], {"embedding": "dot"}, "name its measure: dot"),
        ([{"sparse_lm": {}}], {"sparse": "much"}, "valid number"),
    ],
)
def test_a_sum_of_columns_that_are_not_there_is_refused(
    heads: list[Any], similarity: Any, told: str
) -> None:
    given = {"model": "m", "heads": heads, "similarity": similarity}
    with pytest.raises(ValidationError, match=told):
        Recipe.model_validate_json(json.dumps(given))


@pytest.mark.parametrize(
    ("method", "key", "given", "expected"),
    [
        ("promptreps", "similarity", {"sparse": 0.9}, WeightedSum(sparse=0.9)),
        ("promptreps", "decode", {"max_tokens": 3}, Decode(max_tokens=3)),
        ("prompteol", "decode", {"max_tokens": 3}, Decode(max_tokens=3)),
    ],
)
def test_what_goes_with_a_method_only_is_not_refused_before_it_is_read(
    method: str, key: str, given: Any, expected: Any
) -> None:
    document = {
        "input": {"path": "in", "text": "body"},
        "encoder": {"model": "m", "method": method, key: given},
        "pool": {"gpus_per_actor": 0},
        "output": {"path": "out"},
    }
    draft = JobSource((Layer("job.yaml", document),))
    validate_partial(draft)
    assert getattr(layer_recipes(draft, {}).recipe, key) == expected


def test_a_sum_with_a_head_that_the_job_takes_away_is_refused() -> None:
    document = {
        "input": {"path": "in", "text": "body"},
        "encoder": {"model": "m", "method": "promptreps", "heads": []},
        "output": {"path": "out"},
    }
    draft = JobSource((Layer("job.yaml", document),))
    validate_partial(draft)
    with pytest.raises(ConfigError, match="no head writes that column"):
        layer_recipes(draft, {})


def test_continuations_may_be_written_anchors_and_are_recorded_as_anchors() -> None:
    knobs = {"model": "m", "dtype": "float32", "aggregation": "concat", "finish": []}
    one, other = (
        recipe_from({**knobs, "heads": [{key: [" a", " b"]}]}, {})
        for key in ("continuations", "anchors")
    )
    assert one == other
    assert one.continuations == (" a", " b")
    assert one.model_dump(mode="json")["heads"] == [{"anchors": [" a", " b"]}]
    assert recipe_from(one.model_dump(mode="json"), {}) == one
    with pytest.raises(ConfigError, match="anchors"):
        recipe_from({**knobs, "heads": [{"continuations": [" a"], "anchors": [" a"]}]}, {})


def test_every_kind_of_head_answers_for_its_key() -> None:
    for key, kind in HEADS.items():
        (name,) = kind.section.model_fields
        assert name in (key, kind.also)


def test_a_router_in_the_vector_writes_no_column() -> None:
    heads = [{"router": {"join": "concat"}}, {"normalize": True}]
    joined = recipe_from({"model": "m", "heads": heads}, {})
    assert (joined.head_columns, joined.reads_routers) == (frozenset(), True)
    apart = recipe_from({"model": "m", "heads": [{"router": {}}, {"sparse_lm": {}}]}, {})
    assert apart.head_columns == {"router", "sparse_indices", "sparse_values"}
