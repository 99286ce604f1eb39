"""Long texts in parts: nothing of the text lost or twice, nothing of the template touched."""

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.config.job_file import recipe_from
from embedjob.text import long_text
from embedjob.text.long_text import CutTexts
from embedjob.text.tokenizing import ViewTokenizer
from embedjob.text.views import TokenViews
from tests.fakes import EOS, FAMILIES, LITERALS, SENTENCES, tiny_tokenizer

EOL = 'This sentence : "{text}" means in one word:"'
ECHO = [{"text": {}}, {"literal": "; again: "}, {"text": {"pool": True}}, {"literal": "."}]
TEMPLATES: dict[str, list[Any]] = {
    "bare": ["{text}"],
    "suffix": [EOL],
    "two": ["Query: {text}", EOL],
    "echo": [{"template": ECHO}],
    "separate": [{"template": ECHO, "join": "separate"}],
}
WORDS = st.sampled_from(
    [*" ".join(SENTENCES[:7]).split(), "\n\n", "   ", "😀", "e\u0301", "x" * 120, '"?', "{x}"]
)
TEXTS = st.lists(WORDS, min_size=40, max_size=160).map(" ".join)


@cache
def made(family: str, template: str, long_text: str, max_tokens: int, **more: Any) -> ViewTokenizer:
    values = {
        "model": "m",
        "templates": TEMPLATES[template],
        "span": "text",
        "max_tokens": max_tokens,
        "long_text": long_text,
        "special_tokens": {"eos": "append"},
        **more,
    }
    tokenizer = tiny_tokenizer(family)
    eos = tokenizer.token_to_id(EOS[family])
    return ViewTokenizer(tokenizer, recipe_from(values, {}), eos_id=eos, positions=512)


def cut_of(views: ViewTokenizer, texts: list[str]) -> CutTexts:
    return views.cutter.cut(texts)


def rows(views: TokenViews, units: range) -> list[tuple[list[int], list[int]]]:
    width = views.views_per_text
    mine = range(units.start * width, units.stop * width)
    return [(views.full_ids(view).tolist(), views.span[view].tolist()) for view in mine]


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    template=st.sampled_from(sorted(TEMPLATES)),
    texts=st.lists(TEXTS, min_size=1, max_size=2),
    max_tokens=st.sampled_from([72, 110]),
)
def test_parts_are_texts_that_fit_and_together_are_the_text(
    family: str, template: str, texts: list[str], max_tokens: int
) -> None:
    """Each is the view that it would be alone, with all of its template, its suffix and EOS."""
    texts = [texts[0] + LITERALS[family] + " fox", *texts[1:], "short", ""]
    whole = made(family, template, "chunk_mean", max_tokens)
    cut = cut_of(whole, texts)
    truncating = made(family, template, "truncate", max_tokens)
    alone, over = truncating.views(cut.parts), truncating.views(texts).truncated
    assert not alone.truncated.any()
    assert (np.diff(cut.offsets) > 1).tolist() == over.reshape(len(texts), -1).any(axis=1).tolist()
    for text, first, stop in zip(texts, cut.offsets, cut.offsets[1:], strict=False):
        assert "".join(cut.parts[first:stop]) == text
    views = whole.views(texts)
    assert views.texts == len(texts)
    assert not views.truncated.any()
    assert views.cuts is not None
    assert views.units == len(cut.parts) == views.cuts.offsets[-1]
    assert rows(views, range(views.units)) == rows(alone, range(views.units))
    in_text = np.maximum(np.diff(views.span, axis=1)[:, 0], 1)
    assert views.cuts.tokens.tolist() == in_text.tolist()


