"""JSON Lines are shards like Parquet files: every row once, in exact types, or a named fault.

Invariants: the rows of all chunks are the objects of the file, in their order, whatever the blocks,
the chunks, the compression, blank lines and line ends are. A file that is damaged anywhere is a
fault of its shard, or has the rows that are whole lines; no row has another value than its line.
Covers: embedjob.input.json_types
"""

import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedjob.config.job import Input, with_headings
from embedjob.errors import ChunkError, InputChangedError, InputError
from embedjob.input import json_lines
from embedjob.input.chunks import passes
from embedjob.input.columns import Standing, columns_of
from embedjob.input.footers import Footer
from embedjob.input.json_lines import is_json_lines, scan_lines
from embedjob.input.listing import described_unread, find_files, read_footers
from embedjob.input.reading import read_chunk, read_pass
from embedjob.job.planning import JobPlan
from embedjob.output.committing import commit
from embedjob.output.file_names import data_directory
from embedjob.storage.objects import create, list_files
from tests.shards import (
    FINGERPRINT,
    finished,
    footers_of,
    only,
    output_spec,
    plan_of,
    write_shard,
)

CODECS = ("", ".gz", ".zst")


def _compressed(name: str, data: bytes) -> bytes:
    if name.endswith(".gz"):
        # Two members, as `cat a.gz b.gz` makes them.
        half = len(data) // 2
        return gzip.compress(data[:half]) + gzip.compress(data[half:])
    return pa.compress(data, "zstd", asbytes=True) if name.endswith(".zst") else data


def _file(path: Path, rows: Sequence[Any], *, end: str = "\n", **how: Any) -> Path:
    """A file of these rows; a string is a line as it is."""
    lines = [one if isinstance(one, str) else json.dumps(one, **how) for one in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(line + end for line in lines).encode("utf-8", "surrogateescape")
    path.write_bytes(_compressed(path.name, data))
    return path


def _rows(plan: JobPlan, job_input: Input) -> pa.Table:
    """Every row, read as a run does; each chunk read alone gives the same."""
    tables = [table for one in passes(plan.chunks) for table in read_pass(one, job_input)]
    for chunk, table in zip(plan.chunks, tables, strict=True):
        assert read_chunk(chunk, job_input).equals(table)
    return pa.concat_tables(tables, promote_options="default")


texts = st.text(st.characters(codec="utf-8"), max_size=20) | st.none()
objects = st.fixed_dictionaries(
    {"t": texts},
    optional={
        "n": st.integers(-(2**63), 2**63 - 1) | st.none(),
        "x": st.floats(allow_nan=False) | st.integers(-(2**53), 2**53),
        "tags": st.lists(st.text(st.characters(codec="utf-8"), max_size=3), max_size=3),
        "more": st.fixed_dictionaries({}, optional={"a": st.integers(0, 9), "b": st.booleans()}),
    },
)
lines = st.lists(objects | st.sampled_from(["", "  ", "\t", "\ufeff", "\ufeff \r"]), max_size=40)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    rows=lines,
    file=st.tuples(
        st.sampled_from(CODECS), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans()
    ),
    blocks=st.tuples(st.integers(1, 30), st.integers(1, 400), st.integers(1, 500)),
    chunk_rows=st.integers(1, 12),
)
def test_the_rows_of_all_chunks_are_the_objects_of_the_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[Any],
    file: tuple[str, str, bool, bool],
    blocks: tuple[int, int, int],
    chunk_rows: int,
) -> None:
    codec, end, ascii_only, last_end = file
    path = tmp_path / f"a.jsonl{codec}"
    # A first row with all columns: a column that no row has is a fault.
    first = {"t": "first", "n": 1, "x": 0.5, "tags": ["a"], "more": {"a": 1, "b": True}}
    written = [first, *(row for row in rows if isinstance(row, dict))]
    data = "".join(
        (one if isinstance(one, str) else json.dumps(one, ensure_ascii=ascii_only)) + end
        for one in [first, *rows]
    ).encode()
    path.write_bytes(_compressed(path.name, data if last_end else data.removesuffix(end.encode())))
    job_input = Input(path=str(path), text="t", keep=("n", "x", "tags", "more", "t"))
    for name, value in zip(("_BLOCK_ROWS", "_BLOCK_BYTES", "_READ_BYTES"), blocks, strict=True):
        monkeypatch.setattr(json_lines, name, value)
    plan = plan_of(job_input, chunk_rows=chunk_rows)
    assert not plan.faults
    found = _rows(plan, job_input)
    assert found["row"].to_pylist() == list(range(len(written)))
    assert found["text"].to_pylist() == found["keep.t"].to_pylist() == [r["t"] for r in written]
    assert found["reason"].to_pylist() == [
        "null_text" if row["t"] is None else None for row in written
    ]
    for name in ("n", "x", "tags"):
        assert found[f"keep.{name}"].to_pylist() == [row.get(name) for row in written]
    whole = {"a": None, "b": None}
    assert found["keep.more"].to_pylist() == [
        {**whole, **row["more"]} if "more" in row else None for row in written
    ]


