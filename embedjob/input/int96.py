"""int96: Parquet's oldest timestamps, which count nanoseconds in files of every writer.

They hold the years 1 to 9999 to a nanosecond, and none of Arrow's types does: microseconds lose
digits, nanoseconds end in 2262, and Arrow says nothing of either. Arrow writes into a file what it
had, and Spark writes microseconds. What others write (Hive, Impala) is looked at, value by value.
"""

import base64
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from embedjob.input.chunks import WHOLE_BUT
from embedjob.input.column_types import units_in

UNITS = ("us", "ns")
_ARROW = b"ARROW:schema"
_SPARK = (b"org.apache.spark.version", b"org.apache.spark.sql.parquet.row.metadata")


def stored_unit(metadata: pq.FileMetaData, names: Sequence[str]) -> str | None:
    """Return the unit that int96 in the columns `names` had, by what the file says.

    None where it does not say. pa.ArrowInvalid where it had several.
    """
    footer = metadata.metadata or {}
    if not _paths(metadata, names):
        return "us"
    if _ARROW not in footer:
        return "us" if any(key in footer for key in _SPARK) else None
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(footer[_ARROW])))
    units = {unit for field in schema if field.name in names for unit in units_in(field.type)}
    if "ns" in units and len(units) > 1:
        raise pa.ArrowInvalid(
            f"{WHOLE_BUT} has int96 timestamps of several units ({', '.join(sorted(units))}), which"
            " no reader can tell apart; write it again without int96"
        )
    return "ns" if "ns" in units else "us"


def read_schema(metadata: pq.FileMetaData, names: Sequence[str], unit: str) -> pa.Schema:
    """Return the types that the columns `names` are read in, where int96 is read in that unit."""
    schema = metadata.schema.to_arrow_schema()
    if not any("ns" in units_in(field.type) for field in schema if field.name in names):
        return schema
    source = pa.BufferReader(b"")  # nothing but the metadata is looked at
    with pq.ParquetFile(source, metadata=metadata, coerce_int96_timestamp_unit=unit) as file:
        return file.schema_arrow


def exact_units(
    source: BinaryIO, metadata: pq.FileMetaData, groups: Sequence[int], names: Sequence[str]
) -> list[str]:
    """Return the units that hold every int96 moment in the columns `names` exactly.

    Only these columns of the row groups are read. pa.ArrowInvalid where neither unit is exact.
    """
    # Not above: a process that decodes footers has no other use for it, and waits for it.
    import pyarrow.compute as pc

    paths = _paths(metadata, names)
    whole = near = True
    for group in groups if paths else ():
        coarse, fine = (_moments(source, metadata, group, paths, unit) for unit in UNITS)
        for micros, nanos in zip(coarse, fine, strict=True):
            # Both wrap around beyond 64 bits alike: what is left is the digits below microseconds.
            rest = pc.subtract(nanos, pc.multiply(micros, 1000))
            whole = whole and not pc.any(pc.not_equal(rest, 0)).as_py()
            apart = pc.min_max(pc.subtract(pc.divide(nanos, 1000), micros)).as_py()
            near = near and {*apart.values()} <= {None, -1, 0, 1}  # division rounds towards 0
    if not whole and not near:
        raise pa.ArrowInvalid(
            f"{WHOLE_BUT} has int96 timestamps in {', '.join(paths)} that no type of Arrow holds"
            " together: some are finer than microseconds, and some lie before 1678 or after 2262;"
            " write it again with one of the two"
        )
    return [unit for unit, exact in zip(UNITS, (whole, near), strict=True) if exact]


def belongs(path: str, name: str) -> bool:
    """Return whether a column of values belongs to the column `name`, which may be nested."""
    return path == name or path.startswith(name + ".")


def _paths(metadata: pq.FileMetaData, names: Sequence[str]) -> list[str]:
    """Return the int96 columns of values that belong to the columns `names`."""
    columns = [metadata.schema.column(place) for place in range(metadata.num_columns)]
    return [
        column.path
        for column in columns
        if column.physical_type == "INT96" and any(belongs(column.path, name) for name in names)
    ]


def _moments(
    source: BinaryIO, metadata: pq.FileMetaData, group: int, paths: Sequence[str], unit: str
) -> list[pa.Array]:
    """Return the int96 values of a row group in that unit, as whole numbers, without structure."""
    with pq.ParquetFile(
        source,
        metadata=metadata,
        page_checksum_verification=True,
        coerce_int96_timestamp_unit=unit,
    ) as file:
        table = file.read_row_group(group, columns=[*paths], use_threads=False)
    arrays = [array for column in table.columns for array in column.chunks]
    return [values.view(pa.int64()) for array in arrays for values in _leaves(array)]


def _leaves(array: pa.Array) -> Iterator[pa.Array]:
    """Yield the timestamps without a zone that an array holds, at any depth."""
    if pa.types.is_struct(array.type):
        parts = array.flatten()
    elif pa.types.is_map(array.type):
        parts = [array.keys, array.items]
    elif pa.types.is_nested(array.type):
        parts = [array.flatten()]
    else:
        parts = []
        if pa.types.is_timestamp(array.type) and array.type.tz is None:
            yield array
    for part in parts:
        yield from _leaves(part)
