"""Anchors: the mean log-probability of continuations, against the loss that transformers gives."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from embedjob.config.recipe import Recipe
from embedjob.encoder.attention.packing import Packing
from embedjob.encoder.attention.shared_prefix import FEWEST_TOKENS
from embedjob.encoder.batching.forward import TreeForward
from embedjob.encoder.encoder import Encoder
from embedjob.models.tokenizer import load_tokenizer
from embedjob.output.fingerprint import fingerprint
from embedjob.text.tokenizing import ViewTokenizer
from tests.encoder import tiny
from tests.fakes import tiny_tokenizer

ANCHORS = [" it rains.", " nothing", " a fox jumps over the lazy dog.", '"', "日本"]
TEXTS = ["The quick brown fox", "a", "it's 日 fine, don't you think? ", "Why {x}?", ""]
PROMPT = 'This sentence: "{text}" implies:'
MODELS = ["llama", "qwen3", "mistral", "gpt2", "neox", "opt", "gemma2"]


def recipe(model: str | Path = "m", **knobs: Any) -> Recipe:
    heads = [{"anchors": ANCHORS}]
    given = {
        "heads": heads,
        "aggregation": "concat",
        "finish": [],
        "templates": [PROMPT],
        "max_tokens": 80,
        **knobs,
    }
    return Recipe.model_validate_json(
        json.dumps({"model": str(model), "dtype": "float32", **given})
    )


def losses(model: Any, views: ViewTokenizer, text: str) -> list[float]:
    """Minus the loss of the anchors' own tokens, one view at a time through the whole model."""
    found = []
    made = views.views([text])
    for view in range(made.views_per_text):
        ids = torch.from_numpy(made.full_ids(view).astype(np.int64))[None]
        start, stop = made.span[view].tolist()
        labels = torch.full_like(ids, -100)
        labels[:, start + 1 : stop] = ids[:, start + 1 : stop]
        with torch.inference_mode():
            found.append(-float(model(input_ids=ids, labels=labels).loss))
    return found


@pytest.mark.parametrize("join", ["joint", "separate"])
@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_those_of_the_models_own_loss(name: str, join: str, tmp_path: Path) -> None:
    segments = [{"literal": 'This sentence: "'}, {"text": {}}, {"literal": '" implies:'}]
    template = {"template": segments, "join": join}
    found = recipe(tiny.save(name, tmp_path / name), templates=[template])
    encoder = Encoder.from_recipe(found, device="cpu")
    views = load_tokenizer(found)
    got = encoder.encode(TEXTS)
    assert got.shape == (len(TEXTS), len(ANCHORS))
    expected = np.array([losses(tiny.model(name), views, text) for text in TEXTS])
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    # Alone, and view by view, they are the same.
    np.testing.assert_allclose(encoder.encode(TEXTS[2:3]), got[2:3], rtol=1e-5)


