"""A job that does not fit its world: one readable message, exit 2, in seconds, and no model.

Covers: embedjob.cli
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import running
from tests.cluster import ROOT, Cluster
from tests.connection import NOWHERE
from tests.running import Job, job_file, texts, write_shard

Change = dict[str, dict[str, Any]]
SECONDS = 10.0

# What is changed in a job that would run, and the words that the message must have.
REFUSALS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "a wrong key": (
        {"encoder": {"poolng": "max"}},
        ("encoder.poolng", "unknown key", "did you mean pooling?"),
    ),
    "a wrong section": ({"encodr": {"model": "x"}}, ("encodr", "encoder")),
    "a value of another type": (
        {"output": {"chunk_rows": "10"}},
        ("output.chunk_rows", 'got "10"', "integer"),
    ),
    "a value out of range": ({"run": {"max_quarantined": 2}}, ("run.max_quarantined", "got 2")),
    "keys that do not go together": (
        {"encoder": {"long_text": "late_chunk", "span": "last_token"}},
        ("encoder: span: got last_token", "late_chunk", "allowed is all, text, from_text"),
    ),
    "vectors of an output that has none": (
        {"output": {"reuse_from": ["{folder}/other"]}},
        ("output.reuse_from", "other has no snapshot", "Leave this output out"),
    ),
    "a fit that nobody makes": (
        {"encoder": {"finish": [{"whiten": "w"}]}},
        ("encoder.finish: whiten: got w", "fit: makes none"),
    ),
    "an unset variable": (
        {"input": {"path": "${EMBEDJOB_TEST_UNSET}/docs"}},
        ("input.path", "EMBEDJOB_TEST_UNSET", "not set"),
    ),
    "a missing text column": ({"input": {"text": "abstract"}}, ("'abstract'", "doc_id", "body")),
    "a missing kept column": ({"input": {"keep": ["lang"]}}, ("'lang'", "there are")),
    "a missing id column": ({"input": {"id": "uuid"}}, ("'uuid'", "there are")),
    "a text column of integers": ({"input": {"text": "stars"}}, ("'stars'", "int64", "string")),
    "a kept column that collides": (
        {"input": {"keep": ["row"]}},
        ("input.keep", "row would collide"),
    ),
    "a filter that fits no column": (
        {"input": {"filter": [["stars", ">", "many"]]}},
        ("filter", "got 'many' for 'stars', which is int64"),
    ),
    "a filter of another shape": ({"input": {"filter": ["stars"]}}, ("input.filter", "operators")),
    "no input": ({"input": {"path": "{folder}/nowhere"}}, ("input.path", "nowhere")),
    "an empty folder": ({"input": {"path": "{folder}/empty"}}, ("input.path", "empty")),
    "input that is not Parquet": (
        {"input": {"path": "{folder}/job.yaml"}},
        ("input.path", "Parquet"),
    ),
    "an unknown method": ({"encoder": {"method": "promteol"}}, ("promteol", "prompteol")),
    "no model there": ({"encoder": {"model": "{folder}/nowhere"}}, ("encoder.model", "nowhere")),
    "a model without weights": ({"encoder": {"model": "{folder}/light"}}, ("weights", "light")),
    "a package that is not installed": (
        {"encoder": {"model": "package:no_such_package/model"}},
        ("no_such_package",),
    ),
    "a layer that the model lacks": ({"encoder": {"layer": 9}}, ("encoder.layer", "got 9")),
    "a template without a slot": (
        {"encoder": {"templates": ["passage:"]}},
        ("encoder.templates", "{text}"),
    ),
    "a template without room": (
        {"encoder": {"max_tokens": 4}},
        ("encoder.max_tokens", "got 4"),
    ),
    "an output that cannot be made": (
        {"output": {"path": "{folder}/job.yaml/out"}},
        ("job.yaml/out",),
    ),
}

PROGRAM = """
import contextlib, io, json, sys, time
import embedjob.pipeline
from embedjob.cli import main
ended = {}
for name, path in json.loads(sys.argv[1]).items():
    err, started = io.StringIO(), time.monotonic()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = main(["run", path, "--address", sys.argv[2]])
    ended[name] = [code, err.getvalue(), time.monotonic() - started]
