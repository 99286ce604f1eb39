import random
import time
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.config.job_file import recipe_from
from embedjob.config.recipe import Recipe
from embedjob.text import truncation
from embedjob.text.tokenizing import ViewTokenizer
from tests.fakes import FAMILIES, LITERALS, SENTENCES, tiny_tokenizer

EOL = 'This sentence : "{text}" means in one word:"'


def _tokenizer(family: str, template: str, max_tokens: int, span: str = "text") -> ViewTokenizer:
    recipe = Recipe.model_validate(
        {"model": "m", "templates": (template,), "max_tokens": max_tokens, "span": span}
    )
    return _made(family, recipe)


@cache
def _made(family: str, recipe: Recipe) -> ViewTokenizer:
    return ViewTokenizer(tiny_tokenizer(family), recipe)


def _words(family: str, seed: int) -> list[str]:
    generator = random.Random(seed)
    words = " ".join(SENTENCES).split(" ")
    words += [LITERALS[family], "😀😀", "    ", "\n\n", "x" * 150, "日本語" * 30]
    return generator.choices(words, k=1000)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", ["Query: {text}", EOL])
@settings(max_examples=1, deadline=None)
@given(seed=st.integers(0, 10**6), max_tokens=st.sampled_from([48, 300]))
def test_reading_only_the_beginning_of_100_kb_changes_nothing(
    family: str, template: str, seed: int, max_tokens: int
) -> None:
    text = (" ".join(_words(family, seed)) + " ") * 12
    made = _tokenizer(family, template, max_tokens)
    cut = made.views([text, text[:3000], "short"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truncation, "_CHARS_PER_TOKEN", 10**9)
        patch.setattr(truncation, "_MOST_CHARS_PER_TOKEN", 10**9)
        whole = made.views([text, text[:3000], "short"])
    assert len(text) > 60_000
    assert cut.ids.tolist() == whole.ids.tolist()
    assert cut.span.tolist() == whole.span.tolist()
    assert cut.truncated.tolist() == whole.truncated.tolist() == [True, True, False]


def test_a_long_word_is_never_read_in_part() -> None:
    # To WordPiece 150 letters are one unknown word, and the first 50 of them are not.
    made = _tokenizer("bert", "{text}", 40)
    texts = ["river " * words + "x" * 150 + " bank" * 400 for words in range(20, 200)]
    cut = made.views(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truncation, "_CHARS_PER_TOKEN", 10**9)
        patch.setattr(truncation, "_MOST_CHARS_PER_TOKEN", 10**9)
        whole = made.views(texts)
    assert cut.ids.tolist() == whole.ids.tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", ["{text}", EOL])
def test_reading_goes_on_over_blanks_until_there_are_tokens_enough(
    family: str, template: str
) -> None:
    made = _tokenizer(family, template, 40, span="last_token")
    text = "the fox" + " " * 5000 + "jumps " * 100
    cut = made.views([text])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truncation, "_CHARS_PER_TOKEN", 10**9)
        whole = made.views([text])
    assert cut.ids.tolist() == whole.ids.tolist()
    assert cut.truncated.tolist() == whole.truncated.tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("filling", ["the quick brown fox ", " ", "x", "日", "<", "\x00"])
def test_ten_megabytes_cost_no_more_than_a_page(family: str, filling: str) -> None:
    made = _tokenizer(family, EOL, 64, span="last_token")
    text = filling * (10_000_000 // len(filling.encode()))
    made.views([text[:1000]])
    started = time.perf_counter()
    views = made.views([text])
    assert time.perf_counter() - started < 1.0
    assert views.truncated.tolist() == [True]
    assert views.lengths[0] <= 64


@pytest.mark.parametrize("family", FAMILIES)
def test_long_and_short_rows_of_one_batch_do_not_touch_each_other(family: str) -> None:
    texts = ["", "short", "fox " * 200, f"a{LITERALS[family]}b" * 90, "x", "\n" * 3000, "é" * 500]
    made = _tokenizer(family, EOL, 48)
    together = made.views(texts)
    for index, text in enumerate(texts):
        alone = made.views([text])
        assert together.full_ids(index).tolist() == alone.full_ids(0).tolist()
        assert together.span[index].tolist() == alone.span[0].tolist()
        assert together.truncated[index] == alone.truncated[0]
    assert made.views(texts).ids.tolist() == together.ids.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_special_token_typed_beyond_the_first_reading_is_plain_text_too(family: str) -> None:
    made = _tokenizer(family, "{text}", 400, span="all")
    text = "a " * 150 + " " * 5000 + LITERALS[family] + " b"
    made_from_twin = made.views([text]).ids.tolist()
    specials = tiny_tokenizer(family).get_added_tokens_decoder()
    frame = tiny_tokenizer(family).encode("a").ids
    expected = sum(token in specials for token in frame)
    assert sum(token in specials for token in made_from_twin) == expected


def test_ten_megabytes_piece_by_piece_cost_no_more_than_a_page() -> None:
    template = {"template": [{"text": {}}, {"literal": "x"}, {"text": {}}], "join": "separate"}
    recipe = recipe_from({"model": "m", "templates": [template], "max_tokens": 64}, {})
    made = ViewTokenizer(tiny_tokenizer("qwen"), recipe)
    made.views(["fox"])
    started = time.perf_counter()
    views = made.views(["the quick brown fox " * 500_000])
    assert time.perf_counter() - started < 1.0
    assert (views.truncated.tolist(), views.lengths.tolist()) == ([True], [63])
