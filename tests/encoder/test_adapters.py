"""Adapters, merged into their base at load.

Covers: embedjob.encoder.loading
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from embedjob.config.recipe import Recipe
from embedjob.encoder.loading import load_model
from embedjob.errors import ModelError
from tests.encoder import tiny
from tests.encoder.adapting import BARE, INSIDE, deltas, factors, save_adapter

CPU = torch.device("cpu")
Q = "layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDJOB_CACHE", str(tmp_path / "cache"))


def plain() -> dict[str, Tensor]:
    """The weights of the tiny model without its head."""
    return dict(tiny.model("llama").base_model.state_dict())


def load(base: Path, *adapters: Path, **knobs: Any) -> dict[str, Tensor]:
    named = tuple(map(str, adapters))
    recipe = Recipe(model=str(base), max_tokens=64, adapters=named, **knobs)
    return dict(load_model(recipe, device=CPU).model.state_dict())


@pytest.mark.parametrize("prefix", [BARE, INSIDE])
def test_an_adapter_is_added_to_the_weights_that_it_names(
    base: Path, tmp_path: Path, prefix: str
) -> None:
    """Named for the bare model or for the one with a head."""
    found = load(base, save_adapter(tmp_path / "a", 1, prefix=prefix))
    added = deltas(1)
    for name, before in plain().items():
        if name in added:
            torch.testing.assert_close(found[name], before + added[name], atol=1e-5, rtol=1e-5)
            assert not torch.allclose(found[name], before, atol=1e-2)
        else:
            assert torch.equal(found[name], before), name


def test_patterns_of_names_mean_what_they_meant_in_training(base: Path, tmp_path: Path) -> None:
    """A scale of one layer, under its name in the model with a head."""
    pattern = {"model.layers.0.self_attn.q_proj": 40}
    adapter = save_adapter(tmp_path / "a", 1, prefix=INSIDE, alpha_pattern=pattern)
    found = load(base, adapter)
    own = deltas(1, scale=10.0)[Q]
    torch.testing.assert_close(found[Q], plain()[Q] + own, atol=1e-5, rtol=1e-5)
    other = "layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(found[other], plain()[other] + deltas(1)[other], atol=1e-5, rtol=0)


def test_the_order_of_merging_counts(base: Path, tmp_path: Path) -> None:
    """DoRA scales the rows of what it is merged into, so what came before is scaled too."""
    first = save_adapter(tmp_path / "a", 1)
    magnitudes = {
        f"{BARE}{name}.lora_magnitude_vector": torch.linspace(0.5, 2, len(b))
        for name, (_, b) in factors(2).items()
    }
    second = save_adapter(tmp_path / "b", 2, more=magnitudes, use_dora=True)
    weight, one, two = plain()[Q], deltas(1)[Q], deltas(2)[Q]
    scales = torch.linspace(0.5, 2, len(weight))[:, None]

    def scaled(whole: Tensor) -> Tensor:
        return scales * whole / whole.norm(dim=1, keepdim=True)

    forth, back = load(base, first, second)[Q], load(base, second, first)[Q]
    torch.testing.assert_close(forth, scaled(weight + one + two), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(back, scaled(weight + two) + one, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(forth, back, atol=1e-2)


def test_a_narrow_model_is_rounded_once_after_all_adapters(base: Path, tmp_path: Path) -> None:
    """Else the second would be added to weights that had lost a part of the first."""
    adapters = [save_adapter(tmp_path / str(seed), seed) for seed in (1, 2)]
    found = load(base, *adapters, dtype="bfloat16")
    exact = load(base, *adapters)
    assert all(torch.equal(found[name], exact[name].bfloat16()) for name in exact)
    twice = (plain()[Q] + deltas(1)[Q]).bfloat16() + deltas(2)[Q].bfloat16()
    assert not torch.equal(found[Q], twice)
    recipe = Recipe(model=str(base), max_tokens=64, dtype="bfloat16", adapters=(str(adapters[0]),))
    merged = load_model(recipe, device=CPU).model
    loaded = load_model(recipe.model_copy(update={"adapters": ()}), device=CPU).model
    assert merged.dtype == loaded.dtype == torch.bfloat16
    # Angles among them: in bfloat16 they would turn far tokens the wrong way.
    theirs = dict(loaded.named_buffers())
    assert all(torch.equal(one, theirs[name]) for name, one in merged.named_buffers())
    assert theirs


def test_adapters_of_other_kinds_are_merged_too(base: Path, tmp_path: Path) -> None:
    """IA3 multiplies rows: no A and no B."""
    config = {
        "peft_type": "IA3",
        "target_modules": ["q_proj"],
        "feedforward_modules": [],
        "base_model_name_or_path": None,
    }
    scales = {
        f"{INSIDE}layers.{layer}.self_attn.q_proj.ia3_l": torch.full((32, 1), 3.0)
        for layer in range(2)
    }
    folder = tmp_path / "a"
    folder.mkdir()
    save_file(scales, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.testing.assert_close(load(base, folder)[Q], 3 * plain()[Q])


@pytest.mark.parametrize("prefix", [BARE, INSIDE])
def test_embeddings_of_added_tokens_come_with_their_adapter(
    base: Path, tmp_path: Path, prefix: str
) -> None:
    """PEFT saves them whole, and the head's beside them where there is one."""
    torch.manual_seed(8)
    rows = torch.cat([plain()["embed_tokens.weight"], torch.randn(2, 32)])
    more = {f"{prefix}embed_tokens.weight": rows}
    if prefix == INSIDE:
        more["base_model.model.lm_head.weight"] = rows.clone()
    found = load(base, save_adapter(tmp_path / "a", 1, prefix=prefix, more=more))
    assert torch.equal(found["embed_tokens.weight"], rows)
    torch.testing.assert_close(found[Q], plain()[Q] + deltas(1)[Q], atol=1e-5, rtol=1e-5)
    alone = {"base_model.model.lm_head.weight": rows.clone()}
    with pytest.raises(ModelError, match=r"has 1 tensors that .*lm_head"):
        load(base, save_adapter(tmp_path / "b", 1, prefix=prefix, more=alone))


