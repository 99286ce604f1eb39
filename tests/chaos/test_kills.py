"""Runs that lose a process at any moment, each followed by a plain re-run that ends right."""

import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from embedjob.config.recipe import Recipe
from embedjob.encoder.encoder import Encoder
from embedjob.output import lease
from tests import running
from tests.cluster import Cluster, kill
from tests.drivers import WAIT_SECONDS, Driver, driver, seeds
from tests.outputs import published, written
from tests.running import Job, job_file, texts, write_shard

pytestmark = pytest.mark.ray
SHARDS, SHARD_ROWS, CHUNK_ROWS = 4, 60, 10
CHUNKS = SHARDS * SHARD_ROWS // CHUNK_ROWS
STOP_SECONDS = 30.0
ENCODER, READER = "ray::MapWorker(MapBatches(EncodeActor))", "ray::ReadChunks"


@dataclass(frozen=True)
class Bench:
    """An input, a model, a cluster, and the vectors of an encoder that nobody kills."""

    source: Path
    model: Path
    cluster: Cluster
    reference: np.ndarray


@dataclass(frozen=True)
class Driven(Driver):
    """A job's run, and the cluster that it may have joined."""

    document: Job
    cluster: Cluster

    def until_files(self, count: int) -> None:
        """Return once so many files are there, with work still left."""
        out = self.document["output"]["path"]
        self.until(lambda: len(written(out)) >= count, f"{count} files")
        assert len(written(out)) < CHUNKS, "the run was over before it could be killed"


End = Callable[[Driven], None]


