"""Templates whose pieces are tokenized as one text.

Covers: embedjob.text.tokenizing
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.config.job_file import recipe_from
from embedjob.errors import ConfigError
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


CHAT: list[dict[str, Any]] = [
    {"literal": "[INST] "},
    {"text": {"pool": True}},
    {"literal": " [/INST]", "pool": True},
]
ALONE = {"rule": "pooled", "alone": True}


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(texts=st.lists(TEXTS | st.just("\n\n\n\na"), min_size=1, max_size=3))
def test_pooled_segments_may_be_counted_alone(family: str, texts: list[str]) -> None:
    """As LLM2Vec does: so many last tokens as the text and its suffix have by themselves."""
    views = made(family, CHAT, span=ALONE, special_tokens={"bos": "none"}).views(texts)
    bare = tiny_tokenizer(family)
    for view, text in enumerate(texts):
        whole = bare.encode(f"[INST] {text} [/INST]", add_special_tokens=False).ids
        count = len(bare.encode(f"{text} [/INST]", add_special_tokens=False).ids)
        assert views.full_ids(view).tolist() == whole
        assert views.span[view].tolist() == [max(len(whole) - count, 0), len(whole)]


def test_a_blank_of_the_seam_counts_where_a_tokenizer_gives_it_to_a_text_alone() -> None:
    text = "日本"
    start = {
        (family, str(span)): int(made(family, CHAT, span=span).views([text]).span[0, 0])
        for family in ("llama", "llama3")
        for span in (ALONE, "pooled")
    }
    assert start["llama", str(ALONE)] == start["llama", "pooled"] - 1
    assert start["llama3", str(ALONE)] == start["llama3", "pooled"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_that_was_cut_is_counted_as_it_was_cut(family: str) -> None:
    views = made(family, CHAT, span=ALONE, max_tokens=20).views(["a", "the lazy dog " * 40])
    assert views.truncated.tolist() == [False, True]
    ids = [views.full_ids(view).tolist() for view in range(2)]
    assert views.lengths[1] <= 20
    assert ids[0][-3:] == ids[1][-3:]
    assert views.span[1, 1] - views.span[1, 0] > views.span[0, 1] - views.span[0, 0]
    assert views.span[1, 0] <= views.span[0, 0] + 1
    # With nothing after it a text is cut by its ids, and so has no characters to count.
    bare = made(family, CHAT[:2], span=ALONE, max_tokens=20).views(["the lazy dog " * 40])
    offsets = made(family, CHAT[:2], span="pooled", max_tokens=20).views(["the lazy dog " * 40])
    assert bare.span.tolist() == offsets.span.tolist()


@pytest.mark.parametrize(
    ("segments", "knobs"),
    [
        ([*CHAT[:2], {"literal": " [/INST]"}], {"span": ALONE}),
        ([{"literal": "x", "pool": True}, {"text": {}}], {"span": ALONE}),
        ([{"text": {}}, {"literal": "x", "pool": True}], {"span": ALONE}),
        (CHAT, {"span": {"rule": "from_text", "alone": True}}),
    ],
)
def test_counting_alone_needs_the_last_segments(
    segments: list[dict[str, Any]], knobs: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="alone counts the last segments of a joint template"):
        made("llama", segments, **knobs)


def test_counting_alone_needs_a_joint_template() -> None:
    template = {"template": CHAT, "join": "separate"}
    with pytest.raises(ConfigError, match="alone counts the last segments of a joint template"):
        made("llama", template, span=ALONE)  # type: ignore[arg-type]
