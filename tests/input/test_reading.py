import datetime
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedjob.config.job import Input
from embedjob.errors import ChunkError, InputChangedError
from embedjob.input import reading
from embedjob.input.chunks import passes
from embedjob.input.column_types import TEXT, in_type
from embedjob.input.listing import find_files
from embedjob.input.reading import passing_rows, read_chunk, read_pass
from embedjob.storage import objects
from tests.shards import footers_of, only, plan_of, strings, write_shard


def _read(job_input: Input, **options: Any) -> pa.Table:
    """Every row, read as a run does; each chunk read alone gives the same."""
    chunks = plan_of(job_input, **options).chunks
    tables = [table for together in passes(chunks) for table in read_pass(together, job_input)]
    for chunk, table in zip(chunks, tables, strict=True):
        assert read_chunk(chunk, job_input).equals(table)
    return pa.concat_tables(tables)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    rows=st.integers(0, 60),
    group_rows=st.integers(1, 70),
    chunk_rows=st.integers(2, 20),
    limit=st.none() | st.integers(1, 70),
    low=st.none() | st.integers(0, 70),
)
def test_chunks_give_every_row_that_passes_once_under_its_number(
    tmp_path: Path, rows: int, group_rows: int, chunk_rows: int, limit: int | None, low: int | None
) -> None:
    path = tmp_path / "a.parquet"
    columns = {"t": [f"text {i}" for i in range(rows)], "n": pa.array(range(rows), pa.int64())}
    write_shard(path, columns, group_rows=group_rows)
    written = None if low is None else (("n", ">=", low),)
    job_input = Input(path=str(path), text="t", id="n", keep=("n",), filter=written)
    found = _read(job_input, chunk_rows=chunk_rows, limit=limit) if rows else pa.table({"row": []})
    numbers = [row for row in range(rows)[:limit] if low is None or row >= low]
    assert found.column("row").to_pylist() == numbers
    if rows:
        assert found.column("text").to_pylist() == [f"text {row}" for row in numbers]
        assert found.column("id").to_pylist() == numbers
        assert found.column("keep.n").to_pylist() == numbers


@pytest.mark.parametrize(
    "written", [(("n", ">=", 23),), (("n", "<", 0),), (("lang", "=", "en"), ("n", "in", [3, 31]))]
)
def test_the_rows_that_pass_are_those_that_are_read(tmp_path: Path, written: Any) -> None:
    path = tmp_path / "lang=en" / "a.parquet"
    columns = {"t": [f"text {i}" for i in range(47)], "n": pa.array(range(47), pa.int64())}
    write_shard(path, columns, group_rows=5)
    job_input = Input(path=str(tmp_path), text="t", filter=written)
    for chunk in plan_of(job_input, chunk_rows=10).chunks:
        passing = passing_rows(chunk, job_input).tolist()
        assert passing == read_chunk(chunk, job_input)["row"].to_pylist()


def test_the_columns_and_their_types(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": pa.array(["a", None]).dictionary_encode(),
            "reason": pa.array(["x", "y"], pa.string_view()),
            "nested": pa.array([{"a": [1]}, None]),
            "unused": [1, 2],
        }
    )
    write_shard(tmp_path / "lang=en" / "a.parquet", table)
    job_input = Input(
        path=str(tmp_path), text="text", id="reason", keep=("text", "reason", "nested", "lang")
    )
    found = _read(job_input)
    assert found.to_pydict() == {
        "row": [0, 1],
        "text": ["a", None],
        "reason": [None, "null_text"],
        "id": ["x", "y"],
        "keep.text": ["a", None],
        "keep.reason": ["x", "y"],
        "keep.nested": [{"a": [1]}, None],
        "keep.lang": ["en", "en"],
    }
    assert found.schema.field("row").type == pa.uint32()
    strings_ = {"text", "id", "keep.text", "keep.reason", "keep.lang"}
    assert {found.schema.field(name).type for name in strings_} == {pa.large_string()}


def test_partitions_can_be_text_and_filter(tmp_path: Path) -> None:
    for lang in ("en", "de"):
        write_shard(tmp_path / f"lang={lang}" / "a.parquet", {"t": [lang, lang]})
    job_input = Input(path=str(tmp_path), text="{lang}: {t}", filter=(("lang", "=", "en"),))
    assert _read(job_input).column("text").to_pylist() == ["en: en", "en: en"]
    alone = Input(path=str(tmp_path), text="lang")
    assert _read(alone).column("text").to_pylist() == ["de", "de", "en", "en"]