import ray
loaded = [name for name in ("transformers", "safetensors.torch") if name in sys.modules]
print(json.dumps({"ended": ended, "loaded": loaded, "ray": ray.is_initialized()}))
"""


def _filled(value: Any, folder: Path) -> Any:
    """The value with `{folder}` in its strings replaced."""
    return json.loads(json.dumps(value).replace("{folder}", str(folder)))


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of strings and integers, a model without weights, an empty folder."""
    made = tmp_path_factory.mktemp("refusals")
    write_shard(made / "in" / "a.parquet", texts(30), stars=list(range(30)))
    (made / "empty").mkdir()
    (made / "light").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (made / "light" / name).write_bytes((model / name).read_bytes())
    job_file(_job(made, model), made)
    return made


def _job(folder: Path, model: Path, **changes: Job) -> Job:
    return running.job(folder / "in", folder / "out", model, **changes)


@pytest.fixture(scope="module")
def refused(folder: Path, model: Path) -> dict[str, Any]:
    """Every refusal, one after the other in one fresh process."""
    paths = {}
    for number, (name, (change, _)) in enumerate(REFUSALS.items()):
        place = folder / f"job-{number}"
        place.mkdir()
        paths[name] = str(job_file(_job(folder, model, **_filled(change, folder)), place))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(paths), NOWHERE],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.mark.parametrize("name", REFUSALS)
def test_it_is_refused_in_one_message(name: str, refused: dict[str, Any]) -> None:
    code, said, seconds = refused["ended"][name]
    assert code == 2, said
    assert said.startswith("embedjob: ")
    assert "Traceback" not in said
    assert len(said) < 1000
    assert [word for word in REFUSALS[name][1] if word not in said] == []
    assert seconds < SECONDS


def test_nothing_heavy_was_loaded_for_it(refused: dict[str, Any], folder: Path) -> None:
    assert refused["loaded"] == []
    assert refused["ray"] is False
    assert not (folder / "out" / "data").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run"], "JOB.yaml"),
        (["run", "{folder}/job.yaml", "--no-such-option"], "--no-such-option"),
        (["runn"], "runn"),
        (["run", "{folder}/missing.yaml"], "cannot be read"),
        (["run", "{folder}/in/a.parquet"], "is not"),
        (["run", "{folder}/job.yaml", "--set", "encoder"], "SECTION.KEY=VALUE"),
        (["run", "{folder}/job.yaml", "--set", "encoder.pooling=men"], "encoder.pooling"),
        (["verify", "{folder}/empty"], "_embedjob.json"),
        (["prune", "{folder}/empty"], "no snapshot"),
        (["prune", "{folder}/empty", "--grace", "tomorrow"], "--grace: got tomorrow; allowed is"),
        (["methods", "promteol"], "prompteol"),
    ],
)
def test_a_command_that_cannot_be_meant(
    arguments: list[str], words: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ran = running.command(*_filled(arguments, folder))
    said = ran.err + capfd.readouterr().err
    assert (ran.code, words in said, "Traceback" in said) == (2, True, False), said


@pytest.mark.ray
@pytest.mark.parametrize(
    ("pool", "words"),
    [
        ({"gpus_per_actor": 1}, ("1 GPUs", "no node has that")),
        pytest.param(
            {"cpus_per_actor": 64},
            ("64 CPUs", "no node has that", "2 CPU"),
            marks=pytest.mark.slow,
        ),
        pytest.param({"actors": 50}, ("pool.actors", "2 CPU"), marks=pytest.mark.slow),
        ({"actors": 1, "cpus_per_actor": 2}, ("beside 1 CPU to read with",)),
    ],
)
def test_a_pool_that_no_node_could_ever_satisfy(
    pool: dict[str, Any], words: tuple[str, ...], folder: Path, model: Path, cluster: Cluster
) -> None:
    place = folder / f"pool-{len(list(folder.iterdir()))}"
    place.mkdir()
    document = _job(folder, model, pool=pool, output={"chunk_rows": 1})
    ran = running.run(document, place, "--address", cluster.address)
    assert ran.code == 2, ran.err
    assert [word for word in words if word not in ran.err] == []
    assert "Traceback" not in ran.err
    assert "progress:" not in ran.err
