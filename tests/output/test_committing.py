"""Chunks put once: data, bad rows and footer, or a refusal.

Covers: embedjob.output.chunk_file, embedjob.output.row_checks, embedjob.output.schema
"""

import errno
import hashlib
import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace as replace_spec
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from embedjob.config.job import Input
from embedjob.config.recipe import Recipe
from embedjob.errors import ChunkError
from embedjob.input.chunks import Chunk
from embedjob.input.reading import read_chunk
from embedjob.output import chunk_file, committing
from embedjob.output.calibration import Calibration
from embedjob.output.chunk_file import Committed, read_all_committed
from embedjob.output.committing import commit
from embedjob.output.schema import OutputSpec, vectors_of
from embedjob.storage.objects import create, list_files, read_bytes, replace
from embedjob.vectors.quantizing import CALIBRATED, quantize
from tests.shards import (
    FINGERPRINT,
    WIDTH,
    finished,
    only,
    output_spec,
    plan_of,
    spread,
    write_shard,
)


class Case:
    """One planned chunk of ten rows (texts a to h, and b twice more) with what is made of it."""

    def __init__(self, folder: Path, *, on_bad_row: Any = "quarantine", **recipe: Any) -> None:
        texts = ["a", "b", "c", "d", None, "f", "g", "h", "b", "b"]
        write_shard(
            folder / "in.parquet",
            {
                "t": texts,
                "doc": [f"d{i}" for i in range(10)],
                "reason": pa.array(["kept"] * 10).dictionary_encode(),
            },
        )
        self.input = Input(
            path=str(folder / "in.parquet"),
            text="t",
            id="doc",
            keep=("reason", "t"),
            on_bad_row=on_bad_row,
        )
        plan = plan_of(self.input)
        self.chunk: Chunk = only(plan.chunks)
        self.spec: OutputSpec = output_spec(self.input, plan.types, **recipe)
        self.rows = read_chunk(self.chunk, self.input)

    def commit(self, out: str, table: pa.Table | None = None, rows_in: int = 10) -> Committed:
        table = finished(self.rows) if table is None else table
        return commit(out, self.chunk, table, rows_in=rows_in, spec=self.spec)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def _table(out: str, folder: str, name: str) -> pa.Table:
    data = read_bytes(f"{out}/{folder}/{FINGERPRINT[:12]}/{name}")
    return pq.read_table(io.BytesIO(data), page_checksum_verification=True)


def _names(out: str) -> list[str]:
    return [file.url.split("/out/")[-1].split("/")[0] for file in list_files(out)]


def test_good_rows_and_bad_rows_lie_in_their_files(case: Case, any_out: str) -> None:
    done = case.commit(any_out, finished(case.rows, bad={6: "model_error"}))
    data, bad = (_table(any_out, folder, done.name) for folder in ("data", "quarantine"))
    assert data.column_names == [
        *("row", "shard", "id", "reason", "t", "embedding", "text_hash", "tokens", "truncated")
    ]
    assert data.schema.remove_metadata() == case.spec.data
    assert data.column("row").to_pylist() == [0, 1, 2, 3, 5, 7, 8, 9]
    assert data.column("id").to_pylist()[:2] == ["d0", "d1"]
    assert data.column("t").to_pylist() == ["a", "b", "c", "d", "f", "h", "b", "b"]
    assert set(data.column("reason").to_pylist()) == {"kept"}
    assert set(data.column("shard").to_pylist()) == {case.chunk.shard.url}
    assert data.column("embedding").to_pylist()[4] == [0, 1, 0, 0]
    assert bad.select(["row", "id", "reason", "excerpt"]).to_pylist() == [
        {"row": 4, "id": "d4", "reason": "null_text", "excerpt": None},
        {"row": 6, "id": "d6", "reason": "model_error", "excerpt": "g"},
    ]
    counts = {"rows": 10, "embedded": 6, "deduplicated": 2, "quarantined": 2, "nulls": 0}
    assert done.counts == {**counts, "tokens": 8, "truncated": 0}
    assert (done.rows, done.written) == (8, True)


