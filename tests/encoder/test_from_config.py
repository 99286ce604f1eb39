"""Encoders by method name and by an `encoder` section: those of the job with these keys."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from embedjob import Encoder
from embedjob.config.job_file import job_source
from embedjob.errors import ConfigError, RefusedError
from embedjob.job.resolve import identify, resolve
from tests.encoder import tiny
from tests.shards import write_shard

TEXTS = ["a fox", "the quick brown fox jumps", "How do I reset my password?"]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMBEDJOB_CACHE", str(tmp_path / "cache"))
    return tiny.save("llama", tmp_path / "model")


def of_job(tmp_path: Path, encoder: dict[str, Any]) -> Encoder:
    """The encoder that a job with these keys runs on a CPU."""
    write_shard(tmp_path / "in.parquet", {"t": ["a"]})
    job = {
        "input": {"path": str(tmp_path / "in.parquet"), "text": "t"},
        "encoder": encoder,
        "pool": {"gpus_per_actor": 0},
        "output": {"path": str(tmp_path / "out")},
    }
    found = identify(resolve(job_source(job)))
    return Encoder.from_recipe(found.config.encoder, recipes=found.recipes, device="cpu")


@pytest.mark.parametrize("method", ["prompteol", "echo", "text_first_views"])
def test_a_method_gives_the_vectors_of_a_job_that_names_it(
    method: str, model: Path, tmp_path: Path
) -> None:
    keys = {"max_tokens": 40}
    encoder = Encoder.from_method(method, model=str(model), device="cpu", **keys)
    job = of_job(tmp_path, {"method": method, "model": str(model), **keys})
    assert np.array_equal(encoder.encode(TEXTS), job.encode(TEXTS))
    # And they are the method's: a plain mean of the states gives others.
    plain = Encoder.from_config({"model": str(model), **keys}, device="cpu")
    assert not np.allclose(plain.encode(TEXTS), encoder.encode(TEXTS), atol=1e-3)


def test_given_keys_win_over_the_method_and_it_over_the_models_folder(
    tmp_path: Path, model: Path
) -> None:
    (model / "modules.json").write_text(
        json.dumps(
            [
                {"name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
                {"name": "1", "path": "1", "type": "sentence_transformers.models.Pooling"},
            ]
        )
    )
    (model / "1").mkdir()
    (model / "1" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    folder = Encoder.from_config({"model": str(model), "max_tokens": 40}, device="cpu").recipe
    method = {
        "summary": "a test",
        "citation": {"authors": "A", "title": "T", "year": 2026},
        "good_for": "tests",
        "licence": "none",
        "model": str(model),
        "forward_tokens": "text",
        "encoder": {"span": "last_token", "max_tokens": 32},
        "roles": {"query": {"templates": ["query: {text}"]}},
    }
    path = tmp_path / "method.yaml"
    path.write_text(yaml.safe_dump(method))
    encoder = Encoder.from_method(str(path), device="cpu", max_tokens=24)
    assert (folder.max_tokens, folder.span) == (40, "all")
    assert (encoder.recipe.max_tokens, encoder.recipe.span) == (24, "last_token")
    job = of_job(tmp_path, {"method": str(path), "max_tokens": 24})
    for role in ("document", "query", "symmetric"):
        assert np.array_equal(encoder.encode(TEXTS, role=role), job.encode(TEXTS, role=role))
    one, other = (encoder.encode(TEXTS, role=role) for role in ("document", "query"))
    assert not np.allclose(one, other, atol=1e-3)


def test_the_dtype_is_that_of_the_device(model: Path) -> None:
    encoder = Encoder.from_config({"model": str(model), "max_tokens": 24}, device="cpu")
    assert encoder.recipe.dtype == "float32"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"pooling": "men"}, r"encoder\.pooling: got \"men\""),
        ({"polling": "mean"}, r"encoder\.polling: unknown key.*did you mean pooling"),
        ({"method": "promteol"}, "prompteol"),
        ({"instruction": "Find"}, r"encoder\.instruction: is set, but no template"),
        ({"layer": 9}, r"encoder\.layer: got 9"),
    ],
)
def test_what_a_job_would_be_refused_for_is_refused(
    section: dict[str, Any], message: str, model: Path
) -> None:
    with pytest.raises(RefusedError, match=message):
        Encoder.from_config({"model": str(model), **section}, device="cpu")


def test_a_model_or_a_method_with_one_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"encoder\.model: is required"):
        Encoder.from_config({"pooling": "mean"}, device="cpu")
