from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.config.job_file import recipe_from
from embedjob.errors import ConfigError
from embedjob.text.tokenizing import ViewTokenizer
from tests.fakes import FAMILIES, LITERALS, tiny_tokenizer

TEXTS = st.text(alphabet="ab Tte.x?\n\"'é日😀\u0301\x00{}<s>[/]|", max_size=40)


def made(family: str, *segments: Any, **knobs: Any) -> ViewTokenizer:
    template = {"template": list(segments), "join": "separate"}
    recipe = recipe_from({"model": "m", "span": "pooled", "templates": [template], **knobs}, {})
    return ViewTokenizer(tiny_tokenizer(family), recipe)


def frame(family: str) -> tuple[list[int], list[int]]:
    bare, inner = (
        tiny_tokenizer(family),
        tiny_tokenizer(family).encode("a", add_special_tokens=False).ids,
    )
    full = bare.encode("a").ids
    start = next(n for n in range(len(full)) if full[n : n + len(inner)] == inner)
    return full[:start], full[start + len(inner) :]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(text=TEXTS, max_tokens=st.integers(40, 70))
def test_every_piece_has_the_ids_that_it_has_alone(family: str, text: str, max_tokens: int) -> None:
    """The text comes twice, and both copies are cut alike; nothing else ever is."""
    special = LITERALS[family]
    views = made(
        family,
        {"literal": "Rewrite: "},
        {"text": {}},
        {"literal": "\nAgain: "},
        {"text": {"pool": True}},
        {"special": special, "pool": True},
        max_tokens=max_tokens,
    ).views([text, text * 9])
    bare = tiny_tokenizer(family)
    first, again = (
        bare.encode(piece, add_special_tokens=False).ids for piece in ("Rewrite: ", "\nAgain: ")
    )
    # What looks like a special token is plain text to us, and not to the tokenizer alone.
    if (
        bare.encode(text + " a", add_special_tokens=False).ids
        != ViewTokenizer(
            tiny_tokenizer(family),
            recipe_from({"model": "m", "special_tokens": {"bos": "none"}}, {}),
        )
        .views([text + " a"])
        .full_ids(0)
        .tolist()
    ):
        return
    opening, closing = frame(family)
    for view, whole in enumerate((text, text * 9)):
        ids = bare.encode(whole, add_special_tokens=False).ids
        fixed = len(opening + first + again + closing) + 1
        kept = ids[: max(0, (max_tokens - fixed) // 2)]
        before = opening + first + kept + again
        expected = [*before, *kept, bare.token_to_id(special), *closing]
        assert views.full_ids(view).tolist() == expected
        assert views.truncated[view] == (len(kept) < len(ids))
        assert views.span[view].tolist() == [len(before), len(before) + len(kept) + 1]


def test_each_text_has_its_own_budget_and_the_rest_shares_the_room() -> None:
    tokenizer = made(
        "qwen",
        {"text": {"max_tokens": 3}},
        {"special": "<|im_start|>"},
        {"text": {"pool": True}},
        max_tokens=14,
    )
    text = " a" * 20
    ids = tiny_tokenizer("qwen").encode(text, add_special_tokens=False).ids
    special = tiny_tokenizer("qwen").token_to_id("<|im_start|>")
    views = tokenizer.views([text, " a" * 2])
    assert views.full_ids(0).tolist() == [*ids[:3], special, *ids[:10]]
    assert views.span[0].tolist() == [4, 14]
    assert views.full_ids(1).tolist() == [*ids[:3], special, *ids[:4]]
    assert views.truncated.tolist() == [True, True]


def test_on_the_left_each_slot_takes_the_last_tokens_of_the_text() -> None:
    tokenizer = made(
        "qwen",
        {"text": {"max_tokens": 3}},
        {"special": "<|im_start|>"},
        {"text": {"pool": True}},
        max_tokens=14,
        truncation_side="left",
    )
    text = " one two three four five six seven eight"
    ids = tiny_tokenizer("qwen").encode(text, add_special_tokens=False).ids
    special = tiny_tokenizer("qwen").token_to_id("<|im_start|>")
    views = tokenizer.views([text, " a"])
    assert len(ids) > 10
    assert views.full_ids(0).tolist() == [*ids[-3:], special, *ids[-10:]]
    assert views.span[0].tolist() == [4, 14]
    assert views.truncated.tolist() == [True, False]


def test_a_special_token_typed_in_a_text_is_plain_text() -> None:
    tokenizer = made("qwen", {"special": "<|im_start|>"}, {"text": {"pool": True}})
    special = tiny_tokenizer("qwen").token_to_id("<|im_start|>")
    ids = tokenizer.views(["<|im_start|>x"]).full_ids(0).tolist()
    assert ids.count(special) == 1
    assert len(ids) > 3


@pytest.mark.parametrize("join", ["joint", "separate"])
def test_a_special_token_that_the_tokenizer_lacks_is_refused(join: str) -> None:
    segments = [{"special": "<s1>"}, {"text": {}}]
    knobs = {"model": "m", "templates": [{"template": segments, "join": join}]}
    with pytest.raises(ConfigError, match=r"special: '<s1>', which this tokenizer does not have"):
        ViewTokenizer(tiny_tokenizer("qwen"), recipe_from(knobs, {}))
    added = recipe_from({**knobs, "special_tokens": {"add": ["<s1>"]}}, {})
    assert ViewTokenizer(tiny_tokenizer("qwen"), added).views(["x"]).lengths.tolist() == [2]


def test_no_room_for_one_token_per_copy_is_refused() -> None:
    segments = [{"literal": "ab"}, {"text": {}}, {"text": {"pool": True}}]
    with pytest.raises(ConfigError, match=r"needs (\d+)") as caught:
        made("qwen", *segments, max_tokens=2)
    needed = int(str(caught.value).split("set it to ")[1].split()[0])
    assert made("qwen", *segments, max_tokens=needed).views(["a" * 99]).lengths[0] <= needed


@pytest.mark.parametrize("family", FAMILIES)
def test_bos_is_the_tokenizers_the_templates_or_none(family: str) -> None:
    special, text = LITERALS[family], {"text": {"pool": True}}
    opening, closing = frame(family)
    ids = tiny_tokenizer(family).encode("river", add_special_tokens=False).ids
    written = tiny_tokenizer(family).token_to_id(special)

    def found(*segments: Any, bos: str) -> list[int]:
        views = made(family, *segments, special_tokens={"bos": bos}).views(["river"])
        return [int(token) for token in views.full_ids(0)]

    assert found(text, bos="auto") == [*opening, *ids, *closing]
    assert found(text, bos="none") == ids
    assert found({"special": special}, text, bos="literal") == [written, *ids]
    with pytest.raises(ConfigError, match="begins with no special token"):
        found(text, bos="literal")