def test_text_that_is_not_utf8_is_a_bad_row_and_a_kept_column_is_left_as_it_is(
    tmp_path: Path,
) -> None:
    write_shard(tmp_path / "a.parquet", {"t": strings(b"ok", b"\xff\xfe", b"fine")})
    found = _read(Input(path=str(tmp_path), text="t", keep=("t",)))
    assert found.column("text").to_pylist() == ["ok", None, "fine"]
    assert found.column("reason").to_pylist() == [None, "invalid_utf8", None]
    assert found.column("keep.t").cast(pa.large_binary()).to_pylist()[1] == b"\xff\xfe"


class _Counting(io.RawIOBase):
    """A handle that counts the bytes that pass through it."""

    def __init__(self, inner: BinaryIO, fetched: list[int]) -> None:
        self._inner = inner
        self._fetched = fetched

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = 0) -> int:
        return self._inner.seek(place, whence)

    def tell(self) -> int:
        return self._inner.tell()

    def read(self, size: int = -1) -> bytes:
        data = self._inner.read(size)
        self._fetched.append(len(data))
        return data


def _fetched(job_input: Input, monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
    fetched: list[int] = []

    @contextmanager
    def counting(file: objects.Stored) -> Iterator[BinaryIO]:
        with objects.open_unchanged(file) as handle:
            yield _Counting(handle, fetched)  # type: ignore[misc]

    chunks = plan_of(job_input, **options).chunks
    monkeypatch.setattr(reading, "open_unchanged", counting)
    for together in passes(chunks):
        for _ in read_pass(together, job_input):
            pass
    return sum(fetched) + sum({chunk.shard: chunk.footer_bytes for chunk in chunks}.values())


def _column_bytes(path: Path, names: Sequence[str], groups: range) -> int:
    metadata = pq.read_metadata(path)
    columns = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path in names]
    return sum(
        metadata.row_group(group).column(i).total_compressed_size
        for group in groups
        for i in columns
    )


def _wide(path: Path, *, group_rows: int) -> None:
    rows = range(20_000)
    table = {
        "ballast": [str(hash((i, "a"))) * 20 for i in rows],
        "n": rows,
        "t": [str(hash((i, "b"))) * 5 for i in rows],
        "more": [str(hash((i, "c"))) * 20 for i in rows],
    }
    write_shard(path, table, group_rows=group_rows)


def test_only_needed_columns_and_row_groups_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    _wide(path, group_rows=2_000)
    everything = Input(path=str(path), text="t")
    needed = _column_bytes(path, ["t"], range(10))
    assert _fetched(everything, monkeypatch, chunk_rows=4_000) <= 1.2 * needed
    some = Input(path=str(path), text="t", filter=(("n", ">=", 17_000),))
    needed = _column_bytes(path, ["t", "n"], range(8, 10))
    assert _fetched(some, monkeypatch, chunk_rows=4_000) <= 1.2 * needed


def test_nothing_is_fetched_behind_the_end_of_a_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    _wide(path, group_rows=20_000)
    monkeypatch.setattr(reading, "_STREAM_BYTES", 2**16)
    needed = _column_bytes(path, ["t"], range(1))
    fetched = _fetched(Input(path=str(path), text="t"), monkeypatch, chunk_rows=100, limit=100)
    assert fetched < needed


def test_a_row_group_in_many_pieces_is_fetched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job with pyarrow's own default file, of one row group, costs its bytes about once."""
    path = tmp_path / "a.parquet"
    _wide(path, group_rows=20_000)
    monkeypatch.setattr(reading, "_STREAM_BYTES", 2**16)
    needed = _column_bytes(path, ["t", "n"], range(1))
    job_input = Input(path=str(path), text="t", id="n")
    assert len(plan_of(job_input, chunk_rows=300).chunks) == 67
    assert _fetched(job_input, monkeypatch, chunk_rows=300) <= 1.2 * needed


