"""Views end to end in one row, against the same views padded.

Covers: embedjob.encoder.attention.shared_prefix, embedjob.encoder.attention.tree
"""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2Model,
    Gemma3TextConfig,
    Gemma3TextModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    PreTrainedModel,
)

from embedjob.encoder.attention import shared_prefix
from embedjob.encoder.attention.packing import Packing
from embedjob.encoder.attention.shared_prefix import Prefixes
from embedjob.encoder.attention.varlen import (
    AttentionInputs,
    AttentionOptions,
    PackedTrees,
    attend_sequences,
)
from embedjob.encoder.backbone import Backbone
from embedjob.encoder.encoder import Encoder
from embedjob.text.views import TokenViews
from tests.encoder import tiny
from tests.encoder.plain import inner, recipe, same
from tests.encoder.token_views import shared_views, text_first_views, views_of

CAUSAL = ("llama", "qwen3", "mistral", "gemma2", "gpt2", "neox", "opt")
BOTH_WAYS = ("bert", "roberta", "distilbert", "modernbert")
PADDED = ("mpnet", "t5")


def backbone_of(model: PreTrainedModel, attention: Any = "causal") -> Backbone:
    return Backbone(model, attention=attention)


def fresh(name: str, attention: Any = "causal") -> Backbone:
    model = tiny.model(name)
    return backbone_of(model.base_model if name in tiny.DECODERS else model, attention)


def packing_of(backbone: Backbone) -> Packing:
    return Packing(Prefixes(backbone), wanted=True)


def wide() -> MistralModel:
    sizes = {**tiny.GROUPED, "max_position_embeddings": 1000}
    return MistralModel(MistralConfig(**sizes, sliding_window=300)).eval()


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        *((name, "causal") for name in CAUSAL),
        *((name, "bidirectional") for name in ("llama", "gpt2", *BOTH_WAYS)),
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_states_are_those_of_padded_views(name: str, attention: Any, side: str) -> None:
    backbone = fresh(name, attention)
    packing = packing_of(backbone)
    lengths = torch.tensor([[1], [30], [7], [8], [2]])
    place = torch.arange(31)
    mask = place < lengths if side == "right" else place >= 31 - lengths
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, 590, (5, 31)))
    assert packing.serves(30, shared=False)
    for layer in (-1, 1, (0, -1)):
        expected = backbone.states(ids, mask, layer=layer)
        states = packing.states(ids, mask, layer=layer)
        assert not states[~mask].any()
        assert same(states[mask].numpy(), expected[mask].numpy())


@pytest.mark.parametrize("name", CAUSAL)
def test_no_padding_is_run_and_a_prefix_once(name: str) -> None:
    views = shared_views()
    model = inner(name) if name not in ("mistral", "gemma2") else wide()
    right, none = (
        Encoder(backbone_of(model), recipe(), padding_side=side).encode_views(views)
        for side in ("right", "none")
    )
    assert same(none.embeddings, right.embeddings)
    assert none.stats["forward_tokens"] == 2 * 9 + 12 * 5
    assert none.stats["padded_tokens"] == none.stats["forward_tokens"]


@pytest.mark.parametrize("prefix", [0, 8])
@pytest.mark.parametrize("name", CAUSAL)
def test_prefix_trees_lie_in_a_row_too(name: str, prefix: int) -> None:
    views = text_first_views(prefix=prefix)
    model = inner(name) if name not in ("mistral", "gemma2") else wide()
    right, none = (
        Encoder(backbone_of(model), recipe(), padding_side=side).encode_views(views)
        for side in ("right", "none")
    )
    assert same(none.embeddings, right.embeddings)
    assert none.stats["forward_tokens"] == 6 * (10 + 3 * 2) + prefix
    assert none.stats["padded_tokens"] == none.stats["forward_tokens"]


