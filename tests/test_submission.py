"""A real submission: `ray job submit` to a cluster with its dashboard, as the README has it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from tests import running
from tests.cluster import ROOT, Cluster, wait
from tests.outputs import published, written
from tests.running import Job, job_file, save_slow_model, texts, write_shard

pytestmark = pytest.mark.ray
SECRET = "the-secret-of-whoever-submits"


def submit(cluster: Cluster, name: str, job: Path, *options: str) -> "subprocess.Popen[str]":
    """`ray job submit`, begun from the checkout."""
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "job", "submit", "--address", cluster.dashboard, "--working-dir", "."]
    entry = ["--", "python", "jobs/embed.py", str(job), "--json"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.Popen(
        [*command, "--submission-id", name, *options, *entry],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**environment, "AWS_SECRET_ACCESS_KEY": SECRET},
    )


def slow_job(folder: Path, rows: int) -> Job:
    bodies = [f"{text} {text} {text}" for text in texts(rows)]
    write_shard(folder / "in" / "a.parquet", bodies)
    model = save_slow_model(folder / "model")
    return running.job(folder / "in", folder / "out", model, encoder={"max_tokens": 72})


@pytest.mark.slow
def test_a_submitted_job_succeeds_and_its_logs_tell_progress(
    dashboard_cluster: Cluster, model: Path, tmp_path: Path
) -> None:
    write_shard(tmp_path / "in" / "a.parquet", texts(40))
    document = running.job(tmp_path / "in", tmp_path / "out", model)
    name = f"test-{os.getpid()}-whole"
    submission = submit(dashboard_cluster, name, job_file(document, tmp_path))
    said, _ = submission.communicate(timeout=200)
    assert submission.returncode == 0, said
    client = JobSubmissionClient(dashboard_cluster.dashboard)
    assert client.get_job_status(name) == JobStatus.SUCCEEDED
    assert published(tmp_path / "out")["row"].to_pylist() == list(range(40))
    logs = client.get_job_logs(name)
    progress = [line for line in logs.splitlines() if line.startswith("progress:")]
    assert "40/40 rows, 4/4 chunks" in progress[-1]
    assert "tokens/s" in progress[-1]
    summary = json.loads(next(line for line in logs.splitlines() if line.startswith('{"rows"')))
    assert (summary["rows"], summary["chunks_written"]) == (40, 4)
    # The submitter's credentials stay with the submitter.
    told = f"{logs}{said}{client.get_job_info(name)}"
    assert "working_dir" in told
    assert SECRET not in told


@pytest.mark.slow
def test_a_stopped_job_is_resumed_by_the_next(dashboard_cluster: Cluster, tmp_path: Path) -> None:
    document = slow_job(tmp_path, 600)
    out, job = tmp_path / "out", job_file(document, tmp_path)
    client = JobSubmissionClient(dashboard_cluster.dashboard)
    first, second = (f"test-{os.getpid()}-{part}" for part in ("first", "second"))
    said, _ = submit(dashboard_cluster, first, job, "--no-wait").communicate(timeout=60)
    assert "submitted successfully" in said
    wait(lambda: written(out), "data files")
    client.stop_job(first)
    wait(lambda: client.get_job_status(first).is_terminal(), "end of the stopped job")
    assert client.get_job_status(first) == JobStatus.STOPPED
    assert "stopped by SIGTERM" in client.get_job_logs(first)
    before = written(out)
    assert 0 < len(before) < 60
    submission = submit(dashboard_cluster, second, job)
    said, _ = submission.communicate(timeout=200)
    assert submission.returncode == 0, said
    assert {name: written(out)[name] for name in before} == before
    assert published(out)["row"].to_pylist() == list(range(600))
    assert f'"chunks_done_before": {len(before)}' in client.get_job_logs(second)
