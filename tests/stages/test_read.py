import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from embedjob.config.job import Input
from embedjob.errors import ChunkError, InputChangedError
from embedjob.input.chunks import PARCEL_TEXT_BYTES, Chunk, Shard
from embedjob.input.reading import read_pass
from embedjob.stages.attempts import begin_attempt
from embedjob.stages.chunk_state import ChunkState, Failure, from_block
from embedjob.stages.ledger import MAX_ATTEMPTS, new_ledger
from embedjob.stages.read import ChunkSource, memory_of, read, read_states
from embedjob.storage import objects
from tests.faulty_s3 import faulty_s3
from tests.seaweed import S3Server
from tests.shards import plan_of, write_shard

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("joined")]


def chunk(number: int) -> Chunk:
    shard = Shard(f"in/{number}.parquet", 10, "etag")
    return Chunk(shard, 0, 10, (0, 1), 0, f"{number}.parquet", 30, 100)


def piece(number: int) -> Chunk:
    """One of several pieces of the second row group of one shard."""
    shard = Shard("in/large.parquet", 10, "etag")
    return Chunk(shard, number * 10, number * 10 + 10, (1, 2), 0, f"piece-{number}", 30, 100)


CHUNKS = [chunk(number) for number in range(5)]
PIECES = [piece(number) for number in range(6)]


def rows_of(chunks: Sequence[Chunk]) -> Iterator[pa.Table]:
    for part in chunks:
        if part.key == "3.parquet":
            raise InputChangedError("it was replaced")
        if part.key in ("piece-3", "11.parquet"):
            os._exit(1)
        if part.key == "piece-1":
            raise ChunkError("a damaged page")
        yield pa.table({"row": pa.array(range(10), pa.uint32()), "text": [part.key] * 10})


@pytest.fixture
def ledger() -> Any:
    # Sent by value: a worker cannot import a test module by the name that pytest gives it.
    ray.cloudpickle.register_pickle_by_value(__import__("sys").modules[__name__])
    return new_ledger()


def then(state: ChunkState, ledger: Any) -> ChunkState:
    """What the same task does next, which ends its process at one chunk."""
    attempt = begin_attempt("tokenize", state.chunk.key, ledger)
    if isinstance(attempt, Failure):
        return replace(state, failure=attempt)
    if state.chunk.key == "20.parquet":
        os._exit(1)
    return state


def _passed(chunks: Sequence[Chunk], ledger: Any) -> list[list[ChunkState]]:
    """The chunk states by block."""
    next_stage = partial(then, ledger=ledger)
    made = read(chunks, rows_of, next_stage, actors=1, ledger=ledger).materialize()
    return [list(from_block(block)) for block in ray.get(made.to_arrow_refs())]


def test_every_chunk_is_one_state_and_a_failed_one_is_a_value(ledger: Any) -> None:
    blocks = _passed(CHUNKS, ledger)
    # Ray Data hands blocks on as their tasks end, in no order.
    states = {state.chunk: state for (state,) in blocks}
    assert set(states) == set(CHUNKS)
    for state in states.values():
        if state.chunk.key == "3.parquet":
            assert (state.rows, state.failure.detail) == (None, "it was replaced")
        else:
            assert state.rows["text"].to_pylist() == [state.chunk.key] * 10
            assert state.stats["rows"] == 10


def test_small_chunks_share_a_task_and_each_fails_alone(ledger: Any) -> None:
    """One is at fault, one ends its process when it is read, and one after it was read."""
    blocks = _passed([chunk(number) for number in range(48)], ledger)
    assert [len(block) for block in blocks] == [6] * 8
    ends = {state.chunk.key: state.failure and state.failure.detail for b in blocks for state in b}
    assert ends.pop("3.parquet") == "it was replaced"
    assert ends.pop("11.parquet").startswith(f"its read process died {MAX_ATTEMPTS} times")
    assert ends.pop("20.parquet").startswith(f"its tokenize process died {MAX_ATTEMPTS} times")
    assert list(ends.values()) == [None] * 45


def test_pieces_of_a_row_group_are_read_by_one_task_and_stay_apart(ledger: Any) -> None:
    """One piece is at fault, one ends its process each time: the others lose nothing by them."""
    blocks = _passed(PIECES, ledger)
    assert [len(block) for block in blocks] == [1] * len(PIECES)
    ends = {state.chunk.key: state.failure and state.failure.detail for (state,) in blocks}
    assert ends.pop("piece-1") == "a damaged page"
    assert ends.pop("piece-3").startswith(f"its read process died {MAX_ATTEMPTS} times")
    assert ends == dict.fromkeys(["piece-0", "piece-2", "piece-4", "piece-5"])


def test_there_is_one_task_per_pass_of_large_chunks_whatever_is_asked(ledger: Any) -> None:
    large = [replace(part, text_bytes=PARCEL_TEXT_BYTES + i) for i, part in enumerate(CHUNKS)]
    source = ChunkSource([*large, *PIECES], rows_of, then, actors=1, ledger=ledger)
    tasks = source.get_read_tasks(parallelism=2)
    passes = [*reversed(large), PIECES[0]]
    assert [task.metadata.input_files[0] for task in tasks] == [c.shard.url for c in passes]
    assert [task.metadata.num_rows for task in tasks] == [1, 1, 1, 1, 1, 6]
    assert source.estimate_inmemory_data_size() == sum(c.text_bytes for c in [*large, *PIECES])


def test_the_newest_shards_are_read_first_where_a_run_has_a_deadline(ledger: Any) -> None:
    written = {"a": 1.0, "b": 3.0, "c": 2.0}
    chunks = [
        Chunk(Shard(url, 1, "e", modified=time), 0, 10, (0, 1), 0, url, 10**6 * size, 100)
        for size, (url, time) in enumerate(written.items(), 1)
    ]
    for newest, expected in ((True, ["b", "c", "a"]), (False, ["c", "b", "a"])):
        source = ChunkSource(chunks, rows_of, then, actors=1, ledger=ledger, newest=newest)
        tasks = source.get_read_tasks(parallelism=2)
        assert [task.metadata.input_files[0] for task in tasks] == expected


def test_a_task_asks_for_the_memory_that_its_text_needs_and_never_for_more_than_a_node_has() -> (
    None
):
    whole = max(node["Resources"]["memory"] for node in ray.nodes())
    assert memory_of(CHUNKS) == 300
    huge = Chunk(CHUNKS[0].shard, 0, 10, (0, 1), 0, "huge", 2**60, 100)
    assert whole / 2 < memory_of([*CHUNKS, huge]) < whole


def test_a_chunk_is_given_up_after_so_many_attempts(ledger: Any) -> None:
    tried = [
        state for _ in range(MAX_ATTEMPTS + 1) for state in read_states([chunk(0)], rows_of, ledger)
    ]
    assert [state.failure is None for state in tried] == [*([True] * MAX_ATTEMPTS), False]
    assert tried[-1].failure.kind == "fault"
    assert f"died {MAX_ATTEMPTS} times" in tried[-1].failure.detail


def test_nothing_is_read_once_the_run_is_stopping(ledger: Any) -> None:
    ray.get(ledger.stop.remote("SIGTERM"))
    (state,) = read_states([chunk(0)], pytest.fail, ledger)
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
        (state,) = read_states([part], partial(read_pass, job_input=job_input), ledger)
        assert [failed for *_, failed in faulty.asked].count(fault) == 8
    assert state.failure is None
    assert state.rows["text"].to_pylist() == [f"text {i}" for i in range(100)]
