"""Fused blocks: they give what a model's own blocks give, whatever model it is.

Covers: embedjob.encoder.cpu.layers
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    ArceeConfig,
    ArceeModel,
    BertConfig,
    BertModel,
    CohereConfig,
    CohereModel,
    DynamicCache,
    GemmaConfig,
    GemmaModel,
    GlmConfig,
    GlmModel,
    GraniteConfig,
    GraniteModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    NemotronConfig,
    NemotronModel,
    OlmoConfig,
    OlmoModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2Model,
    SmolLM3Config,
    SmolLM3Model,
)

from embedjob.encoder.backbone import Backbone, optimize_for_cpu
from embedjob.encoder.cpu import optimize
from embedjob.encoder.cpu.layers import bias_in_a_column
from embedjob.encoder.cpu.optimize import replace_layers
from embedjob.encoder.encoder import Encoder
from tests.encoder import steering, tiny
from tests.encoder.plain import recipe, same
from tests.encoder.token_views import shared_views

WINDOWED = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}
# Models that have Llama's layers, or some of them, or others under the same names.
KIN: dict[str, Callable[[], PreTrainedModel]] = {
    "biases": lambda: LlamaModel(LlamaConfig(**tiny.GROUPED, attention_bias=True, mlp_bias=True)),
    # Biases of queries, keys and values; and a window in one of its layers.
    "qwen2": lambda: Qwen2Model(Qwen2Config(**tiny.GROUPED)),
    "windows": lambda: Qwen2Model(Qwen2Config(**tiny.GROUPED, **WINDOWED)),
    "mistral": lambda: MistralModel(MistralConfig(**tiny.GROUPED, sliding_window=4)),
    # Another activation, another residual, no gate.
    "gemma": lambda: GemmaModel(GemmaConfig(**tiny.GROUPED)),
    "granite": lambda: GraniteModel(GraniteConfig(**tiny.GROUPED, residual_multiplier=0.3)),
    "arcee": lambda: ArceeModel(ArceeConfig(**tiny.GROUPED)),
    # Neighbours are turned, and no more than a part of them; not every layer has positions; and
    # values are cut off.
    "glm": lambda: GlmModel(GlmConfig(**tiny.GROUPED)),
    "nemotron": lambda: NemotronModel(NemotronConfig(**tiny.GROUPED)),
    "cohere": lambda: CohereModel(CohereConfig(**tiny.GROUPED)),
    "smollm3": lambda: SmolLM3Model(SmolLM3Config(**tiny.GROUPED, no_rope_layers=[1, 0])),
    "olmo": lambda: OlmoModel(OlmoConfig(**tiny.SIZE, clip_qkv=9.0)),
    # It may be given a cache of earlier tokens.
    "bert decoder": lambda: BertModel(BertConfig(**tiny.SIZE, is_decoder=True)),
}


@pytest.fixture(autouse=True)
def avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimize, "has_avx512", lambda: True)


def drawn(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Return a model whose biases are not zero, which transformers would make them."""
    torch.manual_seed(11)
    model = make().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.5)
    return model


def pair(model: PreTrainedModel) -> tuple[Backbone, Backbone]:
    """Return the model as it is, and with fused layers."""
    plain, quick = (Backbone(copy.deepcopy(model), attention="causal") for _ in range(2))
    optimize_for_cpu(quick)
    return plain, quick


@pytest.mark.parametrize("name", KIN)
def test_models_near_to_llama_keep_their_states(name: str) -> None:
    plain, quick = pair(drawn(KIN[name]))
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, 590, (4, 31)))
    mask = torch.arange(31) < torch.tensor([[31], [1], [7], [30]])
    for layer in (-1, 1, (0, 1, -1)):
        own, got = (one.states(ids, mask, layer=layer)[mask] for one in (plain, quick))
        assert same(got.numpy(), own.numpy())


@pytest.mark.parametrize("name", ["qwen2", "gemma", "granite"])
@pytest.mark.parametrize("side", ["right", "none"])
def test_prefixes_are_kept_of_rotated_keys(name: str, side: Any) -> None:
    plain, quick = pair(drawn(KIN[name]))
    views = shared_views()
    expected = Encoder(plain, recipe(), padding_side="left").encode_views(views)
    got = Encoder(quick, recipe(), padding_side=side).encode_views(views)
    assert got.stats["prefix_tokens_saved"] > 0
    assert same(got.embeddings, expected.embeddings)


