"""A model over several GPUs: planned without any, run with its hooks on the CPU, or with two.

Covers: embedjob.encoder.loading
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModel, LlamaConfig, PreTrainedModel

from embedjob.config.job import Pool
from embedjob.config.recipe import Recipe
from embedjob.encoder.backbone import Backbone, optimize_for_cpu
from embedjob.encoder.encoder import Encoder
from embedjob.encoder.intervention_hooks import at
from embedjob.encoder.loading import device_map, free_memory, load_at, spread
from embedjob.encoder.outputs.language_model import LanguageHead
from embedjob.errors import ResourceError
from embedjob.text.tokenizing import ViewTokenizer
from tests.encoder import tiny
from tests.encoder.adapting import save_adapter

TEXTS = ["the quick brown fox", "a dog", "jumps over the lazy dog " * 3]
TEMPLATES = (
    'This sentence says to its reader: "{text}" and that is all',
    'This sentence says to its reader: "{text}" in one word',
)


def empty(layers: int) -> PreTrainedModel:
    """A Llama of so many layers, without weights."""
    with torch.device("meta"):
        return AutoModel.from_config(LlamaConfig(**{**tiny.GROUPED, "num_hidden_layers": layers}))


def weighs(model: PreTrainedModel) -> int:
    return 4 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("gpus", [2, 3, 4])
def test_the_blocks_are_shared_out_in_order_and_evenly(gpus: int) -> None:
    model = empty(24)
    memory = dict.fromkeys(range(gpus), weighs(model))
    places = device_map(model, memory, dtype=torch.float32)
    own = [one for layer in range(24) for one in _places(places, f"layers.{layer}")]
    assert own == sorted(own)
    assert set(own) == set(range(gpus))
    assert max(own.count(gpu) for gpu in range(gpus)) <= 24 / gpus + 2
    assert _places(places, "embed_tokens") == [0]
    assert _places(places, "norm") == [gpus - 1]


def _places(places: dict[str, int | str], part: str) -> list[int | str]:
    """Where a part is; a block is in one place, and named whole."""
    found = [place for name, place in places.items() if f"{part}.".startswith(f"{name}.")]
    assert len(found) == 1, (part, places)
    return found


def test_a_narrower_dtype_takes_half_the_room() -> None:
    model = empty(24)
    room = dict.fromkeys(range(2), int(weighs(model) * 0.35))
    assert device_map(model, room, dtype=torch.bfloat16)
    said = r"gpus_per_actor: LlamaModel takes 0\.0 GB in torch\.float32, and 2 GPUs .*no place"
    with pytest.raises(ResourceError, match=said):
        device_map(model, room, dtype=torch.float32)


@pytest.mark.skipif(torch.cuda.device_count() >= 8, reason="this machine has eight GPUs")
def test_more_gpus_than_there_are_end_before_the_weights_are_read(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"over 8 GPUs, and this process sees \d; lower pool"):
        free_memory(8)
    folder = tiny.save("llama", tmp_path)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ResourceError, match="over 8 GPUs"):
        Encoder.from_recipe(Recipe(model=str(folder), max_tokens=64, dtype="float32"), gpus=8)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert"])
def test_a_model_with_the_hooks_of_a_spread_one_gives_the_same(name: str) -> None:
    """Whole views, shared prefixes, trees of views, several layers, and a visit in float32."""
    causal = name in tiny.DECODERS
    recipe = Recipe(
        model="-",
        templates=TEMPLATES,
        max_tokens=64,
        layer=(0, 1, -1),
        attention="causal" if causal else "bidirectional",
    )
    found = []
    for hooked in (False, True):
        model = tiny.model(name)
        model = model.base_model if causal else model
        if hooked:
            spread(model, {part: "cpu" for part, _ in model.named_children()})
            assert all(hasattr(part, "_hf_hook") for part in model.children())
        encoder = Encoder(Backbone(model, attention=recipe.attention), recipe)
        encoder._tokenizers["document"] = ViewTokenizer(tiny.tokenizer(name), recipe)
        assert encoder.backbone.device.type == "cpu"
        found.append(encoder.encode(TEXTS))
        with encoder.backbone.float32():
            pass
    assert np.array_equal(*found)


@pytest.mark.parametrize("adapters", [0, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_loaded_part_by_part_is_the_model(
    tmp_path: Path, adapters: int, dtype: str
) -> None:
    """From its files to the places of a map, which on a machine without GPUs are all the CPU."""
    folder = tiny.save("llama", tmp_path / "model")
    merged = [str(save_adapter(tmp_path / str(seed), seed)) for seed in range(adapters)]
    recipe = Recipe.model_validate(
        {"model": str(folder), "adapters": tuple(merged), "max_tokens": 64, "dtype": dtype}
    )
    places = device_map(empty(2), {0: 10**9, 1: 10**9}, dtype=torch.float32)
    assert set(places.values()) == {0, 1}
    whole = load_at(recipe, torch.device("cpu")).model
    parted = load_at(recipe, dict.fromkeys(places, "cpu")).model
    for name, one in whole.state_dict().items():
        assert torch.equal(one, parted.state_dict()[name]), name
    ids, mask = torch.tensor([[5, 9, 17]]), torch.ones(1, 3).bool()
    first, second = (Backbone(model, attention="causal") for model in (whole, parted))
    assert second.device.type == "cpu"
    assert torch.equal(first.states(ids, mask, layer=-1), second.states(ids, mask, layer=-1))


@pytest.mark.parametrize(
    ("gpus", "allowed"),
    [(0, True), (0.25, True), (1, True), (2, True), (8.0, True), (1.5, False), (2.1, False)],
)
def test_above_one_gpu_an_actor_has_whole_ones(gpus: float, allowed: bool) -> None:
    if allowed:
        assert Pool(gpus_per_actor=gpus).gpus_per_actor == gpus
        return
    with pytest.raises(ValidationError, match=rf"got {gpus:g}, allowed is a share of one GPU"):
        Pool(gpus_per_actor=gpus)


STEERED: Mapping[str, object] = {
    "templates": ('<PST> This sentence says to its reader: "{text}"',),
    "interventions": (
        {"prepend": {"slot": "<PST>", "start": 1, "exit": 2, "seed": 5}},
        {"contrast": {"template": 'Its words are not: "{text}"', "layer": 1, "alpha": 0.5}},
    ),
}
SAID: Mapping[str, object] = {
    "templates": ('The words for "{text}" are: "',),
    "decode": {"max_tokens": 3, "until": '"'},
    "heads": ({"sparse_lm": {}},),
}


def spread_recipe(folder: Path, **knobs: object) -> Recipe:
    common = {"model": str(folder), "max_tokens": 64, "dtype": "float32", "span": "last_token"}
    return Recipe.model_validate({**common, **knobs})


@pytest.mark.parametrize("knobs", [STEERED, SAID])
def test_states_inside_a_model_with_such_hooks_are_steered_and_said_from(
    tmp_path: Path, knobs: Mapping[str, object]
) -> None:
    recipe = spread_recipe(tiny.save("llama", tmp_path), **knobs)
    one = Encoder.from_recipe(recipe, device="cpu")
    model = tiny.model("llama")
    head = LanguageHead(model) if recipe.reads_logits else None
    body = head.body if head else model.base_model
    spread(body, {part: "cpu" for part, _ in body.named_children()})
    backbone = Backbone(body, attention="causal", head=head)
    # As it is when loaded on a CPU.
    optimize_for_cpu(backbone)
    other = Encoder(backbone, recipe)
    first, second = one.outputs(TEXTS), other.outputs(TEXTS)
    assert np.array_equal(first.embeddings, second.embeddings)
    if first.sparse is not None and second.sparse is not None:
        assert np.array_equal(first.sparse.row(1)[1], second.sparse.row(1)[1])


@pytest.mark.parametrize("seen", ["meta", "cpu"])
def test_places_are_where_the_states_are_and_go_there_once(seen: str) -> None:
    places_on = at((torch.arange(3), torch.tensor([4, 0, 2])))
    first, second = places_on(torch.device(seen)), places_on(torch.device(seen))
    assert [one.device.type for one in first] == [seen, seen]
    assert all(one is other for one, other in zip(first, second, strict=True))
    assert [one.tolist() for one in places_on(torch.device("cpu"))] == [[0, 1, 2], [4, 0, 2]]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("knobs", [STEERED, SAID])
def test_two_gpus_steer_and_say_what_one_does(tmp_path: Path, knobs: Mapping[str, object]) -> None:
    recipe = spread_recipe(tiny.save("llama", tmp_path), **knobs)
    one, two = Encoder.from_recipe(recipe), Encoder.from_recipe(recipe, gpus=2)
    assert {p.device.index for p in two.backbone.model.parameters()} == {0, 1}
    assert np.allclose(one.encode(TEXTS), two.encode(TEXTS), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("adapters", [0, 1])
def test_two_gpus_give_what_one_gives(tmp_path: Path, adapters: int) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    merged = [str(save_adapter(tmp_path / str(seed), seed)) for seed in range(adapters)]
    recipe = Recipe(
        model=str(folder),
        adapters=tuple(merged),
        templates=TEMPLATES,
        max_tokens=64,
        dtype="float32",
        layer=(1, -1),
    )
    one = Encoder.from_recipe(recipe)
    two = Encoder.from_recipe(recipe, gpus=2)
    assert {p.device.index for p in two.backbone.model.parameters()} == {0, 1}
    assert two.backbone.device == torch.device("cuda", 0)
    assert np.allclose(one.encode(TEXTS), two.encode(TEXTS), atol=1e-5)