def test_a_shard_replaced_between_two_pieces_gives_no_further_piece(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_shard(path, {"t": [f"text {i}" for i in range(100)]}, group_rows=100)
    job_input = Input(path=str(path), text="t")
    (together,) = passes(plan_of(job_input, chunk_rows=10).chunks)
    assert len(together) == 10
    for cut in (1, 9):
        tables = read_pass(together, job_input)
        assert [next(tables).num_rows for _ in range(cut)] == [10] * cut
        write_shard(path, {"t": [f"text {i}" for i in range(100)]}, group_rows=100)
        with pytest.raises(InputChangedError):
            next(tables)
        together = passes(plan_of(job_input, chunk_rows=10).chunks)[0]


def test_a_shard_replaced_after_planning_is_said_to_have_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_shard(path, {"t": ["a", "b"]})
    job_input = Input(path=str(path), text="t")
    chunk = only(plan_of(job_input).chunks)
    write_shard(path, {"t": ["c", "d"]})
    with pytest.raises(InputChangedError):
        read_chunk(chunk, job_input)


def test_an_object_replaced_after_planning_in_a_bucket(bucket: str, tmp_path: Path) -> None:
    def put(texts: list[str]) -> None:
        write_shard(tmp_path / "a.parquet", {"t": texts})
        objects.replace(f"{bucket}/a.parquet", (tmp_path / "a.parquet").read_bytes())

    put(["a", "b"])
    job_input = Input(path=f"{bucket}/a.parquet", text="t")
    chunk = only(plan_of(job_input).chunks)
    assert read_chunk(chunk, job_input).column("text").to_pylist() == ["a", "b"]
    put(["c", "d"])
    with pytest.raises(InputChangedError):
        read_chunk(chunk, job_input)


def test_a_connection_that_breaks_is_no_fault_of_the_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    write_shard(path, {"t": [str(i) * 50 for i in range(100)]})
    job_input = Input(path=str(path), text="t")
    (chunk,) = plan_of(job_input, chunk_rows=100).chunks

    class Broken(_Counting):
        def read(self, size: int = -1) -> bytes:
            raise ConnectionResetError("by peer")

    @contextmanager
    def broken(file: objects.Stored) -> Iterator[BinaryIO]:
        with objects.open_unchanged(file) as handle:
            yield Broken(handle, [])  # type: ignore[misc]

    monkeypatch.setattr(reading, "open_unchanged", broken)
    with pytest.raises(ConnectionResetError):
        read_chunk(chunk, job_input)


def test_damage_inside_a_shard_is_that_chunks_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_shard(path, {"t": [str(i) * 50 for i in range(100)]})
    whole = path.read_bytes()
    path.write_bytes(whole[:20] + b"\xff" * 400 + whole[420:])
    job_input = Input(path=str(path), text="t")
    chunk = only(plan_of(job_input, chunk_rows=100).chunks)
    with pytest.raises(ChunkError, match=r"a\.parquet, rows 0 to 100: cannot be read"):
        read_chunk(chunk, job_input)


YEARS = [datetime.datetime(1, 1, 1), datetime.datetime(9999, 12, 31, 23, 59, 59, 999_999)]


@pytest.mark.parametrize(
    ("column", "stored"),
    [
        (pa.array(YEARS, pa.timestamp("us")), False),
        (pa.array(YEARS, pa.timestamp("us")), True),
        (pa.array([[moment] for moment in YEARS], pa.list_(pa.timestamp("us"))), False),
        (pa.array([{"at": moment} for moment in YEARS]), False),
        (pa.array([1, 999], pa.timestamp("ns")), True),
    ],
)
def test_moments_in_int96_are_exact(tmp_path: Path, column: pa.Array, stored: bool) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"t": ["a", "b"], "at": column, "unused": pa.array([1, 2], pa.date64())})
    pq.write_table(table, path, use_deprecated_int96_timestamps=True, store_schema=stored)
    job_input = Input(path=str(path), text="t", keep=("at",))
    plan = plan_of(job_input)
    found = _read(job_input).column("keep.at")
    assert found.type == plan.types["at"]
    assert found.combine_chunks().to_pylist() == column.to_pylist()


def test_int96_of_several_units_cannot_be_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    both = {unit: pa.array([1], pa.timestamp(unit)) for unit in ("us", "ns")}
    pq.write_table(pa.table({"t": ["a"], **both}), path, use_deprecated_int96_timestamps=True)
    alone = Input(path=str(path), text="t", keep=("ns",))
    assert _read(alone).column("keep.ns").cast(pa.int64()).to_pylist() == [1]
    both_kept = Input(path=str(path), text="t", keep=("us", "ns"))
    footer = footers_of(find_files(str(path)).shards, both_kept)[str(path)]
    assert "int96 timestamps of several units (ns, us)" in str(footer)


@pytest.mark.slow
def test_text_longer_than_its_offsets(tmp_path: Path) -> None:
    """2.1 GiB of two texts, in a file of a few kilobytes: Arrow's dictionaries count in 31 bits."""
    path = tmp_path / "a.parquet"
    words = pa.array(["a" * 2**20, "b" * 2**20])
    text = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 1050, pa.int8()), words)
    write_shard(path, {"t": text}, group_rows=3000)
    job_input = Input(path=str(path), text="t")
    found = read_chunk(only(plan_of(job_input, chunk_rows=3000).chunks), job_input)
    assert found.column("text").nbytes > 2**31
    assert found.column("text")[2099].as_py() == "b" * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["list", "struct", "map"])