@pytest.mark.parametrize("name", ["qwen2", "bert decoder"])
def test_what_follows_a_cache_is_what_followed_it(name: str) -> None:
    plain, quick = pair(drawn(KIN[name]))
    ids = torch.from_numpy(np.random.default_rng(2).integers(3, 590, (2, 9)))
    mask = torch.ones_like(ids)
    found = []
    for one in (plain, quick):
        cache = DynamicCache()
        one.continued(ids[:, :6], mask[:, :6], cache)
        later = one.continued(ids[:, 6:], mask, cache, position_VT=torch.arange(6, 9).expand(2, -1))
        found.append(later.flatten(0, 1).numpy())
    assert same(found[1], found[0])


def test_states_that_were_read_are_not_changed_by_later_blocks() -> None:
    _, quick = pair(tiny.model("llama").base_model)
    assert quick.blocks is not None
    ids = torch.arange(3, 12)[None]
    seen: list[torch.Tensor] = []
    for block in quick.blocks:
        block.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.inference_mode():
        quick.model(input_ids=ids)
    before = [states.clone() for states in seen]
    for layer, states in enumerate(before):
        assert torch.equal(quick.states(ids, torch.ones_like(ids), layer=layer), states)


@pytest.mark.parametrize(("side", "budget"), steering.WAYS)
def test_interventions_find_their_places_in_such_blocks(side: Any, budget: int) -> None:
    plain, quick = pair(steering.inner("llama"))
    views, asked = steering.views(), steering.recipe(*steering.BOTH)
    expected, got = (
        Encoder(one, asked, padding_side=side, tokens_per_microbatch=budget).encode_views(views)
        for one in (plain, quick)
    )
    assert same(got.embeddings, expected.embeddings)
    less = steering.recipe(steering.BOTH[0])
    other = Encoder(quick, less).encode_views(steering.views(contrasted=False))
    assert not same(got.embeddings, other.embeddings)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *(("bert", part) for part in ("", "attention", "attention.self", "attention.output")),
        *(("bert", part) for part in ("intermediate", "output", "output.dense")),
        *(("llama", part) for part in ("", "mlp", "self_attn", "mlp.down_proj")),
        *(("llama", part) for part in ("input_layernorm", "self_attn.o_proj")),
    ],
)
def test_what_a_part_of_another_make_does_beyond_the_example_is_done(name: str, part: str) -> None:
    attention = "causal" if name in tiny.DECODERS else "bidirectional"
    model = drawn(lambda: copy.deepcopy(tiny.model(name).base_model))
    blocks = Backbone(model, attention=attention).blocks
    assert blocks is not None
    place: Any = blocks[0].get_submodule(part)

    class Louder(type(place)):  # type: ignore[misc]
        def forward(self, *given: Any, **asked: Any) -> Any:
            found = super().forward(*given, **asked)
            states = found[0] if isinstance(found, tuple) else found
            # An example has fewer views.
            if states.shape[0] > 3:
                states.mul_(2)
            return found

    quiet = Backbone(copy.deepcopy(model), attention=attention)
    place.__class__ = Louder
    louder, quick = (Backbone(copy.deepcopy(model), attention=attention) for _ in range(2))
    optimize_for_cpu(quick)
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, 590, (4, 9)))
    own, got, other = (
        one.states(ids, torch.ones_like(ids), layer=-1).numpy() for one in (louder, quick, quiet)
    )
    assert same(got, own)
    assert not same(other, own)


def test_a_fused_block_has_the_attributes_that_models_read_but_not_a_hooks_forward() -> None:
    layers = tiny.model("llama").base_model.layers
    own = layers[0]
    layers[0].attention_type = "full_attention"
    layers[0].forward = layers[0].forward
    replace_layers(layers)
    assert layers[0] is not own
    assert layers[0].attention_type == "full_attention"
    assert "forward" not in vars(layers[0])


@given(
    seed=st.integers(0, 99),
    zeros=st.integers(0, 3),
    mean=st.sampled_from([0.0, 5.0, -30.0]),
    outlier=st.sampled_from([1.0, 100.0]),
)
@settings(max_examples=60, deadline=None)
def test_of_what_a_norm_gives_one_number_may_make_room_for_a_bias(
    seed: int, zeros: int, mean: float, outlier: float
) -> None:
    torch.manual_seed(seed)
    norm, linear = nn.LayerNorm(48), nn.Linear(48, 20)
    with torch.no_grad():
        for parameter in (norm.weight, norm.bias, linear.bias):
            parameter.normal_()
        norm.weight[:zeros] = 0
        made, spare = bias_in_a_column(linear, norm)
        states = torch.randn(9, 48) + mean
        states[:, 5] *= outlier
        normed = norm(states)
        expected = linear(normed)
        normed[:, spare] = 1
        got = made(normed)
    assert made.bias is None
    assert float((got - expected).norm() / expected.norm()) < 1e-5
