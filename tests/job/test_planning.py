"""What is left to do, from listings and footers alone.

Covers: embedjob.input.columns
"""

from collections.abc import Sequence

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedjob.config.job import Input
from embedjob.errors import InputError
from embedjob.input.chunks import Chunk, Shard
from embedjob.input.column_types import TEXT, plain_type
from embedjob.input.columns import Standing
from embedjob.input.footers import Footer
from embedjob.job.input_listing import InputListing
from embedjob.job.planning import JobPlan, plan
from embedjob.output.fingerprint import projection
from embedjob.storage.objects import Stored
from tests.shards import job_of

INPUT = Input(path="/in", text="t", keep=("k",))
SCHEMA = pa.schema({"t": pa.string(), "k": pa.int64()})
LAYOUTS = st.lists(st.lists(st.integers(0, 200), max_size=6), max_size=6)


def _shard(number: int, etag: str = "e") -> Shard:
    return Shard(url=f"/in/{number:03d}.parquet", size=100, etag=etag)


def _footer(groups: Sequence[int] = (5,), schema: pa.Schema = SCHEMA) -> Footer:
    return Footer(tuple(groups), tuple(rows * 10 for rows in groups), schema, 500)


def _plan(
    footers: Sequence[Footer | str],
    *,
    job_input: Input = INPUT,
    listed: Sequence[Stored] = (),
    limit: int | None = None,
    chunk_rows: int = 10,
    standing: Standing | None = None,
) -> JobPlan:
    shards = tuple(_shard(number) for number in range(len(footers)))
    by_url = {shard.url: footer for shard, footer in zip(shards, footers, strict=True)}
    job = job_of(job_input, chunk_rows=chunk_rows, limit=limit)
    return plan(job, InputListing(shards, by_url), listed=listed, standing=standing)


def _stored(name: str) -> Stored:
    return Stored(f"/out/data/ffffffffffff/{name}", 1, "e")


def _rows(chunks: Sequence[Chunk]) -> list[tuple[str, int]]:
    return [(chunk.shard.url, row) for chunk in chunks for row in range(chunk.start, chunk.stop)]


@given(LAYOUTS, st.integers(1, 30), st.none() | st.integers(1, 500), st.data())
def test_left_is_planned_less_listed_and_every_row_is_read_once(
    layouts: list[list[int]], chunk_rows: int, limit: int | None, data: st.DataObject
) -> None:
    footers = [_footer(groups) for groups in layouts]
    first = _plan(footers, chunk_rows=chunk_rows, limit=limit)
    every = [(_shard(i).url, row) for i, groups in enumerate(layouts) for row in range(sum(groups))]
    assert _rows(first.chunks) == every[:limit]
    assert first.left == first.chunks
    done = data.draw(st.sets(st.sampled_from(first.chunks))) if first.chunks else set()
    listed = [_stored(name) for name in (*(chunk.name for chunk in done), "stray.parquet")]
    again = _plan(footers, chunk_rows=chunk_rows, limit=limit, listed=listed)
    assert again.chunks == first.chunks
    assert set(again.left) == set(first.chunks) - done
    assert set(again.done) == {chunk.name for chunk in done}
    assert [shard.url for shard in again.empty] == [
        _shard(i).url for i, groups in enumerate(layouts) if not sum(groups)
    ]


def test_a_cut_chunk_has_a_name_of_its_own() -> None:
    whole = _plan([_footer([8])]).chunks[0]
    cut = _plan([_footer([8])], limit=5).chunks[0]
    assert (cut.stop, cut.text_bytes) == (5, 50)
    assert cut.name == whole.name.replace("0000000008", "0000000005")


def test_estimates_of_a_split_group() -> None:
    chunks = _plan([_footer([100])]).chunks
    assert [chunk.text_bytes for chunk in chunks] == [100] * 10
    assert {chunk.footer_bytes for chunk in chunks} == {500}


def test_a_changed_shard_is_new_work_and_the_others_are_not() -> None:
    footers = {_shard(i).url: _footer() for i in range(3)}
    shards = tuple(_shard(i) for i in range(3))
    before = plan(job_of(INPUT), InputListing(shards, footers), listed=())
    listed = [_stored(chunk.name) for chunk in before.chunks]
    changed = (_shard(0), _shard(1, etag="new"), _shard(2))
    after = plan(job_of(INPUT), InputListing(changed, footers), listed=listed)
    assert [chunk.shard.url for chunk in after.left] == [_shard(1).url]


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ("not a whole Parquet file", "not a whole Parquet file"),
        (_footer(schema=pa.schema({"t": pa.string()})), "no column 'k'; there are: t"),
        (_footer(schema=pa.schema({"t": pa.int64(), "k": pa.int64()})), "column 't' is int64;"),
        (_footer(schema=pa.schema({"t": pa.string(), "k": pa.int32()})), "and int64 in most"),
        (_footer(schema=pa.schema([*SCHEMA, SCHEMA.field("k")])), "two columns are named 'k'"),
        (_footer([2**32]), "rows; allowed are at most"),
    ],
)
def test_an_odd_shard_is_a_named_fault(odd: Footer | str, reason: str) -> None:
    found = _plan([_footer(), odd, _footer()])
    assert [url for url, _ in found.faults] == [_shard(1).url]
    assert reason in found.faults[0][1]
    assert [chunk.shard.url for chunk in found.chunks] == [_shard(0).url, _shard(2).url]


