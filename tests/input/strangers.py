"""Shards as strangers write them: every type that Parquet holds, in several spellings and files."""

import datetime
import io
import uuid
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

US = datetime.timedelta(microseconds=1)
MOMENTS = st.datetimes(datetime.datetime(1, 1, 1), datetime.datetime(9999, 12, 31))
LATE = st.datetimes(datetime.datetime(1700, 1, 1), datetime.datetime(2200, 1, 1))
TEXTS = st.text(max_size=5) | st.sampled_from(["", "\x00", "\U0001f98a", "a" * 300])
BYTES = st.binary(max_size=5) | st.just(b"\xff\xfe")


def _whole(kind: pa.DataType, bits: int, *, signed: bool) -> tuple[pa.DataType, Any]:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return kind, st.integers(low, high) | st.sampled_from([low, high, 0])


def _decimal(precision: int, scale: int) -> tuple[pa.DataType, Any]:
    high = 10**precision - 1
    numbers = st.integers(-high, high) | st.sampled_from([high, -high, 0])
    make = pa.decimal128 if precision <= 38 else pa.decimal256
    return make(precision, scale), numbers.map(lambda n: Decimal(f"{n}E-{scale}"))


def _moments(unit: str, zone: str | None = None) -> tuple[pa.DataType, Any]:
    step = {"s": 10**6, "ms": 1000, "us": 1, "ns": 1}[unit]
    moments = LATE if zone or unit == "ns" else MOMENTS
    cut = moments.map(lambda at: at.replace(microsecond=at.microsecond // step * step))
    aware = cut.map(lambda at: at.replace(tzinfo=datetime.timezone.utc)) if zone else cut
    if unit == "ns":
        digits = st.integers(0, 999) | st.just(0)
        aware = st.builds(lambda at, n: pandas.Timestamp(at) + pandas.Timedelta(n), aware, digits)
    return pa.timestamp(unit, zone), aware


# Each type that means something of its own, and values at and between its edges.
LEAVES: Sequence[tuple[pa.DataType, Any]] = (
    (pa.null(), st.none()),
    (pa.bool_(), st.booleans()),
    *(_whole(kind, kind.bit_width, signed=True) for kind in (pa.int8(), pa.int16())),
    *(_whole(kind, kind.bit_width, signed=True) for kind in (pa.int32(), pa.int64())),
    *(_whole(kind, kind.bit_width, signed=False) for kind in (pa.uint8(), pa.uint16())),
    *(_whole(kind, kind.bit_width, signed=False) for kind in (pa.uint32(), pa.uint64())),
    (pa.float16(), st.floats(width=16)),
    (pa.float32(), st.floats(width=32)),
    (pa.float64(), st.floats()),
    (pa.string(), TEXTS),
    (pa.binary(), BYTES),
    (pa.binary(3), st.binary(min_size=3, max_size=3)),
    (pa.binary(16), st.binary(min_size=16, max_size=16)),
    (pa.date32(), st.dates()),
    (pa.time32("s"), st.times().map(lambda at: at.replace(microsecond=0))),
    (pa.time32("ms"), st.times().map(lambda at: at.replace(microsecond=0))),
    (pa.time64("us"), st.times()),
    (pa.time64("ns"), st.times()),
    *(_moments(unit) for unit in ("s", "ms", "us", "ns")),
    *(_moments(unit, "UTC") for unit in ("s", "ms", "us", "ns")),
    _moments("us", "Europe/Berlin"),
    (pa.duration("us"), st.integers(-(2**53), 2**53).map(lambda n: n * US)),
    (pa.duration("s"), st.integers(-(2**31), 2**31).map(lambda n: n * 1000_000 * US)),
    (pa.duration("ns"), st.integers(-(2**63) + 1, 2**63 - 1).map(pandas.Timedelta)),
    (pa.duration("ms"), st.integers(-(2**40), 2**40).map(lambda n: n * 1000 * US)),
    _decimal(5, 2),
    _decimal(18, 0),
    _decimal(38, 37),
    _decimal(50, 10),
)


def columns(depth: int = 3) -> st.SearchStrategy[tuple[pa.DataType, Any]]:
    """A type nested up to so deep, with a strategy for its values."""
    leaves = st.sampled_from(LEAVES)
    if not depth:
        return leaves
    inner = columns(depth - 1)
    names = st.lists(
        st.sampled_from(["a", "b", "element", "key", "x.y", "ä"]), min_size=1, max_size=3
    )
    return leaves | st.one_of(
        inner.map(_list),
        st.tuples(inner, st.integers(1, 3)).map(lambda given: _fixed(*given)),
        names.flatmap(lambda chosen: _structs(sorted({*chosen}), inner)),
        inner.map(_map),
    )


def _list(inner: tuple[pa.DataType, Any]) -> tuple[pa.DataType, Any]:
    kind, values = inner
    return pa.list_(kind), st.lists(_or_none(kind, values), max_size=3)


def _fixed(inner: tuple[pa.DataType, Any], size: int) -> tuple[pa.DataType, Any]:
    kind, values = inner
    items = st.lists(_or_none(kind, values), min_size=size, max_size=size)
    return pa.list_(kind, size), items


def _structs(names: Sequence[str], inner: Any) -> Any:
    def made(parts: Sequence[tuple[pa.DataType, Any]]) -> tuple[pa.DataType, Any]:
        fields = {name: _or_none(*part) for name, part in zip(names, parts, strict=True)}
        kinds = [(name, kind) for name, (kind, _) in zip(names, parts, strict=True)]
        return pa.struct(kinds), st.fixed_dictionaries(fields)

    return st.lists(inner, min_size=len(names), max_size=len(names)).map(made)


def _map(inner: tuple[pa.DataType, Any]) -> tuple[pa.DataType, Any]:
    kind, values = inner
    pairs = st.lists(st.tuples(TEXTS, _or_none(kind, values)), max_size=2)
    return pa.map_(pa.string(), kind), pairs


def _or_none(kind: pa.DataType, values: Any) -> Any:
    return st.none() if pa.types.is_null(kind) else st.none() | values


def spellings(kind: pa.DataType) -> st.SearchStrategy[pa.DataType]:
    """Types that mean what `kind` does, spelled differently at every depth."""
    if pa.types.is_map(kind):
        keys = st.sampled_from(_ALIKE[pa.string()])
        items = spellings(kind.item_type)
        return st.tuples(keys, items).map(lambda parts: pa.map_(*parts))
    if pa.types.is_struct(kind):
        fields = [kind.field(place) for place in range(kind.num_fields)]
        parts = st.tuples(*(spellings(field.type) for field in fields))
        return parts.map(
            lambda found: pa.struct([*zip([f.name for f in fields], found, strict=True)])
        )
    if pa.types.is_fixed_size_list(kind):
        return _items(kind).map(lambda item: pa.list_(item, kind.list_size))
    if pa.types.is_list(kind):
        makes = st.sampled_from([pa.list_, pa.large_list, pa.list_view, pa.large_list_view])
        return st.tuples(makes, _items(kind)).map(lambda given: given[0](given[1]))
    return st.sampled_from(_ALIKE.get(kind, [kind]))


def _items(kind: pa.DataType) -> st.SearchStrategy[pa.Field]:
    names = st.sampled_from(["item", "element", "array", "x"])
    return st.tuples(names, spellings(kind.value_type)).map(
        lambda given: pa.field(*given, metadata={"PARQUET:field_id": "7"})
    )


_ALIKE: Mapping[pa.DataType, Sequence[pa.DataType]] = {
    pa.string(): [
        *(pa.string(), pa.large_string(), pa.string_view()),
        *(pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string())),
        *(pa.json_(), pa.json_(pa.large_string())),
    ],
    pa.binary(): [pa.binary(), pa.large_binary(), pa.binary_view()],
    pa.binary(16): [pa.binary(16), pa.uuid()],
    pa.date32(): [pa.date32(), pa.date64()],
    pa.decimal128(5, 2): [
        *(pa.decimal32(5, 2), pa.decimal64(5, 2), pa.decimal128(5, 2), pa.decimal256(5, 2)),
    ],
    pa.decimal128(18, 0): [pa.decimal64(18, 0), pa.decimal128(18, 0), pa.decimal256(18, 0)],
    **{
        pa.timestamp(unit, "UTC"): [
            pa.timestamp(unit, zone) for zone in ("UTC", "+00:00", "Etc/UTC", "GMT")
        ]
        for unit in ("s", "ms", "us", "ns")
    },
}
FILES = st.fixed_dictionaries(
    {
        "compression": st.sampled_from(["none", "snappy", "gzip", "zstd", "lz4", "brotli"]),
        "data_page_version": st.sampled_from(["1.0", "2.0"]),
        "write_page_checksum": st.booleans(),
        "use_dictionary": st.booleans(),
        "write_statistics": st.booleans(),
        "row_group_size": st.integers(1, 5),
        "data_page_size": st.sampled_from([2**10, 2**20]),
        "store_schema": st.booleans(),
        "use_compliant_nested_type": st.booleans(),
        "use_deprecated_int96_timestamps": st.booleans(),
    }
)


def by_arrow(table: pa.Table, properties: Mapping[str, Any]) -> bytes:
    named = str(table.schema)
    if "tz=" in named:  # int96 has no zone
        properties = {**properties, "use_deprecated_int96_timestamps": False}
    int96 = properties.get("use_deprecated_int96_timestamps")
    if "duration" in named or ("timestamp" in named and not int96):
        properties = {**properties, "store_schema": True}  # without it they are others
    file = io.BytesIO()
    pq.write_table(table, file, **properties)
    return file.getvalue()


def _by_pandas(table: pa.Table, folder: Path) -> bytes:
    written: bytes = table.to_pandas(types_mapper=_EXACT.get).to_parquet()
    return written


def _by_polars(table: pa.Table, folder: Path) -> bytes:
    file = io.BytesIO()
    polars.from_arrow(table).write_parquet(file)
    return file.getvalue()


def _by_duckdb(table: pa.Table, folder: Path) -> bytes:
    path = folder / "duckdb"
    with duckdb.connect() as connection:
        connection.register("given", table)
        connection.execute(f"COPY given TO '{path}' (FORMAT parquet)")
    return path.read_bytes()


# Whole numbers that pandas would make floats of, where some are null.
_EXACT: Mapping[pa.DataType, Any] = {pa.uint64(): pandas.UInt64Dtype()}
WRITERS: Mapping[str, Callable[[pa.Table, Path], bytes]] = {
    "pandas": _by_pandas,
    "polars": _by_polars,
    "duckdb": _by_duckdb,
}


def array(values: Sequence[Any], kind: pa.DataType, spelled: pa.DataType) -> pa.Array:
    """The values in a spelling; in the plain one where Arrow cannot make it."""
    made = pa.array(values, kind)
    for make in (made.cast, partial(pa.array, [*values])):
        try:
            spelling = make(spelled)
            spelling.validate(full=True)
        except (pa.ArrowException, TypeError, ValueError):
            continue
        if python(spelling) == python(made):
            return spelling
    return made


def python(values: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Values to compare: NaN equals itself, a map's pairs are tuples, bytes have no extension."""
    return [_comparable(value) for value in values.to_pylist()]


def _comparable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _comparable(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_comparable(inner) for inner in value]
    if isinstance(value, uuid.UUID):
        return value.bytes
    return "nan" if isinstance(value, float) and value != value else value
