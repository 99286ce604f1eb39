"""The encoder of an output: exactly the recipe that wrote it, and nothing that it does not allow.

Covers: embedjob.job.recorded, embedjob.encoder.method_recipes
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from embedjob.config.interventions import Prepend, Prepending
from embedjob.config.recipe import Recipe, Split
from embedjob.encoder.encoder import Encoder
from embedjob.errors import ConfigError, ModelError, OutputError
from embedjob.job.resolve import resolve_encoder
from embedjob.models.digests import file_digests
from embedjob.models.source import source_of
from embedjob.models.tokenizer import read_tokenizer
from embedjob.output.calibration import Calibration
from embedjob.output.claim import Claim, Probes, put_claim
from embedjob.output.fingerprint import fingerprint
from embedjob.output.manifest import FileList
from embedjob.output.snapshot import Snapshot, publish
from embedjob.text.slots import as_normalized
from embedjob.vectors.quantizing import CALIBRATED, quantize, ranges_of
from tests.cluster import ROOT
from tests.encoder import tiny


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMBEDJOB_CACHE", str(tmp_path / "cache"))
    return tiny.save("llama", tmp_path / "model")


def recipes(model: Path, layer: int = -1) -> dict[str, Recipe]:
    common = {"model": str(model), "max_tokens": 40, "dtype": "float32", "layer": layer}
    document = Recipe.model_validate({**common, "role": "document"})
    query = {**common, "role": "query", "templates": ("Query: {text}",)}
    return {"document": document, "query": Recipe.model_validate(query)}


def claim(
    model: Path, found: Mapping[str, str] | None = None, *, layer: int = -1, **knobs: object
) -> Claim:
    """The claim of a run that wrote documents."""
    made = {role: one.model_copy(update=knobs) for role, one in recipes(model, layer).items()}
    found = found or file_digests(source_of(made["document"]))
    return Claim(
        chunk_rows=100,
        fingerprint=fingerprint(made["document"], found),
        recipes={role: recipe.model_dump(mode="json") for role, recipe in made.items()},
        digests=found,
        schema={},
        probes=Probes([], [], []),
        versions={},
    )


def test_queries_are_embedded_by_the_recipe_that_wrote(model: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    put_claim(out, claim(model))
    encoder = Encoder.from_output(out, device="cpu")
    for role, recipe in recipes(model).items():
        expected = Encoder.from_recipe(recipe, device="cpu").encode(["a fox"])
        assert np.array_equal(encoder.encode(["a fox"], role=role), expected)
    assert np.array_equal(encoder.encode(["fox"]), encoder.encode(["fox"], role="document"))


def test_queries_of_a_static_table_need_no_torch(tmp_path: Path) -> None:
    """In a fresh process, as a search service starts."""
    table, out = tmp_path / "glove.txt", str(tmp_path / "out")
    table.write_text("the 0.5 -1 0.25\nfox 1 2 -3\ndog 0.125 0 1\n")
    made = resolve_encoder({"model": str(table)}, on_gpu=False)
    found = file_digests(source_of(made.recipe))
    kept = {role: one.model_dump(mode="json") for role, one in made.recipes.items()}
    hashed = fingerprint(made.recipe, found)
    put_claim(out, replace(claim(table, found), fingerprint=hashed, recipes=kept))
    program = f"""
import json, sys
import embedjob
vectors = embedjob.Encoder.from_output({out!r}).encode(["the fox", "dog"])
heavy = [name for name in ("torch", "transformers", "ray") if name in sys.modules]
print(json.dumps([heavy, vectors.tolist()]))
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    heavy, vectors = json.loads(ran.stdout.splitlines()[-1])
    assert heavy == []
    means = np.array([[0.75, 0.5, -1.375], [0.125, 0, 1]])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert np.abs(np.array(vectors) - means).max() <= 1e-6


def test_an_output_that_read_tokenizer_json_alone_is_refused_with_the_reason(
    model: Path, tmp_path: Path
) -> None:
    before = file_digests(source_of(recipes(model)["document"]))
    config = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    put_claim(str(tmp_path / "old"), claim(model, before))
    with pytest.raises(ModelError, match=r"(?s)tokenizer_config.json differ.*Changed in a release"):
        Encoder.from_output(str(tmp_path / "old"), device="cpu")
    put_claim(str(tmp_path / "new"), claim(model))
    assert len(Encoder.from_output(str(tmp_path / "new"), device="cpu").encode(["a fox"])) == 1


def test_an_output_with_passages_of_other_borders_is_refused_with_the_reason(
    model: Path, tmp_path: Path
) -> None:
    """As it was written before the rule of borders had a name, which its fingerprint lacks."""
    out = str(tmp_path / "out")
    made = claim(model, long_text="split", split=Split(max_tokens=20))
    recorded = {**made.recipes["document"], "split": {"max_tokens": 20}}
    put_claim(out, replace(made, fingerprint="0" * 64, recipes={"document": recorded}))
    with pytest.raises(OutputError, match="long_text: split ends passages at other sentences"):
        Encoder.from_output(out)


def test_an_output_with_a_special_slot_is_queried_with_one(model: Path, tmp_path: Path) -> None:
    """A job of today has another slot under this tokenizer, and is another recipe."""
    knobs = {
        "interventions": (Prepending(prepend=Prepend(slot="<PST>", start=0, exit=1)),),
        "templates": ('A text : <PST> "{text}" means',),
        "span": "last_token",
    }
    kept = claim(model, **knobs)
    for recipe in kept.recipes.values():
        assert not recipe["interventions"][0]["prepend"].pop("normalized")
    put_claim(str(tmp_path / "out"), kept)
    found = Encoder.from_output(str(tmp_path / "out"), device="cpu").encode(["a fox"])
    then = recipes(model)["document"].model_copy(update=knobs)
    assert np.array_equal(found, Encoder.from_recipe(then, device="cpu").encode(["a fox"]))
    now = as_normalized(then, read_tokenizer(model))
    assert fingerprint(now, kept.digests) != kept.fingerprint == fingerprint(then, kept.digests)
    assert not np.allclose(found, Encoder.from_recipe(now, device="cpu").encode(["a fox"]))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "ubinary", "float16"])