@pytest.mark.parametrize(
    ("job_input", "message"),
    [
        (Input(path="p", text="body"), "no column 'body'; there are: t, k"),
        (Input(path="p", text="k"), "column 'k' is int64; text must be string"),
        (Input(path="p", text="t", filter=(("k", "=", "x"),)), "a value does not fit its column"),
        (Input(path="p", text="t", filter=(("z", "=", 1),)), "no column 'z'"),
        (Input(path="p", text="t", id="z"), "no column 'z'"),
    ],
)
def test_what_no_shard_can_give_is_refused(job_input: Input, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _plan([_footer(), "broken", _footer()], job_input=job_input)


def test_when_no_shard_can_be_read_there_are_only_faults() -> None:
    found = _plan(["broken", "cut short"])
    assert (found.chunks, len(found.faults)) == ((), 2)


def test_encodings_of_one_type_agree() -> None:
    schemas = [
        pa.schema({"t": text, "k": kept})
        for text, kept in [
            (pa.string(), pa.binary()),
            (pa.large_string(), pa.large_binary()),
            (pa.string_view(), pa.binary_view()),
            (pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.binary())),
        ]
    ]
    found = _plan([_footer(schema=schema) for schema in schemas])
    assert not found.faults
    assert found.types == {"k": pa.large_binary()}


def test_partitions_stand_in_for_columns() -> None:
    shard = Shard("/in/k=7/a.parquet", 1, "e", (("k", "7"),))
    footer = _footer(schema=pa.schema({"t": pa.string()}))
    found = plan(job_of(INPUT), InputListing((shard,), {shard.url: footer}), listed=())
    assert found.types == {"k": pa.large_string()}
    assert len(found.chunks) == 1


LISTS = [
    pa.list_(pa.field("item", pa.string())),
    pa.list_(pa.field("element", pa.large_string(), nullable=False)),
    pa.large_list(pa.string_view()),
    pa.list_view(pa.dictionary(pa.int8(), pa.string())),
]


@pytest.mark.parametrize(
    ("spelled", "others"),
    [
        (LISTS[0], LISTS[1:]),
        (pa.struct({"a": pa.string(), "b": pa.null()}), [pa.struct({"b": TEXT, "a": TEXT})]),
        (pa.map_(pa.string(), pa.int8()), [pa.map_(pa.large_string(), pa.int8())]),
        (pa.timestamp("us", "UTC"), [pa.timestamp("us", "+00:00"), pa.timestamp("us", "GMT")]),
        (pa.timestamp("us", "Europe/Berlin"), [pa.timestamp("us", "UTC")]),
        (pa.decimal128(5, 2), [pa.decimal32(5, 2), pa.decimal256(5, 2)]),
        (pa.decimal128(9, 2), [pa.decimal128(3, 2), pa.decimal128(5, 1)]),
        (pa.date32(), [pa.date64()]),
        (pa.uuid(), [pa.binary(16)]),
        (pa.list_(pa.uint8(), 3), [pa.list_(pa.field("x", pa.uint8()), 3)]),
        (pa.list_(pa.uint8()), [pa.list_(pa.uint8(), 3), pa.list_(pa.null())]),
        (pa.null(), [pa.string()]),
        (pa.list_(pa.null()), LISTS),
    ],
)
def test_what_is_done_stays_done_whatever_is_added(
    spelled: pa.DataType, others: Sequence[pa.DataType]
) -> None:
    """Types that mean the same are one type, and a majority of later shards changes nothing."""
    layouts = [_footer(schema=pa.schema({"t": pa.string(), "k": k})) for k in (spelled, *others)]
    first = _plan(layouts[:1])
    night = _plan([*layouts, *layouts[1:]], standing=Standing(first.types))
    assert not night.faults
    assert night.types == first.types
    assert first.chunks[0].name in {chunk.name for chunk in night.chunks}


def test_a_column_of_nulls_agrees_with_every_type() -> None:
    for kind in (pa.string(), pa.int64(), pa.list_(pa.struct({"x": pa.date32()}))):
        schemas = [pa.schema({"t": pa.string(), "k": k}) for k in (pa.null(), pa.null(), kind)]
        found = _plan([_footer(schema=schema) for schema in schemas])
        assert not found.faults
        assert found.types == {"k": plain_type(kind)}
    nothing = _plan([_footer(schema=pa.schema({"t": pa.null(), "k": pa.int64()}))])
    assert (len(nothing.chunks), nothing.faults) == (1, ())  # its rows are bad, and not the shard


def test_another_type_than_that_of_the_files_is_a_fault_of_its_shard() -> None:
    standing = Standing({"k": pa.int32()})
    found = _plan(
        [_footer(schema=pa.schema({"t": TEXT, "k": pa.int32()})), _footer()], standing=standing
    )
    assert [url for url, _ in found.faults] == [_shard(1).url]
    assert "is int64, and int32 in the files of this output" in found.faults[0][1]
    with pytest.raises(InputError, match="int32 in the files of this output"):
        _plan([_footer()], standing=standing)


@pytest.mark.parametrize(
    "before",
    [
        pa.list_(pa.field("item", pa.string())),
        pa.struct({"a": pa.string()}),
        pa.date64(),
        pa.null(),
    ],
)
def test_the_names_of_earlier_releases_stay(before: pa.DataType) -> None:
    """They had nested types as the footer spells them, and kept but the names of types."""
    layout = _footer(schema=pa.schema({"t": pa.string(), "k": before}))
    made = projection(INPUT, {"k": str(before)})
    standing = Standing(names={"k": str(before)})
    found = _plan([layout], standing=standing)
    assert found.projection == made
    polars = pa.schema({"t": pa.string(), "k": plain_type(before)})
    assert not _plan([layout, _footer(schema=polars)], standing=standing).faults


def test_int96_of_earlier_releases_stays_what_it_was() -> None:
    layout = _footer(schema=pa.schema({"t": TEXT, "k": pa.timestamp("us")}))
    found = _plan([layout], standing=Standing(names={"k": "timestamp[ns]"}))
    assert (found.types, found.faults) == ({"k": pa.timestamp("ns")}, ())
