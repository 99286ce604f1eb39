"""What a recipe asks for beside its vector, as config values."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from embedjob.recipe import Recipe


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
