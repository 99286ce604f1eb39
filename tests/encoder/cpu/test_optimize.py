"""Layers in fewer passes, against the model's own."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
    RoFormerConfig,
    RoFormerModel,
)

from embedjob.config.recipe import Recipe
from embedjob.encoder.backbone import Backbone
from embedjob.encoder.batching.flops import flops_per_token
from embedjob.encoder.cpu import optimize
from embedjob.encoder.cpu.blocks import PostNorm, PreNorm, Rotary
from embedjob.encoder.cpu.layers import Activated, Gated, Residual, RootMeanSquare
from embedjob.encoder.cpu.optimize import fuse
from embedjob.encoder.encoder import Encoder
from tests.encoder import tiny
from tests.encoder.plain import recipe, same
from tests.encoder.token_views import shared_views, text_first_views, views_of

KINDS = {Activated, Gated, PostNorm, PreNorm, Residual, RootMeanSquare, Rotary}
EXPECTED = {
    "llama": {Gated, PreNorm, RootMeanSquare, Rotary},
    "qwen3": {Gated, PreNorm, RootMeanSquare},
    "mistral": {Gated, PreNorm, RootMeanSquare, Rotary},
    "bert": {PostNorm},
    "roberta": {PostNorm},
    "mpnet": {Activated, Residual},
    "t5": {RootMeanSquare},
    # Layers that read otherwise, or go by other names.
    "opt": set(),
    "distilbert": set(),
    "gemma2": set(),
    "neox": set(),
    "gpt2": set(),
    "modernbert": set(),
}


@pytest.fixture(autouse=True)
def avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimize, "has_avx512", lambda: True)


def backbone_of(model: PreTrainedModel, name: str) -> Backbone:
    model = copy.deepcopy(model.base_model if name in tiny.DECODERS else model)
    return Backbone(model, attention="bidirectional" if name in tiny.ENCODERS else "causal")


def fusing(name: str) -> tuple[Backbone, Backbone]:
    """A model as it is, and with its layers fused."""
    model = copy.deepcopy(tiny.model(name))
    # As transformers draws them they are zero.
    drawn = torch.Generator().manual_seed(5)
    for weight, parameter in model.named_parameters():
        if weight.endswith("bias"):
            parameter.data.normal_(std=0.5, generator=drawn)
    plain, other = (backbone_of(model, name) for _ in range(2))
    assert other.blocks is not None
    fuse(other.blocks)
    return plain, other


@pytest.mark.parametrize("side", ["right", "left", "none"])
@pytest.mark.parametrize("name", EXPECTED)
def test_states_are_those_of_the_models_own_layers(name: str, side: str) -> None:
    plain, other = fusing(name)
    kinds = {type(module) for module in other.model.modules()}
    assert kinds & KINDS == EXPECTED[name]
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, 590, (4, 31)))
    lengths = torch.tensor([[31]] * 4 if side == "none" else [[31], [1], [7], [30]])
    mask = torch.arange(31) < lengths
    mask = mask.flip(1) if side == "left" else mask
    for layer in (-1, 1, (0, -1)):
        expected, got = (one.states(ids, mask, layer=layer)[mask] for one in (plain, other))
        assert same(got.numpy(), expected.numpy())


def test_every_shape_of_model_is_here() -> None:
    assert EXPECTED.keys() == {*tiny.DECODERS, *tiny.ENCODERS}


@pytest.mark.parametrize("side", ["right", "none"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
def test_prefixes_and_tails_go_through_fused_layers(name: str, side: str) -> None:
    plain, other = fusing(name)
    for views in (shared_views(), text_first_views(prefix=8)):
        expected = Encoder(plain, recipe(), padding_side="left").encode_views(views)
        got = Encoder(other, recipe(), padding_side=side).encode_views(views)
        assert got.stats["prefix_tokens_saved"] > 0
        assert same(got.embeddings, expected.embeddings)


@pytest.mark.parametrize("name", ["bert", "opt", "llama"])
def test_a_view_that_breaks_takes_no_other_with_it(name: str) -> None:
    plain, other = fusing(name)
    for backbone in (plain, other):
        # One token whose states are not numbers, as of a text that overflows.
        backbone.model.get_input_embeddings().weight.data[77] = torch.nan
    asked = recipe(attention="causal" if name in tiny.DECODERS else "bidirectional")
    rows = [[5, 6, 7, 8], [9, 77, 11, 12], [13, 14, 15, 16]]
    views = views_of(rows, [[]], [0] * len(rows))
    expected, got = (Encoder(one, asked).encode_views(views) for one in (plain, other))
    assert set(got.failed) == set(expected.failed) == {1}
    assert same(got.embeddings[[0, 2]], expected.embeddings[[0, 2]])


def test_a_model_that_is_loaded_on_a_cpu_is_fused_and_counted_as_before(tmp_path: Path) -> None:
    folder = tiny.save("bert", tmp_path)
    asked = Recipe(model=str(folder), attention="bidirectional", max_tokens=64, dtype="float32")
    encoder = Encoder.from_recipe(asked, device="cpu")
    kinds = {type(module) for module in encoder.backbone.model.modules()}
    assert PostNorm in kinds
    plain = backbone_of(tiny.model("bert"), "bert")
    assert flops_per_token(encoder.backbone, asked) == flops_per_token(plain, asked)
    with encoder.backbone.float32():
        again = encoder.encode(["the quick brown fox"])
    assert np.array_equal(again, encoder.encode(["the quick brown fox"]))
    narrow = Encoder.from_recipe(asked.model_copy(update={"dtype": "bfloat16"}), device="cpu")
    assert not {type(m) for m in narrow.backbone.model.modules()} & KINDS


def test_a_layer_that_does_something_else_by_the_same_names_is_kept() -> None:
    model = LlamaModel(LlamaConfig(**tiny.GROUPED)).eval()
    norm = model.layers[0].input_layernorm

    class Shifted(type(norm)):  # type: ignore[misc]
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return super().forward(states) + 1

    norm.__class__ = Shifted
    fuse(model.layers)
    assert isinstance(model.layers[0].input_layernorm, Shifted)
    assert isinstance(model.layers[1].input_layernorm, RootMeanSquare)


def test_weights_change_their_place_in_memory_and_nothing_else() -> None:
    plain, other = fusing("opt")
    assert other.stack is not None
    linears = [m for m in other.stack.modules() if isinstance(m, nn.Linear)]
    assert linears
    assert all(linear.weight.t().is_contiguous() for linear in linears)
    expected = dict(plain.model.named_parameters())
    for name, weight in other.model.named_parameters():
        assert torch.equal(weight, expected[name])


def test_without_avx512_weights_stay_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimize, "has_avx512", lambda: False)
    _, other = fusing("bert")
    assert all(weight.is_contiguous() for weight in other.model.parameters())


def test_layers_whose_parts_are_of_another_make_are_kept() -> None:
    model = copy.deepcopy(tiny.model("bert"))
    first, second = model.encoder.layer[:2]
    for layer in (first.intermediate, first.output, first.attention.output):
        layer.dense = nn.Sequential(layer.dense)
    kinds = [type(part) for part in (first, first.intermediate, first.output)]
    fuse(model.encoder.layer)
    first, second = model.encoder.layer[:2]
    assert [type(part) for part in (first, first.intermediate, first.output)] == kinds
    assert type(second) is PostNorm


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        # It may be given what was kept of other tokens.
        (BertConfig(**tiny.SIZE, is_decoder=True), BertModel),
        # Its attention turns states by their positions.
        (RoFormerConfig(**tiny.SIZE), RoFormerModel),
    ],
)
def test_a_block_of_which_more_is_asked_than_of_berts_is_kept(
    config: PreTrainedConfig, kind: type[PreTrainedModel]
) -> None:
    model = kind(config).eval()
    blocks = model.encoder.layer
    before = [type(block) for block in blocks]
    fuse(blocks)
    assert [type(block) for block in blocks] == before
    assert {Activated, Residual} <= {type(module) for module in model.modules()}