@pytest.mark.parametrize("codec", CODECS)
def test_a_file_that_is_cut_anywhere_is_a_fault_or_has_the_rows_that_are_whole(
    tmp_path: Path, codec: str
) -> None:
    rows = [{"t": f"text {i} é", "n": i} for i in range(30)]
    whole = _file(tmp_path / f"a.jsonl{codec}", rows, ensure_ascii=False).read_bytes()
    cut = tmp_path / f"cut.jsonl{codec}"
    wanted = columns_of(Input(path="p", text="t", id="n")).wanted
    faults = 0
    for size in range(len(whole)):
        cut.write_bytes(whole[:size])
        footer = read_one(cut, wanted)
        if isinstance(footer, str):
            faults += 1
            assert footer.startswith(("not JSON Lines: line ", "not whole: ", "not JSON Lines: em"))
        else:
            # At the end of a line, with or without it; of a gzip file, of a whole member.
            before = gzip.decompress(whole[:size]) if codec == ".gz" else whole[:size]
            assert footer.rows == len(before.splitlines())
            assert before.endswith((b"\n", b"}")) or not before
    assert faults > len(whole) * 0.9


def read_one(path: Path, wanted: Any) -> Footer | str:
    (shard,) = find_files(str(path)).shards
    return scan_lines(shard.stored, wanted)