def test_a_row_of_several_lines_counts_once(tmp_path: Path, out: str) -> None:
    case = Case(tmp_path, aggregation="keep")
    done = case.commit(out, spread(finished(case.rows, bad={6: "model_error"}), 3))
    data = _table(out, "data", done.name)
    assert data.column_names[-1] == "part"
    assert data.column("part").to_pylist() == [0, 1, 2] * 8
    assert data.column("row").to_pylist() == [r for r in (0, 1, 2, 3, 5, 7, 8, 9) for _ in range(3)]
    counts = {"rows": 10, "embedded": 6, "deduplicated": 2, "quarantined": 2, "nulls": 0}
    assert done.counts == {**counts, "tokens": 8, "truncated": 0}
    # Readers are told what Parquet counts.
    assert done.rows == len(data) == 24


def test_a_null_of_several_lines_is_one(tmp_path: Path, out: str) -> None:
    case = Case(tmp_path, aggregation="keep", on_bad_row="null")
    done = case.commit(out, spread(finished(case.rows), 2))
    data = _table(out, "data", done.name)
    rows = data.filter(data.column("embedding").is_null())
    assert rows.select(["row", "part"]).to_pylist() == [{"row": 4, "part": 0}]
    assert (done.rows, done.counts["rows"], done.counts["nulls"]) == (19, 10, 1)


