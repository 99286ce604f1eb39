from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.config.recipe import Recipe
from embedjob.config.segments import WeightedTemplate
from embedjob.errors import ConfigError
from embedjob.text.prompts import Prompt, prepare, prompts


def _one(template: str, **recipe: object) -> Prompt:
    return prompts(Recipe.model_validate({"model": "m", "templates": (template,), **recipe}))[0]


def test_text_and_instruction_go_into_their_slots() -> None:
    prompt = _one("{instruction}: {{{text}}} {{0}}", instruction="Find {text} <s>")
    assert prompt == Prompt("Find {text} <s>: {", "} {0}")
    assert prompt.render("x {text} {{") == "Find {text} <s>: {x {text} {{} {0}"


def test_views_keep_order_and_weight() -> None:
    recipe = Recipe(
        model="m", templates=("a{text}", WeightedTemplate(template="{text}b", weight=2))
    )
    assert prompts(recipe) == (Prompt("a", ""), Prompt("", "b", weight=2.0))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no slot", r"'no slot' has 0 \{text\} slots"),
        ("{text} {text}", r"has 2 \{text\} slots"),
        ("{title} {text}", r"unknown slot \{title\}"),
        ("{text!r}", r"unknown slot \{text!r\}"),
        ("{text:>9}", r"unknown slot \{text:>9\}"),
        ("{} {text}", r"unknown slot \{\}"),
        ("{text", "a literal brace is written"),
        ("text}", "a literal brace is written"),
        ("{instruction} {text}", "encoder.instruction is not set"),
    ],
)
def test_malformed_templates_are_refused(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _one(template)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A dog runs", "A dog runs."),
        ("A dog runs.", "A dog runs."),
        ("A dog runs?", "A dog runs."),
        ("A dog runs!", "A dog runs!."),
        ('He said "go"', "He said 'go'"),
        ('"Why?" he asked', "'Why?' he asked."),
        ("It ends in '", "It ends in '"),
        ("blank at end ", "blank at end ."),
        ("", ""),
    ],
)
def test_eol_cleaning_is_that_of_the_literature(text: str, cleaned: str) -> None:
    assert prepare("eol")(text) == cleaned
    assert prepare("none")(text) == text


_BLANKS = st.text(alphabet=" \t\nab", max_size=6)


@settings(deadline=None, max_examples=60)
@given(before=_BLANKS, text=_BLANKS, after=_BLANKS)
def test_the_text_lies_where_it_is_said_to_lie(before: str, text: str, after: str) -> None:
    for strip in (False, True):
        prompt = Prompt(before, after, strip=strip)
        whole = prompt.render(text)
        assert whole == ((before + text + after).strip() if strip else before + text + after)
        start = prompt.text_start(text)
        for position in range(max(start, 0), min(start + len(text), len(whole))):
            assert whole[position] == text[position - start]


@pytest.mark.parametrize("name", get_args(Recipe.model_fields["prepare"].annotation))
def test_eol_and_moee_strip_the_whole_prompt_and_nothing_else_does(name: str) -> None:
    stripped = name in ("eol", "moee")
    assert _one(" {text} ", prepare=name).render(" x. ") == ("x." if stripped else "  x.  ")


@pytest.mark.parametrize(
    ("text", "ended", "stripped"),
    [
        ("A dog runs", "A dog runs.", "A dog runs"),
        ("A dog runs!", "A dog runs!", "A dog runs!"),
        (" 'x' ", " 'x' .", "'x'"),
        ("", "", ""),
    ],
)
def test_other_cleanings(text: str, ended: str, stripped: str) -> None:
    assert prepare("fullstop")(text) == ended
    assert prepare("strip")(text) == stripped