@pytest.fixture(scope="module")
def bench(cluster: Cluster, slow_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The model takes a fifth of a second for a chunk, so that there is a moment to kill at."""
    source = tmp_path_factory.mktemp("in")
    for shard in range(SHARDS):
        bodies = [f"{text} {text} {text}" for text in texts(SHARD_ROWS, seed=shard)]
        write_shard(source / f"{shard}.parquet", bodies)
    section = _document(source, slow_model, Path("-"))["encoder"]
    encoder = Encoder.from_recipe(Recipe.model_validate_json(json.dumps(section)))
    bodies = pq.read_table(source)["body"].to_pylist()
    return Bench(source, slow_model, cluster, encoder.encode(bodies))


def _document(source: Path, model: Path, out: Path) -> Job:
    return running.job(source, out, model, encoder={"max_tokens": 72})


@contextmanager
def driven(bench: Bench, folder: Path, address: str) -> Iterator[Driven]:
    """A run in a process of its own, gone at the end with all that it started."""
    document = _document(bench.source, bench.model, folder / "out")
    options = ("--json", "--address", address)
    with driver(folder, "run", str(job_file(document, folder)), *options) as started:
        yield Driven(started.process, started.log, document, bench.cluster)


def resumed(bench: Bench, folder: Path, before: dict[str, str], *options: str) -> None:
    """What was there is still what it was, the rest is made, and all of it is right."""
    document, out = _document(bench.source, bench.model, folder / "out"), folder / "out"
    standing = written(out)
    assert {name: standing[name] for name in before} == before
    ran = running.run(document, folder, "--address", bench.cluster.address, *options)
    assert ran.code == 0, ran.err
    assert ran.summary["chunks_done_before"] == len(standing)
    assert ran.summary["chunks_written"] == CHUNKS - len(standing)
    after = written(out)
    assert len(after) == CHUNKS
    assert {name: after[name] for name in standing} == standing
    table = published(out)
    assert table["id"].to_pylist() == [
        f"{shard}-{row}" for shard in range(SHARDS) for row in range(SHARD_ROWS)
    ]
    vectors = np.stack(table["embedding"].to_pylist())
    assert np.einsum("rd,rd->r", vectors, bench.reference).min() >= 0.99999
    assert running.command("verify", str(out), "--json").summary["problems"] == []


def interrupted(number: signal.Signals) -> End:
    """The driver ends in time with exit 3, and what it says is true."""

    def interrupt(run: Driven) -> None:
        run.process.send_signal(number)
        assert run.process.wait(STOP_SECONDS) == 3, run.said()
        assert f"stopped by {number.name}" in run.said()
        assert "Traceback" not in run.said()

    return interrupt


def worker_killed(title: str) -> End:
    """One process of the cluster goes; the run goes on to its end."""

    def kill_one(run: Driven) -> None:
        victims: list[psutil.Process] = []

        def find() -> bool:
            victims[:] = _named(run.cluster, title)
            return bool(victims)

        run.until(find, title)
        kill(victims[:1])
        assert run.process.wait(WAIT_SECONDS) == 0, run.said()

    return kill_one


def _named(cluster: Cluster, title: str) -> list[psutil.Process]:
    """The cluster's processes that are now at what the title says."""
    found = []
    for process in cluster.processes():
        try:
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def cluster_killed(run: Driven) -> None:
    """Every process of the driver's own cluster; the driver says so and gives its lease back."""
    kill(psutil.Process(run.process.pid).children(recursive=True))
    assert run.process.wait(WAIT_SECONDS) == 1, run.said()
    assert "the Ray cluster no longer answers" in run.said()
    assert "Traceback" not in run.said()


SIGTERM, SIGINT = interrupted(signal.SIGTERM), interrupted(signal.SIGINT)
READ_WORKER, ENCODE_ACTOR = worker_killed(READER), worker_killed(ENCODER)
ENDS: dict[str, End] = {
    "SIGTERM": SIGTERM,
    "SIGINT": SIGINT,
    "driver": Driver.kill,
    "encode actor": ENCODE_ACTOR,
    "read worker": READ_WORKER,
    "cluster": cluster_killed,
    "driver and cluster": Driver.kill_all,
}
ON_A_CLUSTER_OF_ITS_OWN = ("cluster", "driver and cluster")
LEASE_NOT_RELEASED = ("driver", "driver and cluster")


def _lost(what: str, bench: Bench, folder: Path, *, files: int, pause: float = 0.0) -> None:
    """A run that loses a process at that moment, and the run after it."""
    address = "local" if what in ON_A_CLUSTER_OF_ITS_OWN else bench.cluster.address
    with driven(bench, folder, address) as run:
        # All shards are read early: later there would be no read worker to kill.
        if what != "read worker":
            run.until_files(files)
            time.sleep(pause)
        before = written(folder / "out")
        ENDS[what](run)
    # Nobody waits for the lease of a run that ended by itself.
    resumed(bench, folder, before, *(["--takeover"] if what in LEASE_NOT_RELEASED else []))


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(SIGTERM, id="SIGTERM"),
        pytest.param(SIGINT, id="SIGINT", marks=pytest.mark.chaos),
    ],
)
def test_a_stopped_run_keeps_its_files_and_resumes(stop: End, bench: Bench, tmp_path: Path) -> None:
    with driven(bench, tmp_path, bench.cluster.address) as run:
        run.until_files(1)
        stop(run)
    # The next run does not watch a lease that was given back.
    last = lease.newest_lease(str(tmp_path / "out"))
    assert last is not None
    assert last.released
    # What was in flight may have been all the rest: then the next run has only to publish.
    resumed(bench, tmp_path, written(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["driver", "encode actor", "read worker", "cluster"])
def test_a_run_that_loses_a_process_is_made_whole(what: str, bench: Bench, tmp_path: Path) -> None:
    _lost(what, bench, tmp_path, files=1)


# The four tests before it lose each process once; readers and nodes have three seeds of their own.
@pytest.mark.parametrize("seed", seeds(slow=1))
def test_any_loss_at_any_moment_is_made_whole(seed: int, bench: Bench, tmp_path: Path) -> None:
    chance = random.Random(seed)
    what = chance.choice(sorted(ENDS))
    _lost(what, bench, tmp_path, files=chance.randrange(CHUNKS // 2), pause=chance.random())