def test_trees_that_a_row_would_change_are_padded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the small example is for: attention that forgets the shared tokens."""

    def mixed(states: AttentionInputs, trees: PackedTrees, options: AttentionOptions) -> Any:
        return attend_sequences(states, trees.parts, options)

    monkeypatch.setattr(shared_prefix, "attend_trees", mixed)
    packing = packing_of(fresh("llama"))
    with caplog.at_level(logging.WARNING):
        assert not packing.serves_trees(9, shared=False)
        assert not packing.serves_trees(9, shared=False)
    assert packing.serves(9, shared=False)
    told = [record.message for record in caplog.records if "trees are padded" in record.message]
    assert len(told) == 1


def test_padding_is_counted_where_there_is_some() -> None:
    random = np.random.default_rng(2).integers(3, 590, (4, 30))
    rows = [random[i, : 5 + i].tolist() for i in range(4)]
    uneven = views_of(rows, [[]], [len(row) - 1 for row in rows])
    padded = {
        side: Encoder(fresh("llama"), recipe(), padding_side=side)
        .encode_views(uneven)
        .stats["padded_tokens"]
        for side in ("left", "right", "none")
    }
    assert padded == {"left": 4 * 8, "right": 4 * 8, "none": 5 + 6 + 7 + 8}


@pytest.mark.parametrize("side", ["right", "none"])
@pytest.mark.parametrize("views", [shared_views(), text_first_views(prefix=8)])
def test_a_layer_that_was_never_read_is_read_right_at_once(views: TokenViews, side: Any) -> None:
    made = recipe(layer=1)
    fast = Encoder(fresh("llama"), made, padding_side=side).encode_views(views)
    plain = Encoder(fresh("llama"), made, padding_side="left").encode_views(views)
    assert not fast.failed
    assert fast.stats["prefix_tokens_saved"] > 0
    assert same(fast.embeddings, plain.embeddings)


@pytest.mark.parametrize("name", PADDED)
def test_a_model_that_needs_padding_says_so_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = Encoder(fresh(name, "bidirectional"), recipe(), padding_side="none")
    with caplog.at_level(logging.WARNING):
        encoder.encode_views(shared_views())
        encoder.encode_views(shared_views())
    assert len([record for record in caplog.records if "are padded" in record.message]) == 1


def test_a_model_whose_tokens_meet_elsewhere_is_padded() -> None:
    backbone = fresh("llama")

    def mix(module: torch.nn.Module, args: Any, output: Any) -> Any:
        return output + torch.nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]

    backbone.model.layers[0].mlp.register_forward_hook(mix)
    assert not packing_of(backbone).serves(9, shared=False)


@pytest.mark.parametrize("windows", [8, 40])
def test_a_model_that_looks_both_ways_by_itself_keeps_its_own_windows(windows: int) -> None:
    """EmbeddingGemma's kind: half of the window to either side, which no flag of ours may move."""
    torch.manual_seed(4)
    config = Gemma3TextConfig(
        **{**tiny.GROUPED, "num_hidden_layers": 3},
        sliding_window=windows,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        use_bidirectional_attention=True,
    )
    model = Gemma3TextModel(config).eval()
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, 590, (3, 45)))
    mask = torch.arange(45) < torch.tensor([[45], [9], [30]])
    with torch.inference_mode():
        expected = [
            model(input_ids=row[None, real]).last_hidden_state[0]
            for row, real in zip(ids, mask, strict=True)
        ]
    backbone = backbone_of(model, "bidirectional")
    packing = packing_of(backbone)
    assert set(backbone.windows) == {windows // 2 + 1}
    assert same(backbone.states(ids, mask, layer=-1)[mask].numpy(), torch.cat(expected).numpy())
    assert same(packing.states(ids, mask, layer=-1)[mask].numpy(), torch.cat(expected).numpy())
    # Where models do not agree on where a window that looks both ways ends, none is longer.
    assert packing.serves(windows // 2 + 1, shared=False)
    assert not packing.serves(windows // 2 + 2, shared=False)


def silent(window: int) -> Backbone:
    """A model with windows in its config that its attention is not told of."""
    sizes = {**tiny.GROUPED, "max_position_embeddings": 1000}
    model = Gemma2Model(Gemma2Config(**sizes, sliding_window=window)).eval()
    for layer in model.layers:
        layer.self_attn.sliding_window = None
    return backbone_of(model)


def test_a_window_that_is_handed_on_is_no_limit_and_one_that_is_not_is() -> None:
    assert packing_of(backbone_of(wide())).serves(301, shared=False)
    packing = packing_of(silent(300))
    assert packing.serves(300, shared=False)
    assert not packing.serves(301, shared=False)
    assert not packing_of(backbone_of(wide(), "bidirectional")).serves(301, shared=False)


def test_a_narrow_window_that_is_not_handed_on_is_seen() -> None:
    assert not packing_of(silent(20)).serves(9, shared=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_views_are_padded_unless_told(dtype: torch.dtype) -> None:
    model = LlamaModel(LlamaConfig(**tiny.GROUPED)).eval().to(dtype)
    prefixes = Prefixes(backbone_of(model))
    assert not Packing(prefixes).serves(9, shared=False)
    assert Packing(prefixes, wanted=True).serves(9, shared=True)
    assert not Packing(prefixes, wanted=False).serves(9, shared=False)
    # Trees cost a CPU more under a mask than in a row.
    assert Packing(prefixes).serves_trees(9, shared=True)
    assert not Packing(prefixes, wanted=False).serves_trees(9, shared=False)


def test_a_view_that_breaks_the_model_in_a_row_fails_alone() -> None:
    views = shared_views()
    encoder = Encoder(fresh("llama"), recipe(), padding_side="none")
    expected = encoder.encode_views(views).embeddings
    poison = int(views.own_ids(7)[0])

    def refuse(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if (kwargs["input_ids"] == poison).any():
            raise IndexError("poison")

    encoder.backbone.model.register_forward_pre_hook(refuse, with_kwargs=True)
    encoded = encoder.encode_views(views)
    assert list(encoded.failed) == [3]
    assert same(encoded.embeddings[[0, 1, 2, 4, 5]], expected[[0, 1, 2, 4, 5]])
