"""Rows from encoded texts: each gets its vector or a reason, and the chunk is put.

Covers: embedjob.vectors.encoded
"""

import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedjob.config.job import Input
from embedjob.errors import ChunkError
from embedjob.input.chunks import Chunk, Shard
from embedjob.output import lease
from embedjob.output.chunk_file import Committed
from embedjob.stages.chunk_state import ChunkState, Failure, to_block
from embedjob.stages.ledger import MAX_ATTEMPTS, new_ledger, outcomes_of
from embedjob.stages.write import ChunkSink, Committer, assemble_rows, outcome_of
from embedjob.vectors.encoded import Encoded, Lines
from embedjob.vectors.sparse import sparse
from tests.shards import output_spec

CHUNK = Chunk(Shard("in/a.parquet", 10, "etag"), 2, 5, (0, 1), 0, "a-name.parquet", 30, 100)
UNIQUES = st.lists(st.one_of(st.none(), st.integers(0, 4)), max_size=10)


def state(unique: list[int | None], failed: dict[int, tuple[str, str]]) -> ChunkState:
    """Text number t has the vector (t, 1), and a row without a text has a reason."""
    embeddings = np.array([[t, 1] for t in range(5)], np.float32)
    embeddings[list(failed)] = np.nan
    reasons = [None if text is not None else "null_text" for text in unique]
    rows = pa.table(
        {
            "row": pa.array(range(len(unique)), pa.uint32()),
            "reason": pa.array(reasons, pa.string()),
            "detail": pa.nulls(len(unique), pa.string()),
            "excerpt": pa.array([f"row {row}" for row in range(len(unique))], pa.string()),
            "unique": pa.array(unique, pa.uint32()),
        }
    )
    return ChunkState(CHUNK, rows, encoded=Encoded(embeddings, failed), stats={"rows": len(unique)})


@given(UNIQUES, st.sets(st.integers(0, 4)))
def test_every_row_gets_its_texts_vector_or_a_reason(
    unique: list[int | None], lost: set[int]
) -> None:
    failed = {text: ("model_error", f"text {text}") for text in lost}
    table = assemble_rows(state(unique, failed))
    assert table.column_names == ["row", "reason", "detail", "excerpt", "embedding"]
    for text, row in zip(unique, table.to_pylist(), strict=True):
        if text is None:
            wanted = ("null_text", None, None)
        elif text in lost:
            wanted = ("model_error", f"text {text}", None)
        else:
            wanted = (None, None, [text, 1])
        assert (row["reason"], row["detail"], row["embedding"]) == wanted


@given(UNIQUES, st.sets(st.integers(0, 4)))
def test_every_row_gets_its_texts_sparse_entries_and_scores_or_null(
    unique: list[int | None], lost: set[int]
) -> None:
    """Text number t has t entries, its scores are (-t, t)."""
    made = state(unique, {text: ("model_error", "") for text in lost})
    sizes = [0 if text in lost else text for text in range(5)]
    rows = [(np.arange(n, dtype=np.uint32), np.full(n, n, np.float32)) for n in sizes]
    routers = np.array([[-text, text] for text in range(5)], np.float32)
    encoded = replace(made.encoded, sparse=sparse(rows), routers=routers)
    table = assemble_rows(replace(made, encoded=encoded))
    table.validate(full=True)
    for text, row in zip(unique, table.to_pylist(), strict=True):
        gone = text is None or text in lost
        assert row["sparse_indices"] == (None if gone else list(range(text)))
        assert row["sparse_values"] == (None if gone else [text] * text)
        assert row["router"] == (None if gone else [-text, text])


def in_lines(unique: list[int | None], counts: list[int], failed: set[int]) -> pa.Table:
    """Line number l of all has the vector (l, 1) and the characters l to l + 1."""
    offsets = np.concatenate([[0], np.cumsum(counts)])
    embeddings = np.array([[line, 1] for line in range(offsets[-1])], np.float32).reshape(-1, 2)
    chars = np.stack([np.arange(offsets[-1]), 1 + np.arange(offsets[-1])], axis=1)
    lines = Lines(offsets, chars)
    why = {text: ("model_error", f"text {text}") for text in failed}
    plain = state(unique, {})
    return assemble_rows(replace(plain, encoded=Encoded(embeddings, why, lines=lines)))


