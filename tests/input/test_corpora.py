"""A corpus may hold every type that Parquet holds, in several spellings, from several writers.

Kept columns come out equal, or the job is refused or the shard named, before a model is loaded.
Covers: embedjob.input.column_types
"""

import datetime
import io
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from embedjob.config.job import Input
from embedjob.errors import InputError
from embedjob.input import chunks
from embedjob.input.column_types import units_in
from embedjob.input.columns import Standing
from embedjob.input.reading import read_chunk
from embedjob.job.planning import JobPlan
from embedjob.output.chunk_file import data_table, file_bytes
from tests.input import strangers
from tests.shards import WIDTH, finished, output_spec, plan_of


def _written(plan: JobPlan, job_input: Input) -> dict[str, pa.Table]:
    """By shard, the rows that a run would write, as a reader finds them."""
    found: dict[str, list[pa.Table]] = {}
    spec = output_spec(job_input, plan.types)
    for chunk in plan.chunks:
        table = finished(read_chunk(chunk, job_input))
        good = table.column("reason").is_null().to_numpy().sum()
        vectors = np.eye(WIDTH, dtype=np.float32)[np.zeros(good, int)]
        made = data_table(table, vectors, chunk.shard, spec=spec)
        data = file_bytes(made, chunk.shard, spec=spec, counts={})
        read = pq.read_table(io.BytesIO(data))
        assert read.schema.field("m").type == plan.types["m"]
        found.setdefault(chunk.shard.url, []).append(read)
    return {url: pa.concat_tables(tables) for url, tables in found.items()}


# A smaller example of a fault in Arrow's types takes minutes to find.
_NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)

ROWS = st.sampled_from([2, 10])


@st.composite
def nights(draw: Any) -> tuple[pa.DataType, list[tuple[list[Any], pa.DataType, dict[str, Any]]]]:
    """A type, and shards of it: values, a spelling of the type, and what the file is like."""
    kind, values = draw(strangers.columns())
    shards = []
    for _ in range(draw(st.integers(1, 3))):
        rows = draw(st.lists(st.none() | values, max_size=5) | st.just([None] * 3))
        shards.append((rows, draw(strangers.spellings(kind)), draw(strangers.FILES)))
    return kind, shards


def _put(folder: Path, kind: pa.DataType, shards: Sequence[Any]) -> dict[str, list[Any]]:
    """Write the shards that Arrow can make; return by url the values of their column m."""
    for old in folder.glob("*.parquet"):
        old.unlink()
    expected: dict[str, list[Any]] = {}
    for number, (rows, spelled, properties) in enumerate(shards):
        path = folder / f"{number}.parquet"
        try:
            column = strangers.array(rows, kind, spelled)
            table = pa.table({"t": [f"text {n}" for n in range(len(rows))], "m": column})
            path.write_bytes(strangers.by_arrow(table, properties))
        except (pa.ArrowException, OSError):
            continue
        expected[str(path)] = strangers.python(table.column("m"))
    return expected


def _check(folder: Path, given: Any, chunk_rows: int) -> None:
    """The first shard one night, all of them the next: what was done stays done.

    A row group with more than `chunk_rows` rows is read in pieces.
    """
    kind, shards = given
    expected = _put(folder, kind, shards)
    if not expected:
        return
    job_input = Input(path=str(folder), text="t", keep=("m",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "WHOLE_GROUP_FACTOR", 1)
        _compare(job_input, kind, shards, expected, chunk_rows)


def _compare(
    job_input: Input,
    kind: pa.DataType,
    shards: Sequence[Any],
    expected: dict[str, list[Any]],
    chunk_rows: int,
) -> None:
    try:
        one = job_input.model_copy(update={"path": min(expected)})
        first = plan_of(one, chunk_rows=chunk_rows)
        plan = plan_of(job_input, chunk_rows=chunk_rows, standing=Standing(first.types))
    except InputError:  # refused, for a reason
        assert not _same_files(kind, shards)
        return
    named = dict(plan.faults)
    assert not named or not _same_files(kind, shards)
    if {*named} == {*expected}:  # a run says so and ends: see `list_input`
        assert plan.chunks == ()
        return
    assert {chunk.name for chunk in first.chunks} <= {chunk.name for chunk in plan.chunks}
    found = _written(plan, job_input)
    for url, values in expected.items():
        if url not in named and values:
            assert strangers.python(found[url].column("m")) == values


def _same_files(kind: pa.DataType, shards: Sequence[Any]) -> bool:
    """Whether files tell all of their types, and alike.

    Without Arrow's schema a fixed size is lost. int96 has no milliseconds, and of several units
    nobody knows which timestamp had which.
    """
    files = [properties for _, _, properties in shards]
    int96 = {properties["use_deprecated_int96_timestamps"] for properties in files}
    told = len(int96) == 1 and not (True in int96 and len(units_in(kind)) > 1)
    return told and all(properties["store_schema"] for properties in files)


@settings(suppress_health_check=[*HealthCheck], max_examples=30, phases=_NO_SHRINKING)
@given(nights(), ROWS)
def test_kept_columns_come_out_equal(tmp_path: Path, given: Any, chunk_rows: int) -> None:
    _check(tmp_path, given, chunk_rows)


@pytest.mark.chaos
@settings(suppress_health_check=[*HealthCheck], max_examples=3000)
@given(nights(), ROWS)
def test_kept_columns_come_out_equal_in_thousands_of_corpora(
    tmp_path: Path, given: Any, chunk_rows: int
) -> None:
    _check(tmp_path, given, chunk_rows)


@pytest.mark.parametrize("writer", sorted(strangers.WRITERS))
def test_what_other_libraries_write(tmp_path: Path, writer: str) -> None:
    """One table by several writers is one corpus, whatever each calls its types."""
    moment = datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.timezone.utc)
    table = pa.table(
        {
            "t": ["one", "two"],
            "texts": [["a", None], []],
            "nested": [{"x": [1], "y": "z"}, None],
            "at": pa.array([moment, None], pa.timestamp("us", "UTC")),
            "day": [moment.date(), None],
            "number": pa.array([2**64 - 1, None], pa.uint64()),
            "cost": pa.array([Decimal("1.50"), None], pa.decimal128(18, 2)),
            "bytes": [b"\xff", None],
            "kind": pa.array(["a", "a"]).dictionary_encode(),
            "nothing": pa.nulls(2),
        }
    )
    keep = tuple(table.column_names[1:])
    (tmp_path / "0.parquet").write_bytes(strangers.by_arrow(table, {}))
    (tmp_path / "1.parquet").write_bytes(strangers.WRITERS[writer](table, tmp_path))
    job_input = Input(path=str(tmp_path), text="t", keep=keep)
    plan = plan_of(job_input)
    assert not plan.faults
    one, other = (read_chunk(chunk, job_input) for chunk in plan.chunks)
    for name in keep:
        assert strangers.python(other[f"keep.{name}"]) == strangers.python(one[f"keep.{name}"])