def tensors_of(adapter: Path) -> dict[str, Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def elsewhere(adapter: Path) -> dict[str, Tensor]:
    """As if for a model of another architecture."""
    return {name.replace("layers", "h"): one for name, one in tensors_of(adapter).items()}


def deeper(adapter: Path) -> dict[str, Tensor]:
    """As if for a model with more layers."""
    found = tensors_of(adapter)
    return {**found, **{n.replace("layers.1", "layers.2"): one.clone() for n, one in found.items()}}


def fewer(adapter: Path) -> dict[str, Tensor]:
    return {name: one for name, one in tensors_of(adapter).items() if "layers.1" not in name}


def wider(adapter: Path) -> dict[str, Tensor]:
    """As if for a wider model."""
    found = tensors_of(adapter)
    return {name: torch.cat([one, one]) if "_B" in name else one for name, one in found.items()}


@pytest.mark.parametrize("prefix", [BARE, INSIDE])
@pytest.mark.parametrize(
    ("made", "said"),
    [
        (elsewhere, r"has 8 tensors that LlamaModel has no place for \(.*\.h\.0\..*, \.\.\.\)"),
        (deeper, r"has 4 tensors that LlamaModel has no place for \(.*layers\.2"),
        (fewer, r"has 4 tensors too few: its adapter_config\.json asks for them \(.*layers\.1"),
        (wider, "size mismatch"),
    ],
)
def test_an_adapter_that_does_not_fit_whole_is_refused(
    base: Path, tmp_path: Path, prefix: str, made: Any, said: str
) -> None:
    adapter = save_adapter(tmp_path / "a", 1, prefix=prefix)
    save_file(made(adapter), adapter / "adapter_model.safetensors")
    with pytest.raises(
        ModelError, match=rf"encoder\.adapters: {adapter} .*{said}.*[Gg]ive|trained"
    ):
        load(base, adapter)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_modules": ["c_attn"]}, "Target modules .*c_attn.* not found"),
        ({"peft_type": "PREFIX_TUNING"}, "has the kind PREFIX_TUNING, which cannot be merged"),
        ({"peft_type": "NEWEST"}, "cannot be merged into LlamaModel"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused(
    base: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    adapter = save_adapter(tmp_path / "a", 1, **changes)
    with pytest.raises(ModelError, match=rf"encoder\.adapters: {adapter} .*{said}"):
        load(base, adapter)


def test_a_broken_adapter_file_is_told(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", 1)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match=rf"encoder\.adapters: {adapter} cannot be merged"):
        load(base, adapter)


def test_pickled_adapters_are_read_only_when_allowed(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", 1)
    expected = load(base, adapter)
    torch.save(tensors_of(adapter), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pickled ones \(adapter_model\.bin\).*allow_pickle"):
        load(base, adapter)
    found = load(base, adapter, allow_pickle=True)
    assert all(torch.equal(found[name], one) for name, one in expected.items())
