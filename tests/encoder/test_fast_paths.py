"""Every fast path against one view at a time through the plain model.

Covers: embedjob.encoder.attention.shared_prefix, embedjob.encoder.attention.tree,
embedjob.encoder.batching.forward
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaModel

from embedjob.config.pooling import POOLINGS
from embedjob.encoder.attention.packing import Packing
from embedjob.encoder.attention.shared_prefix import FEWEST_TOKENS, Prefixes
from embedjob.encoder.backbone import Backbone
from embedjob.encoder.encoder import Encoder
from embedjob.text.views import TokenViews
from tests.encoder import tiny
from tests.encoder.plain import WIDE, backbone, quick, recipe, reference, same
from tests.encoder.token_views import last_tokens, shared_views, text_first_views, views_of

_FAST = ("llama", "qwen3", "gpt2", "neox", "opt", *WIDE)
_PLAIN = ("mistral", "gemma2", "bert", "roberta", "mpnet", "t5")

PLAIN_POOLINGS = [name for name, kind in POOLINGS.items() if kind.single and not kind.weights]


TOKENS = st.integers(3, 590)


@st.composite
def _views(draw: st.DrawFn) -> TokenViews:
    per_text = draw(st.integers(1, 3))
    sizes = st.sampled_from([0, 1, FEWEST_TOKENS, 9, 14])
    prefixes = [draw(_ids(draw(sizes))) for _ in range(per_text)]
    if draw(st.booleans()):
        prefixes = [prefixes[0]] * per_text
    rows, spans = [], []
    for _ in range(draw(st.integers(1, 5))):
        text = draw(_ids(draw(st.sampled_from([0, 1, 8]))))
        for prefix in prefixes:
            row = [*prefix, *text, *draw(_ids(draw(st.integers(1, 6))))]
            first = len(prefix) + (len(text) if draw(st.booleans()) else 0)
            spans.append(draw(st.integers(min(first, len(row) - 1), len(row) - 1)))
            if draw(st.integers(0, 5)) == 0:
                row[draw(st.integers(0, len(row) - 1))] = draw(TOKENS)
            rows.append(row)
    return views_of(rows, prefixes, spans)


def _ids(length: int) -> st.SearchStrategy[list[int]]:
    return st.lists(TOKENS, min_size=length, max_size=length)


@pytest.mark.parametrize("of", [backbone, quick])
@pytest.mark.parametrize("name", [*_FAST, *_PLAIN])
@settings(deadline=None, max_examples=40)
@given(
    views=_views(),
    knobs=st.fixed_dictionaries(
        {
            "layer": st.sampled_from([-1, -2, 0, 1, 2, (1, -1), (-2, 0)]),
            "pooling": st.sampled_from(
                [name for name, kind in POOLINGS.items() if kind.single and not kind.weights]
            ),
            "span": st.sampled_from(["all", "last_token"]),
        }
    ),
    budget=st.sampled_from([1, 30, 1000]),
    side=st.sampled_from(["right", "none"]),
)
def test_every_vector_is_that_of_a_plain_forward(
    of: Callable[[str], Backbone], name: str, views: TokenViews, knobs: Any, budget: int, side: Any
) -> None:
    made = recipe(**knobs)
    views = last_tokens(views) if made.span == "last_token" else views
    encoder = Encoder(of(name), made, tokens_per_microbatch=budget, padding_side=side)
    encoded = encoder.encode_views(views)
    assert not encoded.failed
    got = encoded.embeddings.reshape(len(views.prefix), -1)
    assert same(got, reference(name, views, made))


@pytest.mark.parametrize("name", _FAST)
def test_a_prefix_is_run_once_per_encoder(name: str) -> None:
    encoder = Encoder(backbone(name), recipe())
    first, second = (encoder.encode_views(shared_views()).stats for _ in range(2))
    assert first["forward_tokens"] == 2 * 9 + 12 * 5
    assert first["prefix_tokens_saved"] == 12 * 9 - 2 * 9
    assert second["forward_tokens"] == 12 * 5
    assert second["prefix_tokens_saved"] == 12 * 9


@pytest.mark.parametrize("in_one_row", [True, False])
@pytest.mark.parametrize("prefix", [0, 2, 8])
@pytest.mark.parametrize("name", _FAST)
def test_a_text_is_run_once_for_all_its_tails(
    name: str, prefix: int, in_one_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_one_row:
        monkeypatch.setattr(Packing, "serves_trees", lambda *args, **keys: False)
    views = text_first_views(prefix=prefix)
    encoded = Encoder(backbone(name), recipe()).encode_views(views)
    apart = prefix >= FEWEST_TOKENS
    computed = 6 * (10 + 3 * 2) + (prefix if apart else 6 * prefix)
    assert encoded.stats["forward_tokens"] == computed
    assert encoded.stats["prefix_tokens_saved"] == views.lengths.sum() - computed
    assert encoded.stats["distinct_views"] == 18
    got = encoded.embeddings.reshape(len(views.prefix), -1)
    assert same(got, reference(name, views, recipe()))


def test_texts_that_are_there_twice_are_run_once_and_counted_twice() -> None:
    views = text_first_views().take([0, 1, 0, 0])
    told: list[tuple[int, int]] = []
    encoded = Encoder(backbone("llama"), recipe()).encode_views(
        views, on_progress=lambda texts, tokens: told.append((texts, tokens))
    )
    assert encoded.stats["forward_tokens"] == 2 * 16
    assert told[-1] == (4, views.lengths.sum())
    assert np.array_equal(encoded.embeddings[0], encoded.embeddings[3])


def test_a_text_with_a_tail_that_breaks_the_model_fails_alone() -> None:
    views = text_first_views()
    encoder = Encoder(Backbone(tiny.model("llama").base_model, attention="causal"), recipe())
    expected = encoder.encode_views(views).embeddings
    poison = int(views.own_ids(6)[3])

    def refuse(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if (kwargs["input_ids"] == poison).any():
            raise IndexError("poison")

    encoder.backbone.model.register_forward_pre_hook(refuse, with_kwargs=True)
    encoded = encoder.encode_views(views)
    assert list(encoded.failed) == [2]
    assert encoded.failed[2][0] == "model_error"
    left = [0, 1, 3, 4, 5]
    assert same(encoded.embeddings[left], expected[left])


@pytest.mark.parametrize("name", _PLAIN)
def test_a_model_that_cannot_share_says_so_once_and_runs_all(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = Encoder(backbone(name), recipe())
    views = shared_views()
    with caplog.at_level(logging.WARNING):
        stats = [encoder.encode_views(views).stats for _ in range(2)]
    assert [one["forward_tokens"] for one in stats] == [views.lengths.sum()] * 2
    assert len([record for record in caplog.records if "Prefixes" in record.message]) == 1


def test_views_longer_than_a_sliding_window_go_whole() -> None:
    views = shared_views(own=12)
    encoder = Encoder(backbone("mistral, window 20"), recipe())
    encoded = encoder.encode_views(views)
    assert encoded.stats["prefix_tokens_saved"] == 0
    got = encoded.embeddings.reshape(len(views.prefix), -1)
    assert same(got, reference("mistral, window 20", views, recipe()))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_length_are_not_shared(kind: str) -> None:
    half = [1.0] * 4
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    rope |= {"short_factor": half, "long_factor": half} if kind == "longrope" else {}
    model = LlamaModel(LlamaConfig(**tiny.GROUPED, rope_parameters=rope)).eval()
    assert not Prefixes(Backbone(model, attention="causal")).serves(9, 20)


def test_a_view_that_is_not_finite_with_others_is_rescued_whole() -> None:
    views = shared_views()
    encoder = Encoder(Backbone(tiny.model("llama").base_model, attention="causal"), recipe())
    expected = encoder.encode_views(views).embeddings
    poison = int(views.own_ids(7)[0])

    def raise_once(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"]
        if (ids == poison).any() and ids.shape[1] < 14:
            raise IndexError("poison")

    encoder.backbone.model.register_forward_pre_hook(raise_once, with_kwargs=True)
    encoded = encoder.encode_views(views)
    assert not encoded.failed
    assert same(encoded.embeddings, expected)


def test_thousands_of_shared_tokens_in_bfloat16_stay_near_float32() -> None:
    random = np.random.default_rng(5)
    prefix = random.integers(3, 590, 2000).tolist()
    rows = [[*prefix, *random.integers(3, 590, size).tolist()] for size in (3, 30, 30, 1)]
    views = views_of(rows, [prefix], [len(row) - 1 for row in rows])
    sizes = {**tiny.GROUPED, "max_position_embeddings": 4000}
    vectors = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        model = LlamaModel(LlamaConfig(**sizes)).eval().to(dtype)
        encoder = Encoder(Backbone(model, attention="causal"), recipe())
        encoded = encoder.encode_views(views)
        assert encoded.stats["prefix_tokens_saved"] == 3 * 2000
        vectors.append(encoded.embeddings)
        if dtype == torch.float32:
            ids = torch.tensor([rows[1]])
            with torch.inference_mode():
                expected = model(input_ids=ids).last_hidden_state[0, -1].numpy()
            assert same(vectors[0][1], expected)
    norms = np.linalg.norm(vectors[0], axis=1) * np.linalg.norm(vectors[1], axis=1)
    assert ((vectors[0] * vectors[1]).sum(axis=1) / norms).min() >= 0.995


@pytest.mark.parametrize("name", [*_FAST, *_PLAIN])
def test_layers_after_the_one_that_is_read_are_not_run(name: str) -> None:
    made = backbone(name)
    stacks = [m for m in made.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2]
    ids = torch.tensor([[5, 6, 7]])
    made.states(ids, torch.ones_like(ids).bool(), layer=1)
    runs: list[int] = []
    hooks = [
        block.register_forward_hook(lambda *_, number=number: runs.append(number))
        for number, block in enumerate(stacks[0])
    ]
    for layer, expected in ((0, []), (1, [0]), (-2, [0]), ((0, 1), [0]), (-1, [0, 1])):
        made.states(ids, torch.ones_like(ids).bool(), layer=layer)
        assert runs == expected, layer
        runs.clear()
    for hook in hooks:
        hook.remove()
