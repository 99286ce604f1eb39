"""What is known of a job before any weights are loaded."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from embedjob.config.job_file import JobSource, Layer, read_job
from embedjob.encoder.encoder import Encoder
from embedjob.errors import ConfigError, ModelError
from embedjob.job.resolve import IdentifiedJob, identify, resolve
from embedjob.models import architecture
from embedjob.stages.engine import RecipeEngine, recipe_engine
from tests.encoder import tiny
from tests.encoder.adapting import save_adapter
from tests.running import Job, job


def source_of(tmp_path: Path, dense: dict[str, Any], **encoder: Any) -> JobSource:
    folder = tiny.save("bert", tmp_path / "bert")
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "config.json").write_text(json.dumps(dense))
    (folder / "2_Dense" / "model.safetensors").write_bytes(b"read by nobody yet")
    pq.write_table(pa.table({"body": ["a fox", "a dog"]}), tmp_path / "in.parquet")
    document = {
        "input": {"path": str(tmp_path / "in.parquet"), "text": "body"},
        "encoder": {"model": str(folder), "heads": [{"dense": "2_Dense"}], **encoder},
        "pool": {"gpus_per_actor": 0},
        "output": {"path": str(tmp_path / "out")},
    }
    return JobSource((Layer("job.yaml", document),))


def test_weights_that_cannot_be_quantised_here_are_told_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(tmp_path, {"in_features": 32, "out_features": 12}, quantize="int8")
    identify(resolve(source))
    monkeypatch.setattr(architecture, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="got int8, which needs torchao"):
        identify(resolve(source))


@pytest.mark.parametrize(
    ("encoder", "wide_in", "width"),
    [
        ({}, 32, 12),
        ({"pooling": ["first", "mean", "max"]}, 96, 12),
        ({"templates": ["{text}", "x {text}"], "aggregation": "concat"}, 32, 24),
        ({"finish": [{"truncate": 5}]}, 32, 5),
    ],
)
def test_heads_and_poolings_change_the_width_before_a_model_is_loaded(
    encoder: dict[str, Any], wide_in: int, width: int, tmp_path: Path
) -> None:
    dense = {"in_features": wide_in, "out_features": 12}
    found = identify(resolve(source_of(tmp_path, dense, **encoder)))
    assert found.width == width
    assert {"2_Dense/config.json", "2_Dense/model.safetensors"} <= found.digests.keys()


def test_continuations_make_one_number_each(document: Job) -> None:
    heads = [{"continuations": [" a", " b", " c"]}]
    found = identified(document, heads=heads, aggregation="concat", finish=[])
    assert found.width == 3
    with pytest.raises(ConfigError, match=r"heads: continuations are scored .* got aggregation"):
        identified(document, heads=heads)


def test_a_head_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    dense = {"in_features": 64, "out_features": 12}
    with pytest.raises(ModelError, match="takes vectors 64 wide, but they are 32 wide there"):
        identify(resolve(source_of(tmp_path, dense)))


@pytest.fixture
def document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job of one shard on a model that is an adapter, and one adapter more."""
    monkeypatch.setenv("EMBEDJOB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "in").mkdir()
    table = pa.table({"doc_id": ["a"], "body": ["a fox"]})
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    model = tiny.save("llama", tmp_path / "model")
    save_adapter(model, 1, base_model_name_or_path=str(tiny.save("llama", tmp_path / "base")))
    (model / "model.safetensors").unlink()
    save_adapter(tmp_path / "second", 2)
    encoder = {"adapters": [str(tmp_path / "second")]}
    return job(tmp_path / "in", tmp_path / "out", model, encoder=encoder)


def identified(document: Job, **encoder: Any) -> IdentifiedJob:
    changed = {**document, "encoder": {**document["encoder"], **encoder}}
    return identify(resolve(JobSource((Layer("job", changed),))))


def test_what_a_job_names_is_what_the_actors_load(document: Job, tmp_path: Path) -> None:
    found = identified(document)
    recipe = found.config.encoder
    assert recipe.base == str(tmp_path / "base")
    assert found.model.parameters == tiny.model("llama").num_parameters()
    assert {recipe.adapters for recipe in found.recipes.values()} == {(str(tmp_path / "second"),)}
    sent = type(recipe).model_validate_json(recipe.model_dump_json())
    encoder = Encoder.from_recipe(sent, recipes=found.recipes, device="cpu")
    assert encoder.encode(["a fox"]).shape == (1, found.width)
    assert identified(document, adapters=[]).fingerprint != found.fingerprint


def test_adapters_may_be_named_by_environment_and_commit(
    document: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTERS", str(tmp_path))
    document["encoder"]["adapters"] = ["${ADAPTERS}/second", {"id": "us/x", "revision": "abc"}]
    document["encoder"]["base"] = "${ADAPTERS}/base"
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(document))
    source = read_job(tmp_path / "job.yaml")
    assert source.get("encoder.adapters")[0] == str(tmp_path / "second")
    assert source.get("encoder.base") == str(tmp_path / "base")


@pytest.mark.parametrize("gone", ["second/adapter_model.safetensors", "base/model.safetensors"])
def test_what_is_missing_is_told_before_a_model_is_loaded(
    document: Job, tmp_path: Path, gone: str
) -> None:
    (tmp_path / gone).unlink()
    with pytest.raises(ModelError, match=r"encoder\.(adapters|base): .* has no weights"):
        identified(document)


@pytest.mark.parametrize(("asked", "spread"), [(0, 1), (0.5, 1), (1, 1), (2, 2), (4.0, 4)])
def test_the_engine_spreads_a_model_over_the_gpus_of_its_actor(
    document: Job, asked: float, spread: int
) -> None:
    document["pool"]["gpus_per_actor"] = asked
    engine = recipe_engine(identified(document, dtype="float32").config, threads=1)
    assert isinstance(engine, RecipeEngine)
    assert engine.gpus == spread


def test_where_a_model_is_spread_is_no_part_of_its_fingerprint(document: Job) -> None:
    one = identified(document, dtype="float32")
    document["pool"]["gpus_per_actor"] = 2
    assert identified(document, dtype="float32").fingerprint == one.fingerprint


def test_the_adapters_of_a_method_are_of_its_own_model(document: Job) -> None:
    """A model of the same shape would take them, and be spoilt."""
    del document["encoder"]["adapters"]
    with pytest.raises(ConfigError, match=r"encoder\.adapters: is required .*repllama-v1-7b"):
        identified(document, method="repllama")
    assert identified(document, method="repllama", adapters=[], max_tokens=40).fingerprint