def test_queries_are_floats_unless_they_are_asked_for_as_the_output_stores_them(
    model: Path, tmp_path: Path, dtype: str
) -> None:
    out = str(tmp_path / "out")
    ranges_2D = np.array([[-0.2] * 32, [0.2] * 32], np.float32)
    calibration = Calibration.of(ranges_2D, vectors=9) if dtype in CALIBRATED else None
    put_claim(out, replace(claim(model, vector_dtype=dtype), calibration=calibration))
    encoder = Encoder.from_output(out, device="cpu")
    plain = encoder.encode(["a fox", "a river"], role="query")
    assert (plain.dtype, plain.shape) == (np.float32, (2, 32))
    stored = encoder.encode_stored(["a fox", "a river"], role="query")
    expected = quantize(plain, dtype, ranges_2D=ranges_2D)
    assert stored.dtype == expected.dtype != np.float32
    assert np.array_equal(stored, expected)


def test_without_an_output_there_are_no_ranges_to_store_by(model: Path) -> None:
    recipe = recipes(model)["document"].model_copy(update={"vector_dtype": "int8"})
    encoder = Encoder.from_recipe(recipe, device="cpu")
    with pytest.raises(ConfigError, match=r"int8 needs .*from_output"):
        encoder.encode_stored(["a fox"])
    encoder.ranges = ranges_of(encoder.encode(["a fox", "a river"]))
    assert encoder.encode_stored(["a fox"]).dtype == np.int8


def test_of_two_recipes_the_published_one_counts(model: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    put_claim(out, claim(model))
    later = put_claim(out, claim(model, layer=1), new_fingerprint=True)
    assert Encoder.from_output(out, device="cpu").recipe.layer == -1
    publish(out, Snapshot(epoch=1, fingerprint=later.fingerprint, files=FileList.of(()), shards=()))
    assert Encoder.from_output(out, device="cpu").recipe.layer == 1


def test_a_published_recipe_without_its_claim_is_no_other_recipe(
    model: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    put_claim(out, claim(model))
    later = put_claim(out, claim(model, layer=1), new_fingerprint=True)
    publish(out, Snapshot(epoch=1, fingerprint=later.fingerprint, files=FileList.of(()), shards=()))
    for path in (tmp_path / "out" / "claims").iterdir():
        path.unlink()
    with pytest.raises(OutputError, match=rf"fingerprint {later.fingerprint}.*deleted"):
        Encoder.from_output(out, device="cpu")


def test_another_model_in_the_same_place_is_refused(model: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    put_claim(out, claim(model))
    moved = model.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match="does not exist"):
        Encoder.from_output(out)
    tiny.save("qwen3", model)
    with pytest.raises(ModelError, match=r"is not the model that wrote .*safetensors"):
        Encoder.from_output(out)
    assert Encoder.from_output(out, model=str(moved)).encode(["a"]).shape == (1, 32)


def test_code_that_comes_with_the_model_runs_only_if_the_caller_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever writes an output names a model folder of their own, and trusts it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    ran = tmp_path / "ran"
    (model / "theirs.py").write_text(
        f"from transformers import LlamaConfig, LlamaModel\nopen({str(ran)!r}, 'w').close()\n"
        "class Config(LlamaConfig): pass\nclass Model(LlamaModel): config_class = Config\n"
    )
    config = json.loads((model / "config.json").read_text())
    named = {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model"}
    (model / "config.json").write_text(json.dumps({**config, "auto_map": named}))
    out = str(tmp_path / "out")
    put_claim(out, claim(model, trust_remote_code=True))
    with pytest.raises(ModelError, match=r"trust_remote_code: true.*pass trust_remote_code=True"):
        Encoder.from_output(out, allow_pickle=True)
    assert not ran.exists()
    encoder = Encoder.from_output(out, trust_remote_code=True, device="cpu")
    assert ran.exists()
    assert encoder.encode(["a"]).shape == (1, 32)


def test_pickled_weights_are_read_only_if_the_caller_says_so(model: Path, tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    torch.save(load_file(weights), model / "pytorch_model.bin")
    weights.unlink()
    pickled = replace(source_of(recipes(model)["document"]), allow_pickle=True)
    found = file_digests(pickled)
    out = str(tmp_path / "out")
    put_claim(out, claim(model, found, allow_pickle=True))
    with pytest.raises(ModelError, match=r"allow_pickle: true.*pass allow_pickle=True"):
        Encoder.from_output(out, trust_remote_code=True)
    encoder = Encoder.from_output(out, allow_pickle=True, device="cpu")
    assert encoder.encode(["a"]).shape == (1, 32)


def test_a_callers_permission_adds_none_that_the_job_did_not_give(
    model: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    put_claim(out, claim(model))
    recipe = Encoder.from_output(out, trust_remote_code=True, allow_pickle=True).recipe
    assert (recipe.trust_remote_code, recipe.allow_pickle) == (False, False)


def test_a_place_without_a_recipe_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no _embedjob\.json"):
        Encoder.from_output(str(tmp_path / "nothing"))
    out = str(tmp_path / "out")
    put_claim(out, replace(claim(model), fingerprint="0" * 64))
    with pytest.raises(OutputError, match="was it edited"):
        Encoder.from_output(out)
