"""Heads: what sentence-transformers saves after a pooling, and a model's own pooler.

Covers: embedjob.encoder.weight_files, embedjob.encoder.outputs.view_states
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from embedjob.config.heads import Pooler
from embedjob.config.job_file import recipe_from
from embedjob.config.recipe import Recipe
from embedjob.encoder.backbone import load_backbone
from embedjob.encoder.encoder import Encoder
from embedjob.encoder.outputs.pool_and_heads import HEAD_LOADERS
from embedjob.encoder.outputs.view_states import ViewStates
from embedjob.encoder.view_encoder import ViewEncoder
from embedjob.errors import ModelError
from embedjob.models.digests import file_digests
from embedjob.models.sentence_transformers import folder_layer, vector_width
from embedjob.models.source import source_of
from embedjob.output.fingerprint import fingerprint
from tests.encoder import tiny

TEXTS = ["The quick brown fox", "a", "It is fine, don't you think? " * 4, "Zürich {x}"]
CLS: dict[str, Any] = {"attention": "bidirectional", "span": "first_token", "finish": []}


def recipe(model: Path, **knobs: Any) -> Recipe:
    return recipe_from({"model": str(model), "dtype": "float32", "max_tokens": 64, **knobs}, {})


def encode(one: Recipe) -> np.ndarray:
    return Encoder.from_recipe(one, device="cpu").encode(TEXTS)


def cosines(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return (ours * theirs).sum(axis=1) / lengths


def theirs(directory: Path, name: str, chain: str) -> tuple[Path, np.ndarray]:
    """A folder that sentence-transformers itself saved, and its vectors."""
    library = pytest.importorskip("sentence_transformers")
    parts = pytest.importorskip("sentence_transformers.models")
    tiny.save(name, directory / "bare")
    torch.manual_seed(7)
    wide = parts.Dense(64, 48, activation_function=nn.GELU())
    chains: dict[str, list[nn.Module]] = {
        "dense": [parts.Dense(64, 16)],
        "two": [wide, parts.Dense(48, 48, bias=False, activation_function=nn.Identity())],
        "normed": [parts.Normalize(), parts.LayerNorm(64), parts.Dense(64, 8), parts.Normalize()],
        "residual": [parts.Dense(64, 64, use_residual=True), parts.Dense(64, 9, use_residual=True)],
        "last": [parts.LayerNorm(64), parts.Dropout(0.5)],
    }
    for module in chains[chain]:
        for weight in module.parameters():
            nn.init.normal_(weight, std=0.3)
    pooling = parts.Pooling(32, pooling_mode=("cls", "mean"))
    modules = [parts.Transformer(str(directory / "bare")), pooling, *chains[chain]]
    model = library.SentenceTransformer(modules=modules, device="cpu").eval()
    model.save(str(directory / "whole"))
    return directory / "whole", model.encode(TEXTS)


@pytest.mark.parametrize("name", ["bert", "qwen3"])
@pytest.mark.parametrize("chain", ["dense", "two", "normed", "residual", "last"])
def test_a_folder_that_sentence_transformers_saved_gives_its_vectors(
    chain: str, name: str, tmp_path: Path
) -> None:
    folder, expected = theirs(tmp_path, name, chain)
    found = recipe(folder, **folder_layer(folder)["encoder"])
    ours = encode(found)
    assert cosines(ours, expected).min() >= 0.99999
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()
    assert vector_width(found, 32, folder) == ours.shape[1]


def test_the_files_of_heads_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    folder, _ = theirs(tmp_path, "bert", "dense")
    found = recipe(folder, **folder_layer(folder)["encoder"])
    before = file_digests(source_of(found))
    assert {"2_Dense/model.safetensors", "2_Dense/config.json"} <= before.keys()
    tensors = load_file(folder / "2_Dense/model.safetensors")
    save_file(
        {name: one * 2 for name, one in tensors.items()}, folder / "2_Dense/model.safetensors"
    )
    after = file_digests(source_of(found))
    assert fingerprint(found, before) != fingerprint(found, after)
    bare = found.model_copy(update={"heads": ()})
    assert file_digests(source_of(bare)).keys() == before.keys() - {
        n for n in before if "Dense" in n
    }


def test_pickled_modules_are_read_only_when_trusted(tmp_path: Path) -> None:
    folder, expected = theirs(tmp_path, "bert", "dense")
    safe = folder / "2_Dense/model.safetensors"
    torch.save(load_file(safe), folder / "2_Dense/pytorch_model.bin")
    safe.unlink()
    found = recipe(folder, **folder_layer(folder)["encoder"])
    with pytest.raises(ModelError, match=r"2_Dense has no weights .*allow_pickle"):
        encode(found)
    trusted = found.model_copy(update={"allow_pickle": True})
    assert cosines(encode(trusted), expected).min() >= 0.99999


def test_a_recipe_with_heads_travels_as_json() -> None:
    heads = [{"pooler": True}, {"dense": "2_Dense"}, {"normalize": True}, {"layer_norm": "a/b"}]
    found = recipe(Path("m"), heads=heads, pooling=["first", "mean"])
    assert Recipe.model_validate_json(found.model_dump_json()) == found
    assert recipe_from(found.model_dump(mode="json"), {}) == found
    assert [next(iter(head.model_dump())) for head in found.heads] == [*map(next, map(iter, heads))]


def test_a_module_with_other_tensors_is_refused(tmp_path: Path) -> None:
    folder, _ = theirs(tmp_path, "bert", "dense")
    save_file({"linear.weight": torch.zeros(16, 64)}, folder / "2_Dense/model.safetensors")
    with pytest.raises(ModelError, match=r"linear.bias are missing"):
        encode(recipe(folder, **folder_layer(folder)["encoder"]))


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet"])
def test_the_pooler_is_the_models_own(name: str, tmp_path: Path) -> None:
    folder = tiny.save(name, tmp_path / name)
    found = recipe(folder, **CLS, heads=[{"pooler": True}])
    backbone = load_backbone(found, device=torch.device("cpu"))
    encoder = ViewEncoder(backbone, found)
    ids = torch.arange(3, 9)[None]
    with torch.inference_mode():
        out = backbone.model(ids)
        states = ViewStates(out.last_hidden_state, torch.eye(6)[:1].bool(), ids)
    ours = encoder._readout(found)(states)
    assert np.allclose(ours, out.pooler_output.numpy(), atol=1e-6)


def test_a_pooler_that_the_checkpoint_lacks_is_never_made_up(tmp_path: Path) -> None:
    folder = tiny.save("bert", tmp_path / "bert")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: one for name, one in tensors.items() if "pooler" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    assert np.isfinite(encode(recipe(folder, **CLS))).all()
    with pytest.raises(
        ModelError, match=r"have no pooler \(pooler.dense.bias, pooler.dense.weight"
    ):
        encode(recipe(folder, **CLS, heads=[{"pooler": True}]))
    plain = tiny.save("distilbert", tmp_path / "distilbert")
    with pytest.raises(ModelError, match="DistilBertModel has no layer of its own"):
        encode(recipe(plain, **CLS, heads=[{"pooler": True}]))


def test_heads_stay_in_float32_beside_a_narrower_model(tmp_path: Path) -> None:
    folder = tiny.save("bert", tmp_path / "bert")
    found = recipe(folder, **CLS, heads=[{"pooler": True}]).model_copy(update={"dtype": "bfloat16"})
    backbone = load_backbone(found, device=torch.device("cpu"))
    pooler = HEAD_LOADERS[Pooler](found.heads[0], backbone, found)
    assert backbone.model.dtype == torch.bfloat16
    vectors = torch.linspace(-1, 1, 64).reshape(2, 32)
    nothing = torch.empty(0)
    states = ViewStates(nothing, nothing, nothing)
    # A narrower layer would refuse vectors in float32.
    before = pooler.apply(states, vectors)
    assert before.dtype == torch.float32
    with backbone.float32():
        assert torch.equal(pooler.apply(states, vectors), before)
