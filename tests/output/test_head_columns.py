"""Sparse entries and router scores in files: written and read again, or refused with the row."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedjob.config.job import Input
from embedjob.errors import ChunkError
from embedjob.input.chunks import Chunk
from embedjob.input.reading import read_chunk
from embedjob.output.committing import commit
from embedjob.output.head_columns import (
    INDEX_LIST,
    VALUE_LIST,
    head_column_problems,
    with_head_columns,
)
from embedjob.output.schema import OutputSpec, embedding_type
from embedjob.storage.objects import list_files, read_bytes
from tests.shards import finished, only, output_spec, plan_of, write_shard

INDICES = [[0, 5], [], None, [3], [1, 2, 99]]
VALUES = [[1.5, 2.0], [], None, [7.0], [1.0, 2.0, 3.0]]
SCORES = [[1.0, 2.0], [0.0, -1.0], None, [3.0, 4.0], [5.0, 6.0]]


def columns(**changed: Any) -> dict[str, pa.Array]:
    """Five rows, the third of them bad; each column may be given other values."""
    given = {"sparse_indices": INDICES, "sparse_values": VALUES, "router": SCORES, **changed}
    kinds = (INDEX_LIST, VALUE_LIST, embedding_type(2, "float32"))
    return {
        name: pa.array(values, kind)
        for (name, values), kind in zip(given.items(), kinds, strict=True)
    }


def case(folder: Path, *, on_bad_row: Any = "quarantine") -> tuple[Chunk, OutputSpec, pa.Table]:
    texts = {"t": ["a", "b", None, "d", "e"]}
    write_shard(folder / "in.parquet", texts)
    job_input = Input(path=str(folder / "in.parquet"), text="t", on_bad_row=on_bad_row)
    plan = plan_of(job_input)
    chunk = only(plan.chunks)
    made = with_head_columns(output_spec(job_input, plan.types), vocabulary=100, routers=2)
    return chunk, made, finished(read_chunk(chunk, job_input))


def with_columns(table: pa.Table, made: dict[str, pa.Array]) -> pa.Table:
    for name, column in made.items():
        table = table.append_column(name, column)
    return table


@pytest.mark.parametrize("on_bad_row", ["quarantine", "null"])
def test_what_is_written_is_read_again(tmp_path: Path, on_bad_row: str) -> None:
    chunk, ours, table = case(tmp_path, on_bad_row=on_bad_row)
    out = str(tmp_path / "out")
    commit(out, chunk, with_columns(table, columns()), rows_in=5, spec=ours)
    (file,) = list_files(f"{out}/data")
    parquet = pq.ParquetFile(io.BytesIO(read_bytes(file.url)), page_checksum_verification=True)
    found = parquet.read()
    assert found.schema.remove_metadata() == ours.data
    kept = [0, 1, 3, 4] if on_bad_row == "quarantine" else list(range(5))
    for name, values in (
        ("sparse_indices", INDICES),
        ("sparse_values", VALUES),
        ("router", SCORES),
    ):
        assert found[name].to_pylist() == [values[row] for row in kept]
    assert found.schema.metadata[b"embedjob.vocabulary"] == b"100"
    group = parquet.metadata.row_group(0)
    beside = [group.column(n) for n in range(group.num_columns)]
    beside = [one for one in beside if one.path_in_schema.startswith(("sparse", "router"))]
    assert len(beside) == 3
    assert not any(one.is_stats_set for one in beside)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sparse_values": [[1.0], *VALUES[1:]]}, "row 0 has different numbers"),
        ({"sparse_values": [*VALUES[:3], [np.nan], VALUES[4]]}, "row 3 has a sparse value that"),
        ({"sparse_indices": [[5, 0], *INDICES[1:]]}, "row 0 has sparse indices that are repeated"),
        ({"sparse_indices": [[5, 5], *INDICES[1:]]}, "row 0 has sparse indices that are repeated"),
        ({"sparse_indices": [*INDICES[:4], [1, 2, 100]]}, "row 4 has a sparse index of 100"),
        ({"sparse_indices": [None, *INDICES[1:]]}, "row 0 has sparse_indices without"),
        ({"router": [*SCORES[:4], [1.0, np.inf]]}, "row 4 has router scores that"),
        ({"router": [*SCORES[:4], None]}, "row 4 has router without"),
    ],
)
def test_what_is_not_as_promised_is_refused_with_its_row(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    chunk, ours, table = case(tmp_path)
    with pytest.raises(ChunkError, match=said):
        commit(str(tmp_path), chunk, with_columns(table, columns(**changed)), rows_in=5, spec=ours)


def test_a_missing_column_or_another_width_is_refused(tmp_path: Path) -> None:
    chunk, ours, table = case(tmp_path)
    lacking = columns()
    del lacking["sparse_values"]
    with pytest.raises(ChunkError, match="it has no sparse_values"):
        commit(str(tmp_path), chunk, with_columns(table, lacking), rows_in=5, spec=ours)
    wide = columns() | {"router": pa.array([[1.0]] * 5, embedding_type(1, "float32"))}
    wide["router"] = pa.array([[1.0], [1.0], None, [1.0], [1.0]], embedding_type(1, "float32"))
    with pytest.raises(ChunkError, match="it has 1 router scores, but 2 were planned"):
        commit(str(tmp_path), chunk, with_columns(table, wide), rows_in=5, spec=ours)


def test_columns_in_several_chunks_are_looked_at_as_one() -> None:
    made = columns()
    table = pa.table({"embedding": pa.array([[1.0]] * 2 + [None] + [[1.0]] * 2), **made})
    parts = pa.concat_tables([table.slice(0, 2), table.slice(2, 1), table.slice(3)])
    assert list(head_column_problems(parts, vocabulary=100)) == []
    assert [place for place, _ in head_column_problems(parts, vocabulary=99)] == [4]
