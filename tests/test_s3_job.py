"""The whole job against a real S3 server: input, model and output in buckets."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray._private.state import state

from embedjob.config.job import Job as JobConfig
from embedjob.encoder.encoder import Encoder
from embedjob.job.options import Options
from embedjob.job.planning import plan_job
from embedjob.output import lease
from embedjob.output.snapshot import newest_snapshot, open_snapshot
from embedjob.stages.engine import Engine, recipe_engine
from embedjob.storage import objects
from tests import running
from tests.cluster import ROOT, Cluster
from tests.connection import NOWHERE, join_for
from tests.outputs import written
from tests.running import Job, JobSource, Layer, Ran, job_file, save_slow_model, texts
from tests.seaweed import S3Server

pytestmark = pytest.mark.ray
MANY = 2000
HUB_TOKEN = "hf_plantedInTheDriversEnvironment"


def parquet(bodies: list[str], *, stem: str = "") -> bytes:
    sink = pa.BufferOutputStream()
    ids = [f"{stem}{i}" for i in range(len(bodies))]
    pq.write_table(pa.table({"doc_id": ids, "body": bodies}), sink, row_group_size=10)
    return sink.getvalue().to_pybytes()


def put_folder(folder: Path, url: str) -> str:
    for path in folder.iterdir():
        objects.create(objects.join(url, path.name), path.read_bytes())
    return url


@dataclass(frozen=True)
class Done:
    """A job that was run, in one bucket."""

    bucket: str
    document: Job
    bodies: list[str]
    ran: Ran

    @property
    def out(self) -> str:
        out: str = self.document["output"]["path"]
        return out


@pytest.fixture(scope="module")
def done(
    s3: S3Server, cluster: Cluster, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Done:
    bucket = s3.make_bucket("the-whole-job")
    bodies = texts(60)
    for shard in range(3):
        content = parquet(bodies[20 * shard : 20 * shard + 20], stem=f"{shard}-")
        objects.create(f"{bucket}/docs/lang=en/{shard}.parquet", content)
    document = running.job(
        f"{bucket}/docs/",
        f"{bucket}/out",
        put_folder(model, f"{bucket}/model"),
        input={"keep": ["lang"]},
    )
    folder = tmp_path_factory.mktemp("job")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", HUB_TOKEN)
        ran = running.run(document, folder, "--address", cluster.address)
    return Done(bucket, document, bodies, ran)


def test_a_run_from_bucket_to_bucket(done: Done) -> None:
    assert done.ran.code == 0, done.ran.err
    table = open_snapshot(done.out).to_table()
    assert table["id"].to_pylist() == [f"{i // 20}-{i % 20}" for i in range(60)]
    assert set(table["lang"].to_pylist()) == {"en"}
    vectors = np.stack(table["embedding"].to_pylist())
    alone = Encoder.from_output(done.out).encode(done.bodies)
    assert np.einsum("rd,rd->r", vectors, alone).min() >= 0.99999
    ran = running.command("verify", done.out, "--json")
    assert (ran.code, ran.summary["problems"]) == (0, [])


@pytest.mark.slow
def test_it_resumes_with_what_is_left(done: Done, cluster: Cluster, tmp_path: Path) -> None:
    before = written(done.out)
    assert len(before) == 6
    lost = sorted(before)[2]
    found = newest_snapshot(done.out)
    objects.delete(f"{done.out}/data/{found.fingerprint[:12]}/{lost}")
    ran = running.run(done.document, tmp_path, "--address", cluster.address)
    assert ran.code == 0, ran.err
    assert (ran.summary["chunks_done_before"], ran.summary["chunks_written"]) == (5, 1)
    after = written(done.out)
    assert {name: after[name] for name in before if name != lost} == {
        name: etag for name, etag in before.items() if name != lost
    }
    assert open_snapshot(done.out).count_rows() == 60
    again = running.run(done.document, tmp_path, "--address", NOWHERE)
    assert (again.code, again.summary["chunks_written"]) == (0, 0)


def test_an_unchanged_night_opens_no_shard_and_asks_little(done: Done, tmp_path: Path) -> None:
    """A page of each listing, and at most ten requests more; those for the model are apart."""
    asked: list[str] = []

    def count(params: dict[str, str], **_: object) -> None:
        asked.append(f"{params['method']} {params['url']}")

    events = objects.locate(done.out)[0].fs.s3.meta.events
    events.register("before-call.s3", count)
    try:
        ran = running.run(done.document, tmp_path, "--address", NOWHERE)
    finally:
        events.unregister("before-call.s3", count)
    assert (ran.code, ran.summary["chunks_planned"], ran.summary["chunks_written"]) == (0, 6, 0)
    assert [one for one in asked if ".parquet" in one and "/docs/" in one] == []
    ours = [one for one in asked if "model" not in one]
    others = [one for one in ours if "list-type=2" not in one]
    assert len(others) <= 10, others
    assert len(ours) - len(others) <= 10, ours


def test_no_credential_is_anywhere(done: Done, s3: S3Server, cluster: Cluster) -> None:
    secrets = [s3.secret_key.encode(), s3.access_key.encode(), HUB_TOKEN.encode()]

    def clean(content: bytes) -> bool:
        return not any(secret in content for secret in secrets)

    files = objects.list_files(done.out)
    assert len(files) >= 6
    assert [file.url for file in files if not clean(objects.read_bytes(file.url))] == []
    assert clean((done.ran.out + done.ran.err).encode())
    logs = [path for path in cluster.log.parent.glob("session_2*/logs/**/*") if path.is_file()]
    assert len(logs) > 5
    assert [path for path in logs if not clean(path.read_bytes())] == []
    join_for(cluster.address)
    jobs = state.job_table()
    assert jobs
    assert clean(json.dumps(jobs, default=str).encode())


@pytest.mark.slow
def test_a_replaced_object_is_a_fault_and_the_next_run_takes_it(
    bucket: str, cluster: Cluster, model: Path, tmp_path: Path
) -> None:
    for shard in range(3):
        objects.create(f"{bucket}/in/{shard}.parquet", parquet(texts(10, seed=shard)))
    document = running.job(f"{bucket}/in", f"{bucket}/out", model)
    victim = f"{bucket}/in/1.parquet"

    def engine_of(config: JobConfig, threads: int) -> Engine:
        # The plan is made by now, and nothing is read yet.
        objects.replace(victim, parquet(texts(7, seed=8)))
        return recipe_engine(config, threads)

    result = running.run_with(document, Options(address=cluster.address), engine_of)
    assert (len(result.faults), result.summary.chunks_written) == (1, 2)
    assert victim in result.faults[0]
    assert "it was replaced or removed" in result.faults[0]
    assert newest_snapshot(f"{bucket}/out") is None
    ran = running.run(document, tmp_path, "--address", cluster.address)
    assert ran.code == 0, ran.err
    assert (ran.summary["chunks_done_before"], ran.summary["chunks_written"]) == (2, 1)
    assert open_snapshot(f"{bucket}/out").count_rows() == 27


@pytest.mark.slow
def test_all_of_two_thousand_objects_are_seen(
    bucket: str, cluster: Cluster, model: Path, tmp_path: Path
) -> None:
    content = parquet(texts(3))

    def put(number: int) -> None:
        objects.create(f"{bucket}/many/{number // 100}/{number}.parquet", content)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(put, range(MANY)))
    document = running.job(f"{bucket}/many/*/*.parquet", f"{bucket}/out", model)
    plan = plan_job(JobSource((Layer("job.yaml", document),)))
    assert (len(plan.shards), len(plan.chunks), plan.rows) == (MANY, MANY, 3 * MANY)
    assert plan.faults == ()
    document["run"]["limit"] = 20
    ran = running.run(document, tmp_path, "--address", cluster.address)
    assert ran.code == 0, ran.err
    assert (ran.summary["rows"], ran.summary["chunks_written"]) == (20, 7)
    assert open_snapshot(f"{bucket}/out").count_rows() == 20


@pytest.mark.slow
def test_of_two_runs_at_once_one_wins_and_the_other_names_it(
    bucket: str, cluster: Cluster, tmp_path: Path
) -> None:
    bodies = [f"{text} {text} {text}" for text in texts(600)]
    objects.create(f"{bucket}/in/a.parquet", parquet(bodies))
    slow = save_slow_model(tmp_path / "model")
    document = running.job(f"{bucket}/in", f"{bucket}/out", slow, encoder={"max_tokens": 72})
    command = [sys.executable, "-m", "embedjob", "run", str(job_file(document, tmp_path))]
    with (tmp_path / "log").open("wb") as log:
        holder = subprocess.Popen(
            [*command, "--address", cluster.address],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    try:
        _until(lambda: lease.newest_lease(f"{bucket}/out"), holder)
        ran = running.run(document, tmp_path, "--address", cluster.address)
        assert ran.code == 1, ran.err
        for word in (
            "is held by another run",
            f"process {holder.pid}",
            f"{bucket}/out",
            "takeover",
        ):
            assert word in ran.err
        assert holder.wait(120) == 0, (tmp_path / "log").read_text()
    finally:
        holder.kill()
        holder.wait()
    assert open_snapshot(f"{bucket}/out").count_rows() == 600
    assert len(written(f"{bucket}/out")) == 60


def _until(found: Callable[[], object], process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)


WRONG = {
    "a wrong secret": {"AWS_SECRET_ACCESS_KEY": "an-utterly-wrong-secret"},
    "an unknown key": {"AWS_ACCESS_KEY_ID": "an-unknown-access-key"},
}


class TestWrongCredentials:
    @pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
    def test_of_the_driver(
        self, wrong: dict[str, str], done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in wrong.items():
            monkeypatch.setenv(name, value)
        started = time.monotonic()
        ran = running.run(done.document, tmp_path, "--address", NOWHERE)
        assert time.monotonic() - started < 10
        self._require(ran, wrong)

    def test_of_a_driver_of_its_own(self, done: Done, tmp_path: Path) -> None:
        wrong = WRONG["a wrong secret"]
        command = [sys.executable, "-m", "embedjob", "run", str(job_file(done.document, tmp_path))]
        ended = subprocess.run(
            command,
            env={**os.environ, **wrong, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        self._require(Ran(ended.returncode, ended.stdout, ended.stderr), wrong)

    def test_of_the_workers_are_told_before_a_model_is_loaded(
        self, done: Done, dashboard_cluster: Cluster, bucket: str, tmp_path: Path
    ) -> None:
        document = {**done.document, "output": {"path": f"{bucket}/out", "chunk_rows": 10}}
        ran = running.run(document, tmp_path, "--address", dashboard_cluster.address)
        self._require(ran, {})
        assert "progress:" not in ran.err
        assert written(f"{bucket}/out") == {}

    def _require(self, ran: Ran, wrong: dict[str, str]) -> None:
        assert ran.code == 2, ran.err
        assert "s3://" in ran.err
        assert "credentials" in ran.err
        assert "Traceback" not in ran.err
        told = [line for line in ran.err.splitlines() if line.startswith("embedjob: ")]
        assert len(told) == 1
        secrets = [os.environ["AWS_SECRET_ACCESS_KEY"], *wrong.values()]
        assert not [secret for secret in secrets if secret in ran.out + ran.err]
