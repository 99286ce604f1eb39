from typing import Any

import pytest

from embedjob.config.recipe import Recipe
from embedjob.errors import ConfigError
from embedjob.text.fitting import uncounted_tokens
from embedjob.text.tokenizing import ViewTokenizer
from tests.fakes import FAMILIES, tiny_tokenizer

SHOWN = ("A fox. An animal. ", "A stone. A thing. ")
TEMPLATES = ("{demonstrations}Say: {text}", "{text}: say it")


def asked(**knobs: Any) -> Recipe:
    defaults = {"model": "m", "templates": TEMPLATES, "demonstrations": SHOWN, "max_tokens": 60}
    return Recipe.model_validate({**defaults, **knobs})


@pytest.mark.parametrize("family", FAMILIES)
def test_demonstrations_that_do_not_count_leave_a_text_its_room(family: str) -> None:
    recipe = asked(demonstrations_count=False)
    more = uncounted_tokens(tiny_tokenizer(family), recipe)
    assert more[0] > 10
    assert more[1] == 0
    text = "the lazy dog " * 60
    bare = ViewTokenizer(tiny_tokenizer(family), asked(demonstrations=()))
    free = ViewTokenizer(tiny_tokenizer(family), recipe)
    assert free.views([text]).lengths.tolist() == (bare.views([text]).lengths + more).tolist()


def test_demonstrations_count_unless_told_and_where_there_are_none() -> None:
    tokenizer = tiny_tokenizer("llama")
    assert not uncounted_tokens(tokenizer, asked()).any()
    assert not uncounted_tokens(
        tokenizer, asked(demonstrations=(), demonstrations_count=False)
    ).any()


def test_demonstrations_beyond_the_models_positions_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"encoder\.demonstrations: .* the model has 64 positions"
    ):
        ViewTokenizer(tiny_tokenizer("llama"), asked(demonstrations_count=False), positions=64)
    ViewTokenizer(tiny_tokenizer("llama"), asked(demonstrations_count=False), positions=200)
