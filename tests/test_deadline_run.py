"""Nights that end in time: real Ray, a real model that is as slow as it is told, whole runs.

The commands of docs/operations.md ("A deadline") are run as they stand there.
"""

import os
import re
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import embedjob
from embedjob.encoder.encoder import Encoder
from embedjob.output.file_names import parse_name
from embedjob.output.snapshot import newest_snapshot
from embedjob.stages import session
from tests import running
from tests.cluster import Cluster
from tests.engines import slow, texts_encoded
from tests.outputs import published, written
from tests.running import Job, command, job_file, texts, write_shard

pytestmark = pytest.mark.ray
OPERATIONS = Path(__file__).parents[1] / "docs" / "operations.md"
TOKEN_SECONDS = 0.01
# Time for the slowest of starts and some chunks of ten rows; LARGE rows would take twice as long.
SECONDS, LARGE = 500, 8000
IN_HAND_SECONDS = 40.0


def shown() -> list[tuple[list[str], int]]:
    """The commands of the section, with their exit codes."""
    section = OPERATIONS.read_text(encoding="utf-8").split("\n## A deadline\n", 1)[1]
    block = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)[0]
    lines = re.findall(r"^embedjob (.*?) +# exit (\d)", block, re.MULTILINE)
    assert len(lines) == len(block.splitlines())
    return [(line.split(), int(code)) for line, code in lines]


def corpus(folder: Path, model: Path) -> Job:
    """Three new shards of ten rows; an old one of a small chunk and a large one, first by name."""
    old = write_shard(folder / "in" / "a.parquet", ["-"])
    bodies = texts(LARGE + 10, seed=1)
    table = pa.table({"doc_id": [f"a-{i}" for i in range(len(bodies))], "body": bodies})
    with pq.ParquetWriter(old, table.schema) as writer:
        for part in (table[:10], table[10:]):
            writer.write_table(part, row_group_size=LARGE)
    for age, name in enumerate("dcb"):
        path = write_shard(folder / "in" / f"{name}.parquet", texts(10, seed=2 + age))
        os.utime(path, (2 * 10**9 - age, 2 * 10**9 - age))
    os.utime(old, (10**9, 10**9))
    return running.job(folder / "in", folder / "out", model, output={"chunk_rows": 1000})


def rows_by_shard(out: Path) -> dict[str, int]:
    counted = published(out).group_by("shard").aggregate([("row", "count")]).to_pylist()
    return {Path(one["shard"]).stem: one["row_count"] for one in counted}


