"""Fused layers give what the model's own layers give, and are used only where they do.

Covers: embedjob.encoder.cpu.layers
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    RoFormerConfig,
    RoFormerModel,
)

from embedjob.config.recipe import Recipe
from embedjob.encoder.attention.direction import Attention
from embedjob.encoder.backbone import Backbone, optimize_for_cpu
from embedjob.encoder.batching.flops import flops_per_token
from embedjob.encoder.cpu import optimize
from embedjob.encoder.cpu.optimize import replace_layers
from embedjob.encoder.encoder import Encoder
from tests.encoder import tiny
from tests.encoder.plain import recipe, same
from tests.encoder.token_views import shared_views, text_first_views, views_of

NAMES = (*tiny.DECODERS, *tiny.ENCODERS)


@pytest.fixture(autouse=True)
def avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimize, "has_avx512", lambda: True)


def backbone_of(model: PreTrainedModel, name: str) -> Backbone:
    model = copy.deepcopy(model.base_model if name in tiny.DECODERS else model)
    return Backbone(model, attention="bidirectional" if name in tiny.ENCODERS else "causal")


def fused_pair(name: str) -> tuple[Backbone, Backbone]:
    """Return a model as it is, and with fused layers."""
    model = copy.deepcopy(tiny.model(name))
    # As transformers draws them they are zero.
    drawn = torch.Generator().manual_seed(5)
    for weight, parameter in model.named_parameters():
        if weight.endswith("bias"):
            parameter.data.normal_(std=0.5, generator=drawn)
    plain, other = (backbone_of(model, name) for _ in range(2))
    assert other.blocks is not None
    replace_layers(other.blocks)
    return plain, other


def count_replaced(backbone: Backbone) -> int:
    """Return how many of a model's modules are defined in `encoder/cpu/`."""
    kinds = (type(module).__module__ for module in backbone.model.modules())
    return sum(kind.startswith("embedjob.encoder.cpu.") for kind in kinds)


@pytest.mark.parametrize("side", ["right", "left", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_states_are_those_of_the_models_own_layers(name: str, side: str) -> None:
    plain, other = fused_pair(name)
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, 590, (4, 31)))
    lengths = torch.tensor([[31]] * 4 if side == "none" else [[31], [1], [7], [30]])
    mask = torch.arange(31) < lengths
    mask = mask.flip(1) if side == "left" else mask
    for layer in (-1, 1, (0, -1)):
        expected, got = (one.states(ids, mask, layer=layer)[mask] for one in (plain, other))
        assert same(got.numpy(), expected.numpy())


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet", "llama", "qwen3", "mistral", "t5"])
def test_these_models_have_layers_that_are_replaced(name: str) -> None:
    assert count_replaced(fused_pair(name)[1])


@pytest.mark.parametrize("side", ["right", "none"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
def test_prefixes_and_suffixes_go_through_fused_layers(name: str, side: str) -> None:
    plain, other = fused_pair(name)
    for views in (shared_views(), text_first_views(prefix=8)):
        expected = Encoder(plain, recipe(), padding_side="left").encode_views(views)
        got = Encoder(other, recipe(), padding_side=side).encode_views(views)
        assert got.stats["prefix_tokens_saved"] > 0
        assert same(got.embeddings, expected.embeddings)


@pytest.mark.parametrize("name", ["bert", "opt", "llama"])
def test_a_view_that_breaks_takes_no_other_with_it(name: str) -> None:
    plain, other = fused_pair(name)
    for backbone in (plain, other):
        # One token whose states are not numbers, as of a text that overflows.
        backbone.model.get_input_embeddings().weight.data[77] = torch.nan
    asked = recipe(attention="causal" if name in tiny.DECODERS else "bidirectional")
    rows = [[5, 6, 7, 8], [9, 77, 11, 12], [13, 14, 15, 16]]
    views = views_of(rows, [[]], [0] * len(rows))
    expected, got = (Encoder(one, asked).encode_views(views) for one in (plain, other))
    assert set(got.failed) == set(expected.failed) == {1}
    assert same(got.embeddings[[0, 2]], expected.embeddings[[0, 2]])


def test_a_model_loaded_on_a_cpu_has_fused_layers_and_as_many_flops(tmp_path: Path) -> None:
    folder = tiny.save("bert", tmp_path)
    asked = Recipe(model=str(folder), attention="bidirectional", max_tokens=64, dtype="float32")
    encoder = Encoder.from_recipe(asked, device="cpu")
    assert count_replaced(encoder.backbone)
    plain = backbone_of(tiny.model("bert"), "bert")
    assert flops_per_token(encoder.backbone, asked) == flops_per_token(plain, asked)
    with encoder.backbone.float32():
        again = encoder.encode(["the quick brown fox"])
    assert np.array_equal(again, encoder.encode(["the quick brown fox"]))
    narrow = Encoder.from_recipe(asked.model_copy(update={"dtype": "bfloat16"}), device="cpu")
    assert not count_replaced(narrow.backbone)


@pytest.mark.parametrize("part", ["", "input_layernorm", "mlp", "self_attn"])
def test_a_layer_that_does_something_else_by_the_same_names_is_kept(part: str) -> None:
    model = LlamaModel(LlamaConfig(**tiny.GROUPED)).eval()
    layer: Any = model.layers[0].get_submodule(part)

    class Shifted(type(layer)):  # type: ignore[misc]
        def forward(self, *given: Any, **options: Any) -> Any:
            output = super().forward(*given, **options)
            return (output[0] + 1, *output[1:]) if isinstance(output, tuple) else output + 1

    layer.__class__ = Shifted
    assert_same_states(model, "causal")


def test_weights_change_their_place_in_memory_and_nothing_else() -> None:
    plain, other = fused_pair("opt")
    assert other.stack is not None
    linears = [m for m in other.stack.modules() if isinstance(m, nn.Linear)]
    assert linears
    assert all(linear.weight.t().is_contiguous() for linear in linears)
    expected = dict(plain.model.named_parameters())
    for name, weight in other.model.named_parameters():
        assert torch.equal(weight, expected[name])


def test_without_avx512_weights_stay_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimize, "has_avx512", lambda: False)
    _, other = fused_pair("bert")
    assert all(weight.is_contiguous() for weight in other.model.parameters())


def test_layers_whose_parts_are_of_another_class_are_kept() -> None:
    model = copy.deepcopy(tiny.model("bert"))
    first = model.encoder.layer[0]

    class Doubled(nn.Linear):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return super().forward(states) * 2

    for layer in (first.intermediate, first.output, first.attention.output):
        layer.dense.__class__ = Doubled
    assert_same_states(model, "bidirectional")


def test_a_model_whose_blocks_take_more_than_berts_keeps_its_states() -> None:
    # The attention of RoFormer rotates states by their positions.
    torch.manual_seed(3)
    assert_same_states(RoFormerModel(RoFormerConfig(**tiny.SIZE)).eval(), "bidirectional")


def assert_same_states(model: PreTrainedModel, attention: Attention) -> None:
    plain, other = (Backbone(copy.deepcopy(model), attention=attention) for _ in range(2))
    optimize_for_cpu(other)
    # What is not of another make is replaced even so.
    assert count_replaced(other)
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, 590, (4, 9)))
    expected, got = (one.states(ids, torch.ones_like(ids), layer=-1) for one in (plain, other))
    assert same(got.numpy(), expected.numpy())