NOT_ROWS: tuple[tuple[str, str], ...] = (
    ("null", "line 2: got null; allowed is one object, a row, in each line; "),
    ('[{"t": "a"}]', "line 2: got a list; allowed is .*jq -c"),
    ("1", "line 2: got a number"),
    ('{"t": "a"}{"t": "b"}', "line 2: Extra data"),
    ('{"t": "a"}, ', "line 2: Extra data"),
    ('{"t": ', "line 2: Expecting value"),
    ("{'t': 1}", "line 2: Expecting property name"),
    ('{"t": "a\tb"}', "line 2: Invalid control character"),
    ('{"t": 1}', "line 2, column 't': got a whole number, and a text in the lines before"),
    ('{"n": "1"}', "line 2, column 'n': got a text, and a whole number in the lines before"),
    ('{"n": true}', "line 2, column 'n': got true or false, and a whole number"),
    ('{"n": [1]}', "line 2, column 'n': got a list"),
    ('{"n": 18446744073709551615}', "line 2, column 'n': .* 64 bits do not hold; write it as a"),
    ('{"n": 1e999}', "line 2, column 'n': a number is larger than 64 bits hold; write it as a"),
    ('{"n": 1, "k": [[-1E400]]}', "line 2, column 'k': a number is larger than 64 bits hold"),
    ('{"k": "\udc80"}', "line 2, column 'k': a text is not UTF-8"),
    ('{"k": {"\udc80": 1}}', "line 2, column 'k': a name in an object is not UTF-8"),
    ('{"k": {"a": {"\\ud800": 1}}}', "line 2, column 'k': a name in an object is not UTF-8"),
    (
        json.dumps({"k": {str(n): n for n in range(1001)}}),
        "line 2, column 'k': objects with more t",
    ),
    ('{"k": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 2 is nested too deeply"),
    ('{"k": ' + "[" * 400 + "]" * 400 + "}", "line 2 is nested too deeply"),
)


@pytest.mark.parametrize(("line", "said"), NOT_ROWS, ids=[line[:20] for line, _ in NOT_ROWS])
@pytest.mark.parametrize("codec", CODECS)
def test_a_line_that_is_no_row_is_named_by_its_number(
    tmp_path: Path, line: str, said: str, codec: str
) -> None:
    bad = _file(tmp_path / f"bad.jsonl{codec}", [{"t": "a", "n": 1, "k": None}, line])
    _file(tmp_path / "good.jsonl", [{"t": "a", "n": 1, "k": "b"}])
    job_input = Input(path=str(tmp_path), text="t", keep=("n", "k"))
    plan = plan_of(job_input)
    (fault,) = plan.faults
    assert fault[0] == str(bad)
    assert pytest.RaisesExc(Exception, match=said).matches(Exception(fault[1])), fault[1]
    # The other shard is read.
    assert only(plan.chunks).shard.url.endswith("good.jsonl")


def test_a_text_that_is_no_text_is_a_bad_row(tmp_path: Path) -> None:
    rows = ['{"t": "\udcff\udc80"}', '{"t": "\\ud800"}', '{"t": "\\udc80\udcff"}', {"t": "good é"}]
    _file(tmp_path / "a.jsonl", rows)
    job_input = Input(path=f"{tmp_path}/a.jsonl", text="t")
    found = _rows(plan_of(job_input), job_input)
    assert found["reason"].to_pylist() == ["invalid_utf8"] * 3 + [None]
    assert found["text"].to_pylist() == [None] * 3 + ["good é"]


VALUES: tuple[tuple[list[Any], pa.DataType], ...] = (
    (["2024-01-31", "2024-01-31 10:00:00"], pa.large_string()),
    ([9_007_199_254_740_993, -1], pa.int64()),
    ([1, 0.5], pa.float64()),
    ([2**53, -0.5], pa.float64()),
    ([None, True], pa.bool_()),
    ([[], [None], [1]], pa.list_(pa.field("element", pa.int64()))),
    ([[1], [0.5]], pa.list_(pa.field("element", pa.float64()))),
    ([{"a": "2024-01-31"}, {"b": [1]}], pa.struct(
        [("a", pa.large_string()), ("b", pa.list_(pa.field("element", pa.int64())))]
    )),
)  # fmt: skip


@pytest.mark.parametrize(("values", "kind"), VALUES, ids=[str(kind) for _, kind in VALUES])
def test_types_by_the_rule(tmp_path: Path, values: list[Any], kind: pa.DataType) -> None:
    _file(tmp_path / "a.jsonl", [{"t": "a", "k": value} for value in values])
    job_input = Input(path=f"{tmp_path}/a.jsonl", text="t", keep=("k",))
    plan = plan_of(job_input)
    assert plan.types == {"k": kind}
    found = _rows(plan, job_input)["keep.k"]
    assert found.type == kind
    padded = pa.array(values, kind).to_pylist()
    assert found.to_pylist() == padded


def test_whole_numbers_and_fractions_are_one_column_where_none_is_rounded(tmp_path: Path) -> None:
    _file(tmp_path / "a.jsonl", [{"t": "a", "k": 2**53}, {"t": "a", "k": None}])
    _file(tmp_path / "b.jsonl", [{"t": "a", "k": 0.5}])
    _file(tmp_path / "c.jsonl", [{"t": "a", "k": math.pi}])
    _file(tmp_path / "long.jsonl", [{"t": "a", "k": 2**53 + 1}])
    job_input = Input(path=str(tmp_path), text="t", keep=("k",))
    plan = plan_of(job_input)
    assert plan.types == {"k": pa.float64()}
    assert [url.rsplit("/")[-1] for url, _ in plan.faults] == ["long.jsonl"]
    # In one file it is a line.
    _file(tmp_path / "long.jsonl", [{"t": "a", "k": 2**53 + 1}, {"t": "a", "k": 0.5}])
    assert "line 2, column 'k'" in dict(plan_of(job_input).faults)[f"{tmp_path}/long.jsonl"]
    # What stands in an output stays.
    standing = Standing({"k": pa.int64()})
    kept = plan_of(job_input, standing=standing)
    assert [url.rsplit("/")[-1] for url, _ in kept.faults] == ["b.jsonl", "c.jsonl", "long.jsonl"]


def test_a_missing_column_is_said_with_those_that_are_there(tmp_path: Path) -> None:
    _file(tmp_path / "a.jsonl", [{"body": "a", "url": "u"}])
    with pytest.raises(InputError, match=r"no column 't'; there are: body, url"):
        plan_of(Input(path=str(tmp_path), text="t"))


def test_names_that_are_no_text_are_shown(tmp_path: Path) -> None:
    _file(tmp_path / "a.jsonl", ['{"\udcff": 1, "\\ud800": 2, "body": "a"}'])
    with pytest.raises(InputError, match=r"there are: \\ud800, \\udcff, body"):
        plan_of(Input(path=str(tmp_path), text="t"))


@pytest.mark.parametrize("codec", CODECS)
def test_a_file_without_a_row_is_no_fault(tmp_path: Path, codec: str) -> None:
    """Spark, and others who write in parallel, leave such files beside those with rows."""
    for name, data in (("a", b""), ("b", b"\n \r\n"), ("c", b"\xef\xbb\xbf")):
        path = tmp_path / f"{name}.jsonl{codec}"
        path.write_bytes(_compressed(path.name, data))
    empty = plan_of(Input(path=str(tmp_path), text="t", id="n", filter=(("n", ">", 0),)))
    assert (empty.rows, empty.faults) == (0, ())
    _file(tmp_path / "d.jsonl", [{"t": "x", "n": 1}])
    job_input = Input(path=str(tmp_path), text="t", id="n", filter=(("n", ">", 0),))
    plan = plan_of(job_input)
    assert plan.faults == ()
    assert plan.types == {"n": pa.int64()}
    assert [
        row for chunk in plan.chunks for row in read_chunk(chunk, job_input)["id"].to_pylist()
    ] == [1]


ROW = b'{"t": "a", "k": %d}\r\n'
SKIPPED = b"\x50\x2a\x4d\x18\x04\0\0\0what"
FRAMES: dict[str, tuple[str, bytes, int]] = {
    "members of gzip, an empty one among them": (
        *(".gz", gzip.compress(ROW % 0) + gzip.compress(b"") + gzip.compress(ROW % 1 + ROW % 2), 3),
    ),
    "a member that ends within a line": (
        *(".gz", gzip.compress(ROW % 0 + b'{"t": "a",') + gzip.compress(b'"k": 1}'), 2),
    ),
    "frames of zstd, and one to skip": (
        *(".zst", SKIPPED + pa.compress(ROW % 0, "zstd", asbytes=True) + SKIPPED, 1),
    ),
    "a frame that ends within a line": (
        ".zst",
        b"".join(pa.compress(one, "zstd", asbytes=True) for one in (ROW % 0 + b'{"t": ', b'"a"}')),
        2,
    ),
}


@pytest.mark.parametrize("what", FRAMES)
def test_all_parts_of_a_compressed_file_are_read(tmp_path: Path, what: str) -> None:
    codec, data, rows = FRAMES[what]
    (tmp_path / f"a.jsonl{codec}").write_bytes(data)
    job_input = Input(path=str(tmp_path), text="t", keep=("k",))
    found = _rows(plan_of(job_input), job_input)
    assert found["text"].to_pylist() == ["a"] * rows
    assert found["keep.k"].to_pylist()[: rows - 1] == [*range(rows - 1)]


def test_objects_without_a_field_are_null_and_can_be_written(tmp_path: Path) -> None:
    """Parquet has no struct of nothing: a chunk of such a column would fail when it is embedded."""
    values: list[Any] = [{}, {"a": {}}, {"b": [{}, None]}, {"c": 1}, None]
    _file(tmp_path / "a.jsonl", [{"t": "x", "k": value, "e": {}} for value in values])
    job_input = Input(path=str(tmp_path), text="t", keep=("k", "e"))
    plan = plan_of(job_input)
    found = _rows(plan, job_input)
    whole = {"a": None, "b": None, "c": None}
    assert found["keep.k"].to_pylist() == [
        *(whole, whole, {**whole, "b": [None, None]}, {**whole, "c": 1}, None),
    ]
    assert found["keep.e"].to_pylist() == [None] * 5
    spec = output_spec(job_input, plan.types)
    commit(f"{tmp_path}/out", only(plan.chunks), finished(found), rows_in=5, spec=spec)
    (file,) = list_files(data_directory(f"{tmp_path}/out", FINGERPRINT))
    assert pq.read_table(file.url)["k"].to_pylist() == found["keep.k"].to_pylist()


def test_of_a_name_that_is_there_twice_the_last_value_counts(tmp_path: Path) -> None:
    _file(tmp_path / "a.jsonl", ['{"t": 1, "t": "a", "k": {"x": 1, "x": "b"}}'])
    job_input = Input(path=str(tmp_path), text="t", keep=("k",))
    found = _rows(plan_of(job_input), job_input)
    assert (found["text"].to_pylist(), found["keep.k"].to_pylist()) == (["a"], [{"x": "b"}])


def test_what_stands_before_passages_is_a_bad_row_like_a_text(tmp_path: Path) -> None:
    _file(tmp_path / "a.jsonl", ['{"t": "a", "title": "\udcff"}', {"t": "b", "title": None}])
    job_input = with_headings(Input(path=str(tmp_path), text="t"), ("title",))
    found = _rows(plan_of(job_input), job_input)
    assert found["reason"].to_pylist() == ["invalid_utf8", None]


def test_lines_and_parquet_are_one_corpus(tmp_path: Path) -> None:
    rows = [{"t": f"text {i}", "n": i, "at": "2024-01-31"} for i in range(50)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    write_shard(tmp_path / "in" / "a.parquet", columns)
    _file(tmp_path / "in" / "lang=de" / "b.jsonl.gz", rows)
    _file(tmp_path / "in" / "c.jsonl", rows)
    paths = tuple(f"{tmp_path}/in/{one}" for one in ("a.parquet", "lang=de", "*.jsonl"))
    job_input = Input(path=paths, text="t", id="n", keep=("at",), filter=(("n", ">=", 7),))
    plan = plan_of(job_input, chunk_rows=3)
    by_shard: dict[str, list[pa.Table]] = {}
    for chunk in plan.chunks:
        by_shard.setdefault(chunk.shard.url[-1], []).append(read_chunk(chunk, job_input))
    tables = [pa.concat_tables(tables) for tables in by_shard.values()]
    assert len(tables) == 3
    assert all(table.equals(tables[0]) for table in tables)
    assert tables[0]["id"].to_pylist() == list(range(7, 50))
    partition = Input(path=f"{tmp_path}/in/lang=de", text="t", keep=("lang",))
    assert set(_rows(plan_of(partition), partition)["keep.lang"].to_pylist()) == {"de"}


def test_which_files_count(tmp_path: Path) -> None:
    names = ("a.jsonl", "b.ndjson.gz", "c.json.zst", "d.json", "e.txt", "_f.jsonl")
    for name in names:
        _file(tmp_path / name, [{"t": "a"}])

    def shards(pattern: str) -> list[str]:
        return [shard.url.rsplit("/")[-1] for shard in find_files(f"{tmp_path}{pattern}").shards]

    assert shards("") == ["a.jsonl", "b.ndjson.gz", "c.json.zst"]
    assert shards("/*.json") == ["d.json"]
    assert [is_json_lines(name) for name in names] == [True, True, True, True, False, True]
    # Beside Parquet they are counted, not read: outputs of such folders stay what they are.
    write_shard(tmp_path / "x.parquet", {"t": ["a"]})
    assert shards("") == ["x.parquet"]
    said = described_unread(find_files(str(tmp_path)).unread)
    assert "JSON Lines beside Parquet; name them in input.path" in said
    (tmp_path / "lost.jsonl").symlink_to("/nowhere")
    found = find_files(f"{tmp_path}/*.jsonl").shards
    assert [shard.url.rsplit("/")[-1] for shard in found] == ["a.jsonl", "lost.jsonl"]
    wanted = columns_of(Input(path="p", text="t")).wanted
    footers = read_footers([shard.stored for shard in found], wanted)
    assert "a link that leads nowhere" in str(footers[f"{tmp_path}/lost.jsonl"])
    assert footers[f"{tmp_path}/a.jsonl"].rows == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("codec", CODECS)
def test_a_file_that_was_replaced_is_not_read(tmp_path: Path, codec: str) -> None:
    path = _file(tmp_path / f"a.jsonl{codec}", [{"t": "a"}] * 30)
    job_input = Input(path=str(path), text="t")
    plan = plan_of(job_input)
    _file(path, [{"t": "b"}] * 30)
    for chunk in plan.chunks:
        with pytest.raises((InputChangedError, ChunkError), match="not the planned file"):
            read_chunk(chunk, job_input)


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
def test_lines_in_a_bucket(bucket: str, tmp_path: Path, codec: str) -> None:
    rows = [{"t": f"text {i} " + "x" * 3000, "n": i} for i in range(3000)]
    data = _file(tmp_path / f"a.jsonl{codec}", rows).read_bytes()
    create(f"{bucket}/docs/a.jsonl{codec}", data)
    job_input = Input(path=f"{bucket}/docs", text="t", id="n")
    plan = plan_of(job_input, chunk_rows=1000)
    # Of a plain file each chunk fetches its own bytes.
    spans = [(chunk.lines.begin, chunk.lines.end) for chunk in plan.chunks if chunk.lines]
    if codec:
        assert set(spans) == {(0, len(data))}
    else:
        assert [begin for begin, _ in spans] == [0, *(end for _, end in spans[:-1])]
        assert spans[-1][1] == len(data)
    found = _rows(plan, job_input)
    assert found["id"].to_pylist() == list(range(3000))
    assert found["text"].to_pylist() == [row["t"] for row in rows]


def test_blocks_of_every_file_end_where_they_always_did(tmp_path: Path) -> None:
    # A border is part of a file's name: these numbers stay.
    _file(tmp_path / "a.jsonl", [{"t": f"{i:06}"} for i in range(2500)])
    _file(tmp_path / "b.jsonl", [{"t": "x" * 2**20}] * 9)
    _file(tmp_path / "c.jsonl.zst", [{"t": f"{i:06}"} for i in range(2500)])
    _file(tmp_path / "d.jsonl", [])
    job_input = Input(path=str(tmp_path), text="t")
    footers = footers_of(find_files(str(tmp_path)).shards, job_input)
    groups = {url[-9:]: footer for url, footer in footers.items() if isinstance(footer, Footer)}
    assert [footer.group_rows for footer in groups.values()] == [
        *((1000, 1000, 500), (4, 4, 1), (2500,), ()),
    ]
    assert [footer.group_text_bytes for footer in groups.values()] == [
        *((16_000, 16_000, 8_000), tuple(n * (2**20 + 10) for n in (4, 4, 1)), (40_000,), ()),
    ]
