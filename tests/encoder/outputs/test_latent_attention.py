"""NV-Embed's checkpoint and the layer in it: loaded by its own names, and never by its own code.

Covers: embedjob.encoder.weight_files, embedjob.models.nvembed
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from embedjob.config.job_file import recipe_from
from embedjob.config.recipe import Recipe
from embedjob.encoder.backbone import load_backbone
from embedjob.encoder.encoder import Encoder
from embedjob.encoder.outputs.latent_attention import load_latent_attention
from embedjob.errors import ModelError
from embedjob.models.architecture import model_info
from embedjob.models.sentence_transformers import folder_layer
from embedjob.models.source import ModelSource
from embedjob.models.tokenizer import load_tokenizer
from tests.encoder import tiny
from tests.fakes import tiny_tokenizer
from tests.methods import making
from tests.methods.references import nv_embed

CPU = torch.device("cpu")
TEXTS = ["The quick brown fox", "a", "It is fine, don't you think? " * 4]
ATTENDS = {"attention": "bidirectional", "pooling": "latent_attention"}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(making.folder("nvembed"), tmp_path / "nvembed"))
    tiny_tokenizer("mistral").save(str(folder / "tokenizer.json"))
    return folder


def recipe(folder: Path, **knobs: Any) -> Recipe:
    return recipe_from({"model": str(folder), "dtype": "float32", "max_tokens": 64, **knobs}, {})


def test_the_folder_configures_itself_and_equals_its_reference(published: Path) -> None:
    """Whatever its modules.json says: that speaks of code which is not run."""
    (published / "modules.json").write_text(json.dumps([{"type": "x.Transformer", "path": ""}]))
    known = model_info(ModelSource(str(published)))
    assert (known.hidden_size, known.layers, known.causal) == (32, 3, False)
    found = folder_layer(published)["encoder"]
    assert found["finish"] == [{"normalize": True}]
    ours = Encoder.from_recipe(recipe(published, **found), device="cpu").encode(TEXTS)
    tokenizer, theirs = tiny_tokenizer("mistral"), making.model("nvembed")
    expected = [nv_embed("")(tokenizer, theirs, text) for text in TEXTS]
    views = load_tokenizer(recipe(published, **found)).views(TEXTS)
    assert [views.full_ids(row).tolist() for row in range(3)] == [one.ids[0] for one in expected]
    assert np.abs(ours - np.stack([one.vector.numpy() for one in expected])).max() <= 1e-5


def test_it_looks_both_ways_or_is_refused(published: Path) -> None:
    with pytest.raises(ModelError, match=r"encoder.attention: got causal"):
        load_backbone(recipe(published), device=CPU)


def test_another_model_has_no_latent_attention(tmp_path: Path) -> None:
    folder = tiny.save("mistral", tmp_path / "mistral")
    with pytest.raises(ModelError, match="has no such layer"):
        Encoder.from_recipe(recipe(folder, **ATTENDS), device="cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("latent_attention_model.latents", r"latents is None, and should be \(6, 32\)"),
        ("embedding_model.layers.1.mlp.up_proj.weight", "lack 1 tensors of MistralModel"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(
    name: str, message: str, published: Path
) -> None:
    for path in published.glob("*.safetensors"):
        kept = {key: one for key, one in load_file(path).items() if key != name}
        save_file(kept, path, metadata={"format": "pt"})
    index = json.loads((published / "model.safetensors.index.json").read_text())
    del index["weight_map"][name]
    (published / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        Encoder.from_recipe(recipe(published, **ATTENDS), device="cpu")


def test_sizes_that_are_not_the_tensors_are_refused(published: Path) -> None:
    config = json.loads((published / "config.json").read_text())
    config["latent_attention_config"] = {"model_type": "latent_attention"}
    (published / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"should be \(.*4096"):
        Encoder.from_recipe(recipe(published, **ATTENDS), device="cpu")


def test_it_computes_as_wide_as_the_states_and_never_looks_outside_the_span(
    published: Path,
) -> None:
    """A rescue in float32 is one although the weights are narrow."""
    found = recipe(published, **ATTENDS)
    low = found.model_copy(update={"dtype": "bfloat16"})
    layer, narrow = (
        load_latent_attention(load_backbone(one, device=CPU), one) for one in (found, low)
    )
    states = torch.linspace(-2, 2, 2 * 5 * 32).sin().reshape(2, 5, 32)
    mask = torch.tensor([[True] * 5, [False, True, True, False, False]])
    exact = layer(states, mask)
    spoilt = states.masked_fill(~mask[:, :, None], torch.nan)
    assert torch.equal(layer(spoilt, mask), exact)
    assert torch.allclose(layer(states[1:, 1:3], mask[1:, 1:3]), exact[1:], atol=1e-6)
    wide = narrow(states, mask)
    half = narrow(states.bfloat16(), mask)
    assert wide.dtype == half.dtype == torch.float32
    error, rounded = ((one - exact).norm() / exact.norm() for one in (wide, half))
    assert error < 0.01
    assert error < rounded < 0.03
