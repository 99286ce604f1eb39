from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from embedjob.config.job import Input
from embedjob.errors import InputChangedError
from embedjob.input.chunks import Chunk, Shard
from embedjob.input.reading import read_chunk
from embedjob.stages.chunk_state import from_block
from embedjob.stages.ledger import MAX_ATTEMPTS, new_ledger
from embedjob.stages.read import ChunkSource, read, read_state
from embedjob.storage import objects
from tests.faulty_s3 import faulty_s3
from tests.seaweed import S3Server
from tests.shards import plan_of, write_shard

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("joined")]


def chunk(number: int) -> Chunk:
    shard = Shard(f"in/{number}.parquet", 10, "etag")
    return Chunk(shard, 0, 10, (0, 1), 0, f"{number}.parquet", 30, 100)


CHUNKS = [chunk(number) for number in range(5)]


def rows_of(part: Chunk) -> pa.Table:
    if part.key == "3.parquet":
        raise InputChangedError("it was replaced")
    return pa.table({"row": pa.array(range(10), pa.uint32()), "text": [part.key] * 10})


@pytest.fixture
def ledger() -> Any:
    return new_ledger()


def test_every_chunk_is_one_state_and_a_failed_one_is_a_value(ledger: Any) -> None:
    # Sent by value: a worker cannot import a test module by the name that pytest gives it.
    ray.cloudpickle.register_pickle_by_value(__import__("sys").modules[__name__])
    blocks = read(CHUNKS, rows_of, ledger=ledger).to_arrow_refs()
    states = [state for block in ray.get(blocks) for state in from_block(block)]
    # Ray Data hands blocks on as their tasks end, in no order.
    assert sorted(state.chunk.key for state in states) == [c.key for c in CHUNKS]
    assert {state.chunk for state in states} == set(CHUNKS)
    for state in states:
        if state.chunk.key == "3.parquet":
            assert (state.rows, state.failure.detail) == (None, "it was replaced")
        else:
            assert state.rows["text"].to_pylist() == [state.chunk.key] * 10
            assert state.stats["rows"] == 10


def test_there_is_one_task_per_chunk_whatever_is_asked(ledger: Any) -> None:
    source = ChunkSource(CHUNKS, rows_of, ledger)
    tasks = source.get_read_tasks(parallelism=2)
    assert [task.metadata.input_files[0] for task in tasks] == [c.shard.url for c in CHUNKS]
    assert source.estimate_inmemory_data_size() == 150


def test_a_chunk_is_given_up_after_so_many_attempts(ledger: Any) -> None:
    tried = [read_state(chunk(0), rows_of, ledger) for _ in range(MAX_ATTEMPTS + 1)]
    assert [state.failure is None for state in tried] == [*([True] * MAX_ATTEMPTS), False]
    assert tried[-1].failure.kind == "fault"
    assert f"died {MAX_ATTEMPTS} times" in tried[-1].failure.detail


def test_nothing_is_read_once_the_run_is_stopping(ledger: Any) -> None:
    ray.get(ledger.stop.remote("SIGTERM"))
    state = read_state(chunk(0), pytest.fail, ledger)
    assert (state.rows, state.failure.kind) == (None, "abandoned")


@pytest.mark.parametrize("fault", ["busy", "half"])
def test_a_read_that_storage_cuts_off_begins_anew(
    ledger: Any,
    s3: S3Server,
    bucket: str,
    tmp_path: Path,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_shard(tmp_path / "a.parquet", {"t": [f"text {i}" for i in range(100)]})
    with faulty_s3(s3) as (faulty, endpoint):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        objects.create(f"{bucket}/a.parquet", (tmp_path / "a.parquet").read_bytes())
        job_input = Input(path=f"{bucket}/a.parquet", text="t")
        [part] = plan_of(job_input, chunk_rows=1000).chunks
        # More than the client tries by itself.
        faulty.fail(fault, times=8, method="GET")
        state = read_state(part, partial(read_chunk, job_input=job_input), ledger)
        assert [failed for *_, failed in faulty.asked].count(fault) == 8
    assert state.failure is None
    assert state.rows["text"].to_pylist() == [f"text {i}" for i in range(100)]