@pytest.mark.parametrize("chunk_rows", [3000, 200])
def test_texts_inside_of_columns_longer_than_their_offsets(
    kind: str, chunk_rows: int, tmp_path: Path
) -> None:
    """2.1 GiB in one row group, which Arrow reads of no nested column at once."""
    words = pa.array(["a" * 2**20] * 1050)
    places = pa.array(range(1051), pa.int32())
    column = {
        "list": lambda: pa.ListArray.from_arrays(places, words),
        "struct": lambda: pa.StructArray.from_arrays([words], ["x"]),
        "map": lambda: pa.MapArray.from_arrays(places, pa.array(["k"] * 1050), words),
    }[kind]()
    path = tmp_path / "a.parquet"
    texts = [f"text {n}" for n in range(2100)]
    table = pa.table({"t": texts, "m": pa.chunked_array([column, column])})
    write_shard(path, table, group_rows=3000)
    job_input = Input(path=str(path), text="t", keep=("m",))
    done, lengths = 0, 0
    for together in passes(plan_of(job_input, chunk_rows=chunk_rows).chunks):
        for found in read_pass(together, job_input):
            assert found.column("text").to_pylist() == texts[done : done + len(found)]
            done, lengths = done + len(found), lengths + found.column("keep.m").nbytes
            assert found.column("keep.m")[-1].as_py() == column[0].as_py()
    assert done == 2100
    assert lengths > 2**31


@pytest.mark.parametrize("chunk_rows", [3, 100])
def test_dictionaries_inside_of_columns_are_read_over_row_groups(
    tmp_path: Path, chunk_rows: int
) -> None:
    """Arrow reads them from one row group at a time."""
    words = pa.array([f"word {i % 7}" for i in range(40)]).dictionary_encode()
    lists = pa.ListArray.from_arrays(pa.array(range(0, 41, 2)), words)
    path = tmp_path / "a.parquet"
    columns = {"t": ["a"] * 20, "l": lists, "s": pa.StructArray.from_arrays([words[:20]], ["x"])}
    write_shard(path, columns, group_rows=6)
    job_input = Input(path=str(path), text="t", keep=("l", "s"))
    found = _read(job_input, chunk_rows=chunk_rows, limit=17)
    assert found.column("keep.l").to_pylist() == lists.to_pylist()[:17]
    assert found.column("keep.s").to_pylist() == [{"x": f"word {i % 7}"} for i in range(17)]


NULL = pa.null()
AWKWARD = {
    "lists of null": pa.array([[None, None], [None], [], None], pa.list_(NULL)),
    "large lists of null": pa.array(
        [[[None, None]], None, [], [[]]], pa.list_(pa.large_list(NULL))
    ),
    "nulls of a fixed size": pa.array([[None, None]] * 4, pa.list_(NULL, 2)),
    "structs of null": pa.array(
        [[{"x": None}] * 3, [], None, []], pa.list_(pa.struct({"x": NULL}))
    ),
    "maps to null": pa.array([[("a", None), ("b", None)], None, [], []], pa.map_(TEXT, NULL)),
    "list views": pa.array([[1], [], None, [2, 3]], pa.list_view(pa.int8())),
    "large list views": pa.array([["a", None], ["b"], [], []], pa.large_list_view(pa.string())),
    "views of views": pa.array(
        [[[1], None], [[2, 3]], [], [[]]], pa.list_view(pa.large_list_view(pa.int8()))
    ),
    "views inside": pa.array(
        [{"x": [1, None]}, None, {"x": []}, {"x": None}], pa.struct({"x": pa.list_view(pa.int8())})
    ),
}


@pytest.mark.parametrize("group_rows", [1, 3, 4])
@pytest.mark.parametrize("what", AWKWARD)
def test_what_arrow_reads_and_does_not_cast(what: str, group_rows: int, tmp_path: Path) -> None:
    """Nulls inside of columns, and list views, which Arrow makes other lists of without a word."""
    columns = {"t": ["a", "b", "c", "d"], "m": AWKWARD[what]}
    write_shard(tmp_path / "a.parquet", columns, group_rows=group_rows)
    job_input = Input(path=str(tmp_path), text="t", keep=("m",))
    for options in ({}, {"chunk_rows": 2, "limit": 3}):
        found = _read(job_input, **options).column("keep.m")
        found.validate(full=True)
        assert found.to_pylist() == AWKWARD[what].to_pylist()[: len(found)]
        written = in_type(found, plan_of(job_input).types["m"])
        written.validate(full=True)
        assert written.to_pylist() == found.to_pylist()
