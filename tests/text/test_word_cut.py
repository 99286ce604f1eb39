"""Whole words dropped of long texts.

Covers: embedjob.text.truncation
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from embedjob.config.recipe import Recipe
from embedjob.text.tokenizing import ViewTokenizer
from embedjob.text.truncation import WordCutter
from tests.fakes import tiny_tokenizer

MOST, ROOM = 12, 40


def authors(text: str) -> str:
    """The loop as LLM2Vec has it, whatever it leaves."""
    tokenizer = tiny_tokenizer("llama")

    def count(given: str) -> int:
        return min(ROOM, len(tokenizer.encode(given, add_special_tokens=False).ids))

    length = count(text)
    while length > MOST:
        text = " ".join(text.split()[: int(len(text.split()) * (MOST / length))])
        length = count(text)
    return text


@given(st.text(alphabet="ab é日.\n\t ", max_size=150))
@settings(max_examples=150, deadline=None)
def test_the_words_that_are_left_are_those_of_the_authors_loop(text: str) -> None:
    (found,), (cut,) = WordCutter(tiny_tokenizer("llama"), MOST, max_tokens=ROOM)([text])
    expected = authors(text)
    assert cut == (expected != text)
    if expected or not cut:
        assert found == expected
    else:
        # They have nothing left; ours has a beginning of the text, which its view is cut from.
        assert found
        assert text.split()[: len(found.split())] == found.split() or found == text


def test_a_text_without_blanks_keeps_what_the_view_has_room_for() -> None:
    recipe = Recipe(model="m", word_cut=MOST, max_tokens=ROOM)
    views = ViewTokenizer(tiny_tokenizer("llama"), recipe).views(["日" * 300, "short"])
    assert views.lengths[0] == ROOM
    assert views.truncated.tolist() == [True, False]


def test_a_huge_text_costs_no_more_than_a_long_one() -> None:
    cutter = WordCutter(tiny_tokenizer("llama"), MOST, max_tokens=ROOM)
    huge = "fox jumps " * 100_000
    (found,), (cut,) = cutter([huge])
    assert cut
    assert found == cutter([huge[: 512 * ROOM]])[0][0]


@pytest.mark.parametrize("long_text", ["chunk_mean", "late_chunk"])
def test_parts_of_a_text_are_not_dropped(long_text: str) -> None:
    with pytest.raises(ValidationError, match="word_cut drops what long_text"):
        Recipe.model_validate({"model": "m", "word_cut": 9, "long_text": long_text})