@given(UNIQUES, st.lists(st.integers(1, 4), min_size=5, max_size=5), st.sets(st.integers(0, 4)))
def test_every_row_gets_all_lines_of_its_text_or_one_with_a_reason(
    unique: list[int | None], counts: list[int], lost: set[int]
) -> None:
    table = in_lines(unique, counts, lost)
    expected = []
    for row, text in enumerate(unique):
        if text is None or text in lost:
            expected.append((row, 0, None, None, None))
            continue
        first = sum(counts[:text])
        for part in range(counts[text]):
            line = first + part
            expected.append((row, part, [line, 1], line, line + 1))
    columns = ("row", "part", "embedding", "char_start", "char_stop")
    assert [tuple(one[name] for name in columns) for one in table.to_pylist()] == expected
    bad = table.filter(table["embedding"].is_null())
    assert bad["reason"].null_count == 0
    assert bad["excerpt"].to_pylist() == [f"row {row}" for row in bad["row"].to_pylist()]
    assert table["reason"].null_count == len(table) - len(bad)


def committed(_: ChunkState) -> Committed:
    return Committed("a-name.parquet", 3, 100, "etag", {"rows": 3}, written=True)


def test_a_chunk_ends_committed_with_its_numbers() -> None:
    end = outcome_of(state([0, 1, 2], {}), committed)
    assert (end.key, end.shard, end.start, end.stop) == ("a-name.parquet", "in/a.parquet", 2, 5)
    assert (end.fault, end.committed.rows, end.stats) == (None, 3, {"rows": 3})


def test_a_failed_chunk_is_a_fault_and_nothing_is_put() -> None:
    failed = ChunkState(CHUNK, failure=Failure("fault", "no such file"))
    end = outcome_of(failed, pytest.fail)
    assert (end.fault, end.committed) == ("no such file", None)


def test_an_abandoned_chunk_has_no_end() -> None:
    assert (
        outcome_of(ChunkState(CHUNK, failure=Failure("abandoned", "stopping")), pytest.fail) is None
    )


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (ChunkError("a vector is not finite"), "a vector is not finite"),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
    ],
)
def test_what_cannot_be_put_is_the_fault_of_this_chunk_alone(error: Exception, fault: str) -> None:
    def commit(_: ChunkState) -> Committed:
        raise error

    end = outcome_of(state([0], {}), commit)
    assert (end.fault, end.committed) == (fault, None)


def test_nothing_is_put_where_the_run_s_lease_is_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a node that joined late, with a disk of its own at the output's path."""
    monkeypatch.setattr(lease, "_SEEN_PAUSES", ())
    mine = lease.acquire(str(tmp_path / "out"), job="test")
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    job_input = Input(path=str(tmp_path), text="t")
    committer = Committer(mine, output_spec(job_input, {}))
    end = outcome_of(state([0], {}), committer)
    assert end.fault.startswith(f"node {socket.gethostname()}: {tmp_path}/out: this node does not")
    assert not (tmp_path / "out").exists()


class ProcessDied(BaseException):
    """Stands for the end of a process, after which Ray Data runs the same write again."""


@pytest.mark.ray
@pytest.mark.usefixtures("joined")
def test_of_chunks_that_travel_together_each_is_committed_or_named_alone() -> None:
    """The process dies at the second of three chunks: it has three attempts."""
    ledger, tried = new_ledger(), []

    def commit(part: ChunkState) -> Committed:
        tried.append(part.chunk.start)
        if part.chunk.start == 5:
            raise ProcessDied
        return committed(part)

    made = state([0, 1, 2], {})
    chunks = [replace(CHUNK, start=start, name=f"at-{start}") for start in (2, 5, 8)]
    sink = ChunkSink(commit, ledger)
    block = to_block([replace(made, chunk=chunk) for chunk in chunks])
    for _ in range(MAX_ATTEMPTS):
        with pytest.raises(ProcessDied):
            sink.write([block], None)
    sink.write([block], None)
    ends, _ = outcomes_of(ledger, timeout=60)
    [fault] = ends.faults
    assert (fault.shard, fault.start, fault.stop) == ("in/a.parquet", 5, 5)
    assert "its write process died 3 times" in fault.fault
    assert ends.committed == 2
    assert tried == [2, 5] * MAX_ATTEMPTS + [2, 8]
    # What has ended is not committed again when the task is repeated.
    sink.write([block], None)
    assert tried[-1] == 8
    assert len(tried) == 2 * MAX_ATTEMPTS + 2
