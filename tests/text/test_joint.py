from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.jobfile import recipe_from
from embedjob.text.tokenizing import ViewTokenizer
from tests.fakes import FAMILIES, tiny_tokenizer

TEXTS = st.text(alphabet="ab Tte.x?\n\"'é日😀\u0301{}", max_size=30)
ECHO: list[dict[str, Any]] = [
    {"literal": "Rewrite: "},
    {"text": {}},
    {"literal": "\nAgain: "},
    {"text": {"pool": True}},
    {"literal": "\nmeans", "tag": "end"},
]


def made(family: str, segments: list[dict[str, Any]], **knobs: Any) -> ViewTokenizer:
    recipe = recipe_from({"model": "m", "templates": [segments], **knobs}, {})
    return ViewTokenizer(tiny_tokenizer(family), recipe)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_segments_are_one_string_and_the_second_copy_is_pooled(
    family: str, texts: list[str]
) -> None:
    views = made(family, ECHO, span="pooled").views(texts)
    bare = tiny_tokenizer(family)
    for view, text in enumerate(texts):
        before = f"Rewrite: {text}\nAgain: "
        encoding = bare.encode(before + text + "\nmeans")
        assert views.full_ids(view).tolist() == encoding.ids
        start, stop = views.span[view].tolist()
        held = [offsets for offsets in encoding.offsets[start:stop] if offsets[0] < offsets[1]]
        for left, right in held:
            assert left < len(before + text)
            assert right > len(before)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None)
@given(text=TEXTS, max_tokens=st.integers(60, 90))
def test_both_copies_are_cut_alike_and_the_template_is_whole(
    family: str, text: str, max_tokens: int
) -> None:
    views = made(family, ECHO, span="pooled", max_tokens=max_tokens).views([text * 12])
    bare, found = tiny_tokenizer(family), views.full_ids(0).tolist()
    assert len(found) <= max_tokens
    whole = text * 12
    renderings = (
        bare.encode(f"Rewrite: {whole[:n]}\nAgain: {whole[:n]}\nmeans").ids
        for n in range(len(whole), -1, -1)
    )
    assert any(ids == found for ids in renderings)


def test_a_tag_names_the_tokens_of_its_segment() -> None:
    plain = [{**one, "text": {}} if "text" in one else one for one in ECHO]
    views = made("qwen", plain, span={"tag": "end"}).views(["the fox", "x" * 3000])
    bare = tiny_tokenizer("qwen")
    for view in range(2):
        start, stop = views.span[view].tolist()
        assert bare.decode(views.full_ids(view).tolist()[start:stop]) == "\nmeans"
    moved = made("qwen", plain, span={"tag": "end", "offset": 1}).views(["the fox"])
    assert moved.span[0].tolist() == [views.span[0, 0] + 1, views.span[0, 1]]


def test_text_is_the_last_copy_and_tail_what_follows_it() -> None:
    plain = [{**one, "text": {}} if "text" in one else one for one in ECHO]
    pooled = made("gpt2", ECHO, span="pooled").views(["the fox"]).span.tolist()
    assert made("gpt2", plain, span="text").views(["the fox"]).span.tolist() == pooled
    tail = made("gpt2", plain, span="tail").views(["the fox"]).span.tolist()
    assert tail[0][0] == pooled[0][1]


def test_eol_strips_the_whole_and_the_marks_move_with_it() -> None:
    segments = [{"literal": "  "}, {"text": {"pool": True}}, {"literal": " x  "}]
    views = made("gpt2", segments, span="pooled", prepare="eol").views(["fox."])
    bare = tiny_tokenizer("gpt2")
    start, stop = views.span[0].tolist()
    assert views.full_ids(0).tolist() == bare.encode("fox. x").ids
    assert bare.decode(views.full_ids(0).tolist()[start:stop]) == "fox."


@pytest.mark.parametrize("family", FAMILIES)
def test_from_text_goes_on_to_the_very_end(family: str) -> None:
    recipe = {"model": "m", "templates": ["Query: {text}"], "span": "from_text"}
    views = ViewTokenizer(tiny_tokenizer(family), recipe_from(recipe, {})).views(["river", ""])
    text = ViewTokenizer(tiny_tokenizer(family), recipe_from({**recipe, "span": "text"}, {}))
    assert views.span[:, 0].tolist() == text.views(["river", ""]).span[:, 0].tolist()
    assert views.span[:, 1].tolist() == views.lengths.tolist()