@pytest.mark.parametrize("on_bad_row", ["quarantine", "null"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_lists_of_variable_length_hold_the_vectors_of_fixed_ones(
    tmp_path: Path, dtype: str, on_bad_row: str
) -> None:
    # Files differ in the type of one column; values, nulls and all other columns are equal.
    case = Case(tmp_path, on_bad_row=on_bad_row, vector_dtype=dtype)
    fixed = _table(str(tmp_path), "data", case.commit(str(tmp_path)).name)
    case.spec = replace_spec(case.spec, vector_list="variable")
    other = str(tmp_path / "other")
    done = case.commit(other)
    variable = _table(other, "data", done.name)
    assert pa.types.is_list(variable.schema.field("embedding").type)
    assert variable.schema.remove_metadata() == case.spec.stored
    assert variable.drop_columns("embedding").equals(fixed.drop_columns("embedding"))
    assert variable["embedding"].to_pylist() == fixed["embedding"].to_pylist()
    assert np.array_equal(vectors_of(variable["embedding"]), vectors_of(fixed["embedding"]))
    # A further attempt finds its own columns there.
    assert not case.commit(other).written
    case.spec = replace_spec(case.spec, vector_list="fixed")
    with pytest.raises(ChunkError, match="columns"):
        case.commit(other)


def test_vectors_of_several_widths_are_no_matrix() -> None:
    with pytest.raises(ValueError, match="of 1 and of 2 numbers"):
        vectors_of(pa.array([[1.0], None, [1.0, 2.0]]))
    assert vectors_of(pa.array([None, None], pa.list_(pa.float32()))).shape == (0, 0)


@pytest.mark.parametrize("lost", [0, 1, 4])
def test_a_line_that_is_lost_is_seen(tmp_path: Path, out: str, lost: int) -> None:
    case = Case(tmp_path, aggregation="keep")
    whole = spread(finished(case.rows), 3)
    table = pa.concat_tables([whole.slice(0, lost), whole.slice(lost + 1)])
    with pytest.raises(ChunkError, match=r"rows came in and|repeated or out of order"):
        case.commit(out, table)


@pytest.mark.parametrize("order", [[1, 0], [0, 0, 1]])
def test_lines_come_in_order_and_once(tmp_path: Path, out: str, order: list[int]) -> None:
    case = Case(tmp_path, aggregation="keep")
    whole = spread(finished(case.rows), 2)
    table = whole.take([*order, *range(2, len(whole))])
    with pytest.raises(ChunkError, match=r"rows came in and|repeated or out of order"):
        case.commit(out, table)


def test_the_footer_says_what_made_the_file(case: Case, out: str) -> None:
    done = case.commit(out)
    said = _table(out, "data", done.name).schema.metadata
    assert said[b"embedjob.fingerprint"].decode() == FINGERPRINT
    assert said[b"embedjob.similarity"] == b"cosine"
    assert said[b"embedjob.shard"].decode() == case.chunk.shard.url
    assert said[b"embedjob.etag"].decode() == case.chunk.shard.etag
    (read,) = read_all_committed(list_files(f"{out}/data"))
    assert read == Committed(done.name, 9, done.bytes, done.etag, done.counts, written=False)


def test_the_footer_says_how_columns_are_summed(tmp_path: Path, out: str) -> None:
    heads = [{"sparse_lm": {}}]
    similarity = {"embedding": "dot", "weight": 0.5, "sparse": 0.25, "minmax": True}
    made = Recipe.model_validate_json(
        json.dumps({"model": "m", "heads": heads, "similarity": similarity})
    )
    case = Case(tmp_path, heads=made.heads, similarity=made.similarity)
    said = _table(out, "data", case.commit(out).name).schema.metadata
    assert said[b"embedjob.similarity"] == b"dot"
    assert json.loads(said[b"embedjob.weighted_sum"]) == {**similarity, "router": None}


def test_a_chunk_without_a_good_row_writes_a_file_without_rows(case: Case, out: str) -> None:
    every = dict.fromkeys(range(10), "model_error")
    done = case.commit(out, finished(case.rows, bad=every))
    assert _table(out, "data", done.name).num_rows == 0
    assert _table(out, "quarantine", done.name).num_rows == 10


def test_a_chunk_of_which_the_filter_left_nothing(case: Case, out: str) -> None:
    done = case.commit(out, finished(case.rows.slice(0, 0)), rows_in=0)
    assert (done.rows, _names(out)) == (0, ["data"])


def test_bad_rows_can_be_nulls_in_their_place(tmp_path: Path, out: str) -> None:
    case = Case(tmp_path, on_bad_row="null")
    done = case.commit(out, finished(case.rows, bad={0: "empty_span"}))
    data = _table(out, "data", done.name)
    assert data.column("row").to_pylist() == list(range(10))
    missing = data.column("embedding").is_null().to_pylist()
    assert [row for row, is_missing in enumerate(missing) if is_missing] == [0, 4]
    assert data.column("embedding").to_pylist()[5] == [0, 1, 0, 0]
    assert (done.counts["nulls"], done.counts["quarantined"]) == (2, 0)
    assert "quarantine" not in _names(out)


def test_bad_rows_can_fail_the_chunk(tmp_path: Path, out: str) -> None:
    with pytest.raises(ChunkError, match="row 4 is bad: null_text"):
        Case(tmp_path, on_bad_row="fail").commit(out)
    assert _names(out) == []


@pytest.mark.parametrize("arrives", [np.float32, np.float16])
def test_vectors_can_be_stored_in_half_precision(tmp_path: Path, out: str, arrives: Any) -> None:
    case = Case(tmp_path, vector_dtype="float16")
    done = case.commit(out, finished(case.rows, dtype=arrives))
    data = _table(out, "data", done.name)
    assert data.schema.field("embedding").type.value_type == pa.float16()
    assert data.column("embedding").to_pylist()[3] == [0, 0, 0, 1]


def _with(table: pa.Table, row: int, vector: list[float | None] | None) -> pa.Table:
    vectors = table.column("embedding").to_pylist()
    vectors[row] = vector
    column = pa.array(vectors, pa.list_(pa.float32(), WIDTH))
    return table.set_column(table.column_names.index("embedding"), "embedding", column)


SPOILERS: dict[str, tuple[str, Callable[[pa.Table], pa.Table]]] = {
    "lost": ("10 rows came in and 9 came out", lambda t: t.slice(0, 9)),
    "doubled": ("repeated", lambda t: pa.concat_tables([t.slice(0, 9), t.slice(8, 1)])),
    "shuffled": ("out of order", lambda t: t.take([1, 0, *range(2, 10)])),
    "foreign": (
        "not all inside its range",
        lambda t: t.set_column(0, "row", pc.add(t.column("row"), 1).cast(pa.uint32())),
    ),
    "unexplained": ("row 3 has neither", lambda t: _with(t, 3, None)),
    "holes": ("1 numbers of its vectors are null", lambda t: _with(t, 3, [1, None, 0, 0])),
    "nan": (
        "row 5 has a vector that is not finite",
        lambda t: _with(t, 5, [float("nan"), 1, 0, 0]),
    ),
    "infinite": ("row 5 has a vector that", lambda t: _with(t, 5, [float("inf"), 0, 0, 0])),
    "long": ("row 5 has a vector whose norm", lambda t: _with(t, 5, [1, 0.1, 0, 0])),
    "zero": ("row 5 has a vector whose norm", lambda t: _with(t, 5, [0, 0, 0, 0])),
}


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_what_is_not_as_promised_is_not_written(case: Case, tmp_path: Path, spoiler: str) -> None:
    message, spoil = SPOILERS[spoiler]
    out = str(tmp_path / "out")
    with pytest.raises(ChunkError, match=message):
        case.commit(out, spoil(finished(case.rows)))
    assert _names(out) == []


def test_vectors_of_another_width_are_refused(case: Case, tmp_path: Path) -> None:
    wide = pa.array([[1.0] + [0.0] * 4] * 10, pa.list_(pa.float32(), 5))
    table = finished(case.rows).drop_columns(["embedding"]).append_column("embedding", wide)
    with pytest.raises(ChunkError, match="5 wide, but 4 was planned"):
        case.commit(str(tmp_path / "out"), table)


def test_a_vector_too_large_for_half_precision_is_refused(tmp_path: Path) -> None:
    case = Case(tmp_path, vector_dtype="float16", finish=())
    with pytest.raises(ChunkError, match="row 2 has a vector too large for halffloat"):
        case.commit(str(tmp_path / "out"), _with(finished(case.rows), 2, [1e6, 0, 0, 0]))


def test_two_writers_of_one_chunk_make_one_file(case: Case, any_out: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        ends = [end.result() for end in [pool.submit(case.commit, any_out) for _ in range(4)]]
    assert sorted(end.written for end in ends) == [False, False, False, True]
    assert len({(end.name, end.rows, end.etag) for end in ends}) == 1
    assert sorted(_names(any_out)) == ["data", "quarantine"]


def test_a_lost_answer_to_the_put_is_no_loss(
    case: Case, any_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put_and_hear_nothing(url: str, data: memoryview) -> bool:
        create(url, data)
        return create(url, data)

    monkeypatch.setattr(committing, "create", put_and_hear_nothing)
    done = case.commit(any_out)
    assert (done.rows, done.written) == (9, False)
    assert _table(any_out, "data", done.name).num_rows == 9


def _killed_before_the_data_file(case: Case, out: str, table: pa.Table) -> None:
    def full(url: str, data: memoryview) -> bool:
        if "/data/" in url:
            raise OSError(errno.ENOSPC, "No space left on device")
        return create(url, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(committing, "create", full)
        with pytest.raises(OSError, match="No space left"):
            case.commit(out, table)
    assert _names(out) == ["quarantine"]


def test_a_death_between_the_two_puts_is_mended_by_the_next_run(case: Case, any_out: str) -> None:
    _killed_before_the_data_file(case, any_out, finished(case.rows))
    done = case.commit(any_out)
    assert (done.rows, done.written) == (9, True)


@pytest.mark.parametrize("later", [{}, {5: "model_error", 6: "model_error"}])
def test_other_bad_rows_than_an_earlier_attempt_found_need_a_repair(
    case: Case, out: str, later: dict[int, str]
) -> None:
    _killed_before_the_data_file(case, out, finished(case.rows, bad={5: "model_error"}))
    with pytest.raises(ChunkError, match="run --repair"):
        case.commit(out, finished(case.rows, bad=later))


def test_bad_rows_of_an_attempt_that_now_finds_none(tmp_path: Path, out: str) -> None:
    case = Case(tmp_path, on_bad_row="quarantine")
    some = case.rows.slice(5)
    chunk_rows = finished(some, bad={6: "model_error"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(committing, "data_table", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            case.commit(out, chunk_rows, rows_in=5)
    with pytest.raises(ChunkError, match="run --repair"):
        case.commit(out, finished(some), rows_in=5)


def _replaced(case: Case, out: str, **metadata: str) -> None:
    """Put another file in the place of the chunk's."""
    url = f"{out}/data/{FINGERPRINT[:12]}/{case.chunk.name}"
    table = _table(out, "data", case.chunk.name)
    keep = table.select(["row"]) if "columns" in metadata else table
    keep = keep.slice(1) if "rows" in metadata else keep
    stamp = {f"embedjob.{key}".encode(): value.encode() for key, value in metadata.items()}
    file = io.BytesIO()
    pq.write_table(keep.replace_schema_metadata({**table.schema.metadata, **stamp}), file)
    replace(url, file.getvalue())


@pytest.mark.parametrize("what", ["rows", "columns", "fingerprint"])
def test_a_taken_name_is_checked(case: Case, any_out: str, what: str) -> None:
    assert case.commit(any_out).written
    _replaced(case, any_out)
    assert not case.commit(any_out).written
    _replaced(case, any_out, **{what: "other"})
    with pytest.raises(ChunkError, match=rf"name is taken by a file with {what}.*run --repair"):
        case.commit(any_out)


@pytest.mark.parametrize("content", [b"", b"not Parquet", None])
def test_a_name_taken_by_something_else(case: Case, tmp_path: Path, content: bytes | None) -> None:
    out = str(tmp_path / "out")
    if content is None:
        file = io.BytesIO()
        pq.write_table(pa.table({"a": [1]}), file)
        content = file.getvalue()
    create(f"{out}/data/{FINGERPRINT[:12]}/{case.chunk.name}", content)
    with pytest.raises(ChunkError, match=r"is (a|not a whole) Parquet file.*run --repair"):
        case.commit(out)


def test_row_groups_are_bounded_in_bytes(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_file, "GROUP_BYTES", 300)
    out = str(tmp_path / "out")
    done = case.commit(out)
    metadata = pq.read_metadata(f"{out}/data/{FINGERPRINT[:12]}/{done.name}")
    assert metadata.num_row_groups > 2
    assert _table(out, "data", done.name).num_rows == 9


def test_equal_rows_make_equal_bytes(case: Case, tmp_path: Path) -> None:
    outs = [str(tmp_path / name) for name in ("one", "other")]
    contents = [
        read_bytes(f"{out}/data/{FINGERPRINT[:12]}/{case.commit(out).name}") for out in outs
    ]
    assert contents[0] == contents[1]


def test_a_flipped_bit_is_seen_by_its_checksum(case: Case, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    path = Path(f"{out}/data/{FINGERPRINT[:12]}/{case.commit(out).name}")
    whole = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(0)
    place = (
        column.dictionary_page_offset or column.data_page_offset
    ) + column.total_compressed_size
    whole[place - 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(OSError, match=r"(?i)crc|checksum|decompress|corrupt"):
        _table(out, "data", path.name)


def _quantised(folder: Path, dtype: str, **knobs: Any) -> Case:
    """A case whose form quantises: unit vectors in ranges that end at 0.9."""
    case = Case(folder, vector_dtype=dtype, **knobs)
    ranges_2D = np.array([[-1] * WIDTH, [0.9] * WIDTH], np.float32)
    case.spec = replace_spec(
        case.spec,
        quantize=partial(quantize, dtype=dtype, ranges_2D=ranges_2D),
        calibration=Calibration.of(ranges_2D, vectors=9) if dtype in CALIBRATED else None,
    )
    return case


# Of the vector (0, 0, 0, 1): 0 is 134.2 of the 255 steps up, and 1 is above the last one.
STORED: dict[str, tuple[pa.DataType, list[int]]] = {
    "int8": (pa.int8(), [6, 6, 6, 127]),
    "uint8": (pa.uint8(), [134, 134, 134, 255]),
    "binary": (pa.int8(), [16 - 128]),
    "ubinary": (pa.uint8(), [16]),
}


@pytest.mark.parametrize("dtype", STORED)
def test_vectors_can_be_stored_in_bytes_and_bits(tmp_path: Path, out: str, dtype: str) -> None:
    case = _quantised(tmp_path, dtype, on_bad_row="null")
    done = case.commit(out)
    data, (kind, code) = _table(out, "data", done.name), STORED[dtype]
    assert data.schema.field("embedding").type == pa.list_(pa.field("element", kind), len(code))
    assert data.schema.remove_metadata() == case.spec.data
    assert data.column("embedding").to_pylist()[3] == code
    assert data.column("embedding").to_pylist()[4] is None


@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_the_footer_has_the_ranges_once_and_only_where_there_are_any(
    tmp_path: Path, out: str, dtype: str
) -> None:
    case = _quantised(tmp_path, dtype)
    done = case.commit(out)
    content = read_bytes(f"{out}/data/{FINGERPRINT[:12]}/{done.name}")
    said = pq.read_metadata(io.BytesIO(content)).metadata.get(chunk_file.CALIBRATION_KEY)
    assert content.count(chunk_file.CALIBRATION_KEY) == (dtype in CALIBRATED)
    if dtype in CALIBRATED:
        assert json.loads(said) == {"ranges": [[-1.0] * WIDTH, [0.9] * WIDTH], "vectors": 9}


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("spoiler", ["nan", "long", "zero"])
def test_vectors_are_checked_before_they_are_quantised(
    tmp_path: Path, dtype: str, spoiler: str
) -> None:
    case = _quantised(tmp_path, dtype)
    message, spoil = SPOILERS[spoiler]
    with pytest.raises(ChunkError, match=message):
        case.commit(str(tmp_path / "out"), spoil(finished(case.rows)))
    assert _names(str(tmp_path / "out")) == []


def test_vectors_of_another_width_are_refused_before_they_are_packed(tmp_path: Path) -> None:
    case = _quantised(tmp_path, "ubinary")
    wide = pa.array([[1.0] + [0.0] * 4] * 10, pa.list_(pa.float32(), 5))
    table = finished(case.rows).drop_columns(["embedding"]).append_column("embedding", wide)
    with pytest.raises(ChunkError, match="5 wide, but 4 was planned"):
        case.commit(str(tmp_path / "out"), table)


def test_a_number_of_one_byte_takes_one_byte(tmp_path: Path) -> None:
    """Parquet knows integers of 32 bits only; without a dictionary zstd leaves 1.4 bytes."""
    case = Case(tmp_path, vector_dtype="int8")
    random = np.random.default_rng(0)
    codes = random.integers(-128, 128, (2000, 64), np.int8)
    kind = pa.list_(pa.field("element", pa.int8()), 64)
    table = pa.table({"embedding": pa.FixedSizeListArray.from_arrays(codes.ravel(), type=kind)})
    size = len(chunk_file.file_bytes(table, case.chunk.shard, spec=case.spec, counts={}))
    assert size < 1.05 * codes.nbytes


@pytest.mark.parametrize(
    "kept",
    [
        pa.array([{"x": 1}] * 2),
        pa.array([[("a", 1.5)], None], pa.map_(pa.string(), pa.float32())),
        pa.array([[1.5], None], pa.list_(pa.float32())),
        pa.array([[[1.5, 2.5]], None], pa.list_(pa.list_(pa.float32(), 2))),
        pa.array([[{"x": ["y"]}], None]),
        pa.nulls(2),
        pa.nulls(2, pa.list_(pa.struct({"a": pa.null()}))),
        pa.array([1, None], pa.duration("ns")),
        pa.array([None, 2**64 - 1], pa.uint64()),
    ],
)
def test_a_kept_column_and_an_id_of_any_type_are_written(
    tmp_path: Path, out: str, kept: pa.Array
) -> None:
    write_shard(tmp_path / "in.parquet", {"t": ["a", "b"], "m": kept})
    job_input = Input(path=str(tmp_path / "in.parquet"), text="t", id="m", keep=("m",))
    plan = plan_of(job_input)
    spec = output_spec(job_input, plan.types)
    rows = finished(read_chunk(only(plan.chunks), job_input))
    # Twice: what a repeated attempt finds agrees with what it made.
    for attempt in (True, False):
        made = commit(out, only(plan.chunks), rows, rows_in=2, spec=spec)
        assert made.written is attempt
    (file,) = list_files(f"{out}/data")
    table = pq.read_table(file.url)
    assert table.column("m").to_pylist() == kept.to_pylist()
    assert table.column("id").to_pylist() == kept.to_pylist()
    assert table.schema.field("m").type == plan.types["m"]


def passages(rows: pa.Table, bad: set[tuple[int, int]] = frozenset()) -> pa.Table:  # type: ignore[assignment]
    """Three passages of each good row; row 6 has those of row 5, and those named are bad."""
    table = spread(finished(rows), 3)
    row, part = (table.column(name).to_pylist() for name in ("row", "part"))
    own = [f"{min(r, 5) if r in (5, 6) else r} {p}" for r, p in zip(row, part, strict=True)]
    hashes = [hashlib.blake2b(one.encode(), digest_size=16).digest() for one in own]
    lost = [(r, p) in bad for r, p in zip(row, part, strict=True)]
    reasons = table.column("reason").to_pylist()
    reason = ["model_error" if b else one for b, one in zip(lost, reasons, strict=True)]
    places = pa.array([10 * p for p in part], pa.uint32())
    stops = pa.array([10 * (p + 1) for p in part], pa.uint32())
    names = {"text_hash": pa.array(hashes, pa.binary(16)), "reason": pa.array(reason, pa.string())}
    for name, column in names.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table.append_column("char_start", places).append_column("char_stop", stops)


def test_one_bad_passage_is_set_aside_with_its_place_and_leaves_the_others(tmp_path: Path) -> None:
    """Row 4 is null; of row 0 the second passage is bad, of row 7 all; row 6 repeats row 5."""
    case = Case(tmp_path, long_text="split")
    bad = {(0, 1), (7, 0), (7, 1), (7, 2)}
    done = case.commit(str(tmp_path / "out"), passages(case.rows, bad))
    assert done.counts == {
        **{"rows": 10, "embedded": 6, "deduplicated": 1, "quarantined": 3, "nulls": 0},
        **{"tokens": done.counts["tokens"], "truncated": 0},
    }
    assert done.rows == 27 - len(bad)
    (data,) = (tmp_path / "out" / "data").rglob("*.parquet")
    (aside,) = (tmp_path / "out" / "quarantine").rglob("*.parquet")
    good, lost = pq.read_table(data), pq.read_table(aside)
    assert good.filter(pc.equal(good["row"], 0))["part"].to_pylist() == [0, 2]
    assert lost.select(["row", "part", "char_start", "char_stop"]).to_pylist()[:2] == [
        {"row": 0, "part": 1, "char_start": 10, "char_stop": 20},
        {"row": 4, "part": 0, "char_start": 0, "char_stop": 10},
    ]
    again = case.commit(str(tmp_path / "out"), passages(case.rows, bad))
    assert not again.written
    with pytest.raises(ChunkError, match="quarantined other rows"):
        case.commit(str(tmp_path / "out"), passages(case.rows, {(0, 2), *(bad - {(0, 1)})}))


def test_a_passage_that_is_missing_or_there_twice_is_not_written(tmp_path: Path) -> None:
    case = Case(tmp_path, long_text="split")
    whole = passages(case.rows)
    for places in ([0, 2, *range(3, 28)], [0, 1, 1, *range(2, 28)], [1, 2, *range(3, 28)]):
        with pytest.raises(ChunkError, match="rows"):
            case.commit(str(tmp_path / "out"), whole.take(places))
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_bad_passages_stay_as_nulls_where_bad_rows_do(tmp_path: Path) -> None:
    case = Case(tmp_path, on_bad_row="null", long_text="split")
    done = case.commit(str(tmp_path / "out"), passages(case.rows, {(0, 1)}))
    assert (done.rows, done.counts["nulls"], done.counts["quarantined"]) == (28, 2, 0)
    (data,) = (tmp_path / "out" / "data").rglob("*.parquet")
    assert pq.read_table(data)["embedding"].null_count == 2