@pytest.mark.slow
def test_the_commands_shown_publish_what_is_whole_and_go_on(
    tmp_path: Path, model: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, out, log = corpus(tmp_path, model), tmp_path / "out", tmp_path / "encoded"
    job = str(job_file(document, tmp_path))
    names = {chunk.name for chunk in embedjob.plan(job).chunks}
    stands_for = {"JOB.yaml": job, "OUT": str(out), "run.until=06:00": f"run.until={SECONDS}s"}
    (run, *arguments), code = shown()[0]
    with monkeypatch.context() as patch:
        patch.setattr(session, "recipe_engine", slow(TOKEN_SECONDS, log))
        started = time.monotonic()
        words = [stands_for.get(word, word) for word in arguments]
        night = command(run, *words, "--json", "--address", cluster.address)
    assert (night.code, code) == (3, 3), night.err
    # The large chunk would take longer than the night: it is not begun, and nobody waits for it.
    assert time.monotonic() - started < SECONDS
    assert texts_encoded(log) == 40
    assert rows_by_shard(out) == {"b": 10, "c": 10, "d": 10}
    assert (night.summary["chunks_written"], night.summary["chunks_left"]) == (4, 1)
    assert "run.until: the newest shards come first" in night.err
    assert f"left: 1 shard with {LARGE:,} rows ({tmp_path}/in/a.parquet)" in night.err
    files = written(out)
    for (name, *arguments), code in shown()[1:]:
        words = [stands_for.get(word, word) for word in arguments]
        more = ["--json", "--address", cluster.address] if name == "run" else []
        ended = command(name, *words, *more)
        assert ended.code == code, (name, ended.err)
        if name != "run":
            assert written(out) == files
    assert (ended.summary["chunks_written"], ended.summary["chunks_left"]) == (1, 0)
    assert {parse_name(name).chunk for name in written(out)} == names
    assert rows_by_shard(out) == {"a": LARGE + 10, "b": 10, "c": 10, "d": 10}
    _check_vectors(out, tmp_path / "in")


def _check_vectors(out: Path, source: Path) -> None:
    """Each row has the vector of its text, whatever came first."""
    found = published(out).to_pylist()
    bodies = {path.stem: pq.read_table(path)["body"].to_pylist() for path in source.iterdir()}
    rows = [row for row in found if row["row"] < 20]
    made = Encoder.from_output(str(out)).encode(
        [bodies[Path(row["shard"]).stem][row["row"]] for row in rows]
    )
    np.testing.assert_allclose(np.stack([row["embedding"] for row in rows]), made, atol=2e-5)


@pytest.mark.slow
def test_a_start_that_takes_longer_than_the_run_has_is_said(
    tmp_path: Path, model: Path, cluster: Cluster
) -> None:
    write_shard(tmp_path / "in" / "a.parquet", texts(10))
    document = running.job(tmp_path / "in", tmp_path / "out", model, run={"until": "1s"})
    ended = running.run(document, tmp_path, "--address", cluster.address)
    assert ended.code == 3, ended.err
    assert re.search(r"run\.until: (no encoder was ready in time|it came before the)", ended.err)
    assert "nothing new was published: no shard is whole yet" in ended.err
    assert newest_snapshot(str(tmp_path / "out")) is None
    assert ended.summary["chunks_left"] == 1
    del document["run"]["until"]
    assert running.run(document, tmp_path, "--address", cluster.address).code == 0


@pytest.mark.slow
def test_what_is_in_hand_at_the_deadline_is_put_down(
    tmp_path: Path, model: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first chunk, of which nothing is known, begins; it would take minutes."""
    monkeypatch.setattr(session, "recipe_engine", slow(TOKEN_SECONDS, tmp_path / "log"))
    write_shard(tmp_path / "in" / "a.parquet", texts(LARGE), group_rows=LARGE)
    document = running.job(
        tmp_path / "in",
        tmp_path / "out",
        model,
        output={"chunk_rows": LARGE},
        run={"until": f"{IN_HAND_SECONDS}s"},
    )
    started = time.monotonic()
    ended = running.run(document, tmp_path, "--address", cluster.address)
    assert ended.code == 3, ended.err
    assert IN_HAND_SECONDS <= time.monotonic() - started < IN_HAND_SECONDS + 30
    assert texts_encoded(tmp_path / "log") == LARGE
    assert "run.until: no chunk could be done in time (give the run more time" in ended.err
    assert written(tmp_path / "out") == {}


@pytest.mark.slow
def test_a_fit_that_is_not_made_in_time_is_made_by_the_next_run(
    tmp_path: Path, model: Path, cluster: Cluster
) -> None:
    write_shard(tmp_path / "in" / "a.parquet", texts(100))
    fit = {"kind": "whiten", "name": "w", "dimensions": 8, "sample": None}
    document = running.job(tmp_path / "in", tmp_path / "out", model, run={"until": "1s"})
    document["encoder"]["finish"] = [{"whiten": "w"}, {"normalize": True}]
    document["fit"] = [fit]
    ended = running.run(document, tmp_path, "--address", cluster.address)
    assert ended.code == 3, ended.err
    assert "fit: w: its vectors are not whole" in ended.err
    assert written(tmp_path / "out") == {}
    del document["run"]["until"]
    assert running.run(document, tmp_path, "--address", cluster.address).code == 0
    assert rows_by_shard(tmp_path / "out") == {"a": 100}