@pytest.fixture
def through(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts went through a model as trees, together."""
    found: list[int] = []
    plain = TreeForward.__call__
    monkeypatch.setattr(
        TreeForward,
        "__call__",
        lambda self, which: found.append(len(which)) or plain(self, which),
    )
    return found


def test_the_text_is_run_once_for_all_anchors(tmp_path: Path, through: list[int]) -> None:
    found = recipe(tiny.save("llama", tmp_path / "llama"))
    encoder = Encoder.from_recipe(found, device="cpu")
    long = "The quick brown fox jumps over a lazy dog. " * 3
    encoder.encode([long])
    assert sum(through) == 1


@pytest.mark.parametrize("template", ["{text}", PROMPT])
def test_the_token_before_all_anchors_is_run_and_scored_once(
    template: str, tmp_path: Path, through: list[int]
) -> None:
    anchors = [[7, 8, 9], [7], [5] * 9, [3, 3], [1]]
    folder = tiny.save("llama", tmp_path / "llama")
    found = recipe(folder, heads=[{"anchors": anchors}], templates=[template])
    encoder = Encoder.from_recipe(found, device="cpu")
    head = encoder.backbone.head
    assert head is not None
    scored: list[int] = []
    plain = head.logits
    head.logits = lambda states: scored.append(len(states)) or plain(states)  # type: ignore[method-assign,func-returns-value]
    views = load_tokenizer(found).views(TEXTS[:3])
    texts = views.lengths[1::5] - 1  # the second anchor has one token
    encoded = encoder.encode_views(views)
    assert sum(through) == 3
    prefixes = 3 * views.prefix_lengths[0] - len(views.prefixes[0])
    shared = prefixes if len(views.prefixes[0]) >= FEWEST_TOKENS else 0
    assert encoded.stats["forward_tokens"] == texts.sum() + 3 * 16 - shared
    assert sum(scored) == 3 * (1 + 16 - 5)
    for got, text in zip(encoded.embeddings, TEXTS[:3], strict=True):
        expected = losses(tiny.model("llama"), load_tokenizer(found), text)
        np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_few_states_go_through_the_head_together(tmp_path: Path) -> None:
    found = recipe(tiny.save("llama", tmp_path / "llama"))
    encoder = Encoder.from_recipe(found, device="cpu")
    expected = encoder.encode(TEXTS)
    head = encoder.backbone.head
    assert head is not None
    head.most_states = lambda device: 3  # type: ignore[method-assign]
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("words", "in_one_row", "together"), [(60, True, True), (1, True, True), (1, False, False)]
)
def test_many_anchors_stand_side_by_side_where_the_text_is_long_or_none_sees_the_others(
    words: int,
    in_one_row: bool,
    together: bool,
    tmp_path: Path,
    through: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not in_one_row:
        monkeypatch.setattr(Packing, "serves_trees", lambda *args, **keys: False)
    folder = tiny.save("llama", tmp_path / "llama")
    config = LlamaConfig(**{**tiny.GROUPED, "max_position_embeddings": 600})
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    heads = [{"anchors": [f" it is number {number}, so" for number in range(44)]}]
    found = recipe(folder, heads=heads, max_tokens=600)
    encoder = Encoder.from_recipe(found, device="cpu")
    text = "quick foxes " * words
    got = encoder.encode([text])
    assert (sum(through) == 1) is together
    views = load_tokenizer(found)
    # More than could always stand so.
    made = views.views([text])
    assert int((made.lengths - made.span[:, 0]).sum()) > 512
    np.testing.assert_allclose(got[0], losses(model, views, text), rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_span_is_the_anchor_and_what_it_follows(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    views = ViewTokenizer(tiny_tokenizer(family), recipe(templates=["{text}"])).views(TEXTS[:-1])
    for view in range(views.views_per_text * 2):
        start, stop = views.span[view].tolist()
        ids = views.full_ids(view).tolist()
        anchor = ANCHORS[view % len(ANCHORS)]
        text = TEXTS[view // len(ANCHORS)]
        whole = tokenizer.encode(text + anchor)
        assert ids == whole.ids
        own = [at for at, (_, end) in enumerate(whole.offsets) if end > len(text)]
        own = [at for at in own if not whole.special_tokens_mask[at]]
        assert list(range(start, stop)) == [own[0] - 1, *own]


def test_an_anchor_that_follows_nothing_is_a_bad_row(tmp_path: Path) -> None:
    found = recipe(tiny.save("gpt2", tmp_path / "gpt2"), templates=["{text}"])
    encoder = Encoder.from_recipe(found, device="cpu")
    views = ViewTokenizer(tiny_tokenizer("gpt2"), found).views(["", "a fox"])
    got = encoder.encode_views(views)
    assert got.failed == {0: ("empty_span", "no token of the view counts for pooling")}
    assert np.isfinite(got.embeddings[1]).all()


@pytest.mark.parametrize("anchors", [ANCHORS, [[7, 8, 9], [7], [5] * 9, [3, 3], [1]]])
@pytest.mark.parametrize("join", ["joint", "separate"])
def test_a_long_text_is_cut_alike_before_every_anchor(join: str, anchors: list[Any]) -> None:
    template = {"template": [{"text": {}}], "join": join}
    found = recipe(templates=[template], max_tokens=40, heads=[{"anchors": anchors}])
    views = ViewTokenizer(tiny_tokenizer("llama"), found).views(["fox jumps over " * 40])
    assert views.truncated.all()
    assert views.lengths.max() <= 40
    assert len(set(views.span[:, 0].tolist())) == 1
    start = int(views.span[0, 0])
    assert len({tuple(views.full_ids(view)[: start + 1].tolist()) for view in range(5)}) == 1


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"attention": "bidirectional"}, "got attention: bidirectional, allowed is causal"),
        ({"span": "last_token"}, "got span: last_token, allowed is all"),
        ({"pooling": "max"}, "got pooling: max, allowed is mean"),
        ({"aggregation": "mean"}, "got aggregation: mean, allowed is concat"),
        ({"layer": 1}, "reads the last layer"),
        ({"long_text": "chunk_mean"}, "one line per text"),
        (
            {"heads": [{"anchors": [" a"]}, {"normalize": True}]},
            "leave the other heads out",
        ),
        ({"heads": [{"anchors": []}]}, "at least 1 item"),
        ({"heads": [{"anchors": [""]}]}, "at least 1 character"),
        ({"special_tokens": {"eos": "append"}}, "set special_tokens.eos: none"),
        ({"decode": {}}, "decode"),
    ],
)
def test_what_does_not_go_with_anchors_is_refused(knobs: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        recipe(**knobs)


def test_anchors_travel_as_json_and_decide_the_vectors() -> None:
    one = recipe()
    assert Recipe.model_validate_json(one.model_dump_json()) == one
    other = recipe(heads=[{"anchors": [*ANCHORS[1:], ANCHORS[0]]}])
    assert one.views == other.views == len(ANCHORS)
    assert fingerprint(one, {}) != fingerprint(other, {})