@pytest.mark.parametrize("long_text", ["chunk_mean", "late_chunk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_that_fits_is_as_it_always_was(family: str, long_text: str) -> None:
    texts = ["", "a fox", " the river bank ", "déjà vu? 😀", f"a {LITERALS[family]} b"]
    plain = made(family, "suffix", "truncate", 110).views(texts)
    views = made(family, "suffix", long_text, 110).views(texts)
    assert rows(views, range(len(texts))) == rows(plain, range(len(texts)))
    assert views.truncated.tolist() == plain.truncated.tolist()
    assert [views.spans(text).tolist() for text in range(len(texts))] == [
        [span] for span in plain.span.tolist()
    ]


def test_parts_are_as_long_as_can_be() -> None:
    """Of byte-level tokens without a template every part but the last is full."""
    views = made("gpt2", "bare", "chunk_mean", 33)
    text = "the quick brown fox jumps over a lazy dog " * 20
    bare = tiny_tokenizer("gpt2").encode(text)
    edges = [0, *(bare.offsets[token - 1][1] for token in range(32, len(bare), 32)), len(text)]
    expected = [text[a:b] for a, b in pairwise(edges)]
    assert cut_of(views, [text]).parts == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_read_a_window_at_a_time(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words, and runs of blanks, that are longer than a window are found whole all the same."""
    monkeypatch.setattr(long_text, "_WINDOW", 300)
    words = ["fox", "x" * 90, " " * 700, "\n", "river bank", "日本語の文章", "y" * 500]
    text = " ".join(words * 6)
    whole = made(family, "suffix", "chunk_mean", 110)
    cut = cut_of(whole, [text, "fox"])
    assert "".join(cut.parts[:-1]) == text
    assert not made(family, "suffix", "truncate", 110).views(cut.parts).truncated.any()


def test_a_character_of_more_tokens_than_there_is_room_for_is_cut_off_and_said_so() -> None:
    views = made("gpt2", "bare", "chunk_mean", 3).views(["a😀b" * 3])
    assert views.truncated.tolist().count(True) == 3
    ids = [views.full_ids(view)[:-1].tolist() for view in range(views.units)]
    spelled = "".join(tiny_tokenizer("gpt2").decode(row) for row in ids)
    assert spelled.replace("\N{REPLACEMENT CHARACTER}", "") == "ababab"


def test_tokens_that_hold_bytes_of_two_characters_are_no_reason_not_to_cut() -> None:
    """To this tokenizer every character but the first ends within the next one's token."""
    text = "日" * 300
    whole = made("qwen", "suffix", "chunk_mean", 110)
    cut = cut_of(whole, [text])
    assert "".join(cut.parts) == text
    assert min(map(len, cut.parts[:-1])) > 25
    assert not whole.views([text]).truncated.any()
    late = made("qwen", "suffix", "late_chunk", 50)
    views = late.views([text[:200]])
    assert views.parts is not None
    assert len(views.parts.chars) == 9
    assert views.parts.chars[[0, -1], [0, 1]].tolist() == [0, 200]


def test_a_part_without_a_token_that_counts_is_left_out() -> None:
    """Blanks are tokens to this tokenizer, until the template strips the prompt."""
    views = made("gpt2", "bare", "chunk_mean", 16, prepare="eol")
    text = "the fox" + " \n" * 60 + "the river bank"
    cut = cut_of(views, [text])
    found = views.views([text, "", "fox"])
    assert found.cuts is not None
    assert found.units - 2 < len(cut.parts)
    assert np.diff(found.cuts.offsets).tolist()[1:] == [1, 1]
    assert (found.cuts.tokens > 0).all()
    kept = np.flatnonzero(found.span[:, 0] < found.span[:, 1])
    assert kept.tolist() == [view for view in range(found.units) if view != found.units - 2]


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    span=st.sampled_from(["all", "text", "from_text"]),
    text=TEXTS,
    max_tokens=st.sampled_from([24, 50]),
)
def test_parts_share_out_the_span_and_the_text(
    family: str, span: str, text: str, max_tokens: int
) -> None:
    views = made(family, "suffix", "late_chunk", max_tokens, span=span).views([text, "a", ""])
    assert views.parts is not None
    for one, read in enumerate([text, "a", ""]):
        spans = views.spans(one)
        mine = slice(*views.parts.offsets[one : one + 2])
        chars = views.parts.chars[mine]
        assert [spans[0, 0], spans[-1, 1]] == views.span[one].tolist()
        assert (spans[1:, 0] == spans[:-1, 1]).all()
        assert (chars[1:, 0] == chars[:-1, 1]).all()
        if views.truncated[one]:
            assert 512 - 6 <= views.lengths[one] <= 512
            assert chars[-1, 1] < len(read)
        else:
            assert chars[0, 0] == 0
            assert chars[-1, 1] == len(read)
        if len(chars) > 1:
            assert (spans[:, 0] < spans[:, 1]).all()
            assert (chars[:, 0] < chars[:, 1]).all()
    tokens = int(np.diff(made(family, "suffix", "late_chunk", 24).views([text]).span)[0, 0])
    wanted = -(-tokens // max_tokens)
    # A border that would fall among the tokens of one character moves on, or away.
    assert wanted - 1 <= len(views.spans(0)) <= wanted


def test_the_characters_of_a_part_are_those_of_its_tokens() -> None:
    tokenizer = tiny_tokenizer("gpt2")
    text = "  \n" + "the quick brown 日本 fox jumps over the lazy dog. 😀 " * 9
    for prepare in ("none", "strip"):
        views = made("gpt2", "suffix", "late_chunk", 20, prepare=prepare).views(["fox", text])
        assert views.parts is not None
        ids = views.full_ids(1)
        mine = slice(*views.parts.offsets[1:3])
        edges = zip(views.parts.span[mine], views.parts.chars[mine], strict=True)
        spelled = [(tokenizer.decode(ids[a:b].tolist()), text[c:d]) for (a, b), (c, d) in edges]
        assert len(spelled) > 8
        assert all(tokens == characters for tokens, characters in spelled[1:-1])
        assert spelled[0][0].strip('"') == spelled[0][1]
        assert "".join(part for _, part in spelled) == (text if prepare == "none" else text.strip())


def test_what_the_model_has_no_positions_for_is_cut_and_said_so() -> None:
    views = made("gpt2", "suffix", "late_chunk", 50).views(["the fox " * 2000, "the fox " * 100])
    assert views.truncated.tolist() == [True, False]
    assert views.lengths.tolist()[0] in range(507, 513)
    assert views.parts is not None
    assert views.parts.chars[views.parts.offsets[1] - 1, 1] < 8 * 2000
    assert views.parts.chars[-1, 1] == 8 * 100


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_take_brings_the_parts_along(data: st.DataObject) -> None:
    texts = ["fox", "the river bank " * 30, "", "a fox " * 25]
    chosen = data.draw(st.lists(st.integers(0, 3), max_size=5))
    for rule in ("chunk_mean", "late_chunk"):
        views = made("gpt2", "suffix", rule, 40)
        taken, direct = views.views(texts).take(chosen), views.views([texts[i] for i in chosen])
        assert taken.texts == len(chosen)
        assert rows(taken, range(taken.units)) == rows(direct, range(direct.units))
        assert taken.text_units.tolist() == direct.text_units.tolist()
        for name in ("cuts", "parts"):
            one, other = getattr(taken, name), getattr(direct, name)
            for key in () if one is None else vars(one):
                assert np.array_equal(getattr(one, key), getattr(other, key))
