"""Linear layers in eight bits, against the same model's own."""

import copy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from embedjob.encoder import facts, quantized
from embedjob.encoder.backbone import Backbone
from embedjob.encoder.encoder import Encoder
from embedjob.encoder.flops import flops_per_token
from embedjob.encoder.placement import spread
from embedjob.errors import ConfigError, ModelError, ResourceError
from embedjob.recipe import Recipe
from tests.encoder import tiny

TEXTS = ["the quick brown fox", "a", "jumps over the lazy dog " * 4, 'She said "no"']
NAMES = ("llama", "qwen3", "neox", "bert", "modernbert")


def asked(folder: Path, name: str, **knobs: Any) -> Recipe:
    attention = "bidirectional" if name in tiny.ENCODERS else "causal"
    given = {"model": str(folder), "max_tokens": 64, "dtype": "float32", "attention": attention}
    return Recipe.model_validate({**given, **knobs})


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.asarray((one * other).sum(axis=1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_vectors_are_near_and_do_not_depend_on_their_neighbours(
    tmp_path: Path, name: str, dtype: str
) -> None:
    folder = tiny.save(name, tmp_path)
    recipe = asked(folder, name, quantize="int8", dtype=dtype)
    plain = Encoder.from_recipe(asked(folder, name), device="cpu").encode(TEXTS)
    encoder = Encoder.from_recipe(recipe, device="cpu")
    vectors = encoder.encode(TEXTS)
    assert not np.array_equal(vectors, plain)
    assert cosines(vectors, plain).min() >= 0.995
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    left = Encoder(encoder.backbone, recipe, padding_side="left", tokens_per_microbatch=8)
    left._tokenizers = encoder._tokenizers
    for other in (alone, left.encode(TEXTS)):
        assert cosines(vectors, other).min() >= 0.999
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
    assert cosines(fast.embeddings, slow.embeddings).min() >= 0.999


def test_weights_stay_what_they_are_over_a_visit_in_float32(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path)
    recipe = asked(folder, "llama", quantize="int8", dtype="bfloat16")
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
        quantized.quantize(backbone.stack, Recipe(model="m", quantize="int8"))
        ids = torch.arange(3, 12)[None]
        states.append(backbone.states(ids, torch.ones_like(ids).bool(), layer=-1))
    assert torch.equal(*states)


def test_a_model_without_linear_layers_in_its_blocks_is_refused(tmp_path: Path) -> None:
    recipe = asked(tiny.save("gpt2", tmp_path), "gpt2", quantize="int8")
    with pytest.raises(ModelError, match=r"encoder\.quantize: got int8, but no linear layer"):
        Encoder.from_recipe(recipe, device="cpu")


def test_without_torchao_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(name: str) -> ModuleSpec | None:
        assert name == "torchao"
        return None

    monkeypatch.setattr(facts, "find_spec", found)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ConfigError, match=r"got int8, which needs torchao.* embedjob\[quantize\]"):
        Encoder.from_recipe(Recipe(model="/nowhere", quantize="int8"), device="cpu")
    facts.require_quantizer(Recipe(model="/nowhere"), on_gpu=False)


def test_float8_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(model="/nowhere", quantize="float8")
    with pytest.raises(ConfigError, match="got float8 without a GPU"):
        Encoder.from_recipe(recipe, device="cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ResourceError, match=r"capability 8\.0; allowed is 8\.9 or more"):
        quantized.require_device(recipe, torch.device("cuda"))
    with pytest.raises(ValidationError, match="got float8 with dtype: float32"):
        Recipe(model="m", quantize="float8", dtype="float32")
