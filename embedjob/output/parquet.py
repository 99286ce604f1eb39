"""What the files of a chunk hold, and their bytes."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedjob.input.chunks import Shard
from embedjob.output.schema import FORMAT_VERSION, KEPT, OutputSpec

FINGERPRINT = b"embedjob.fingerprint"
COUNTS = b"embedjob.counts"
VOCABULARY = b"embedjob.vocabulary"
CALIBRATION = b"embedjob.calibration"

# Readers hold a row group in memory, and some of them count its bytes in 31 bits.
GROUP_BYTES = 64 * 2**20
_NO_DICTIONARY = frozenset({"row", "id", "embedding", "text_hash", "truncated"})
_ONE_BYTE = (pa.int8(), pa.uint8())
_NO_STATISTICS = frozenset({"embedding", "text_hash"})


def data_table(
    table: pa.Table, vectors: npt.NDArray[np.generic], shard: Shard, *, form: OutputSpec
) -> pa.Table:
    """The good rows, or all of them where a bad row becomes null; `vectors` are the good ones'."""
    good = table.column("reason").is_null()
    filled = form.on_bad_row == "null"
    rows = table.drop_columns(["embedding"])
    rows = rows if filled or len(vectors) == len(rows) else rows.filter(good)
    present = good.to_numpy() if filled else np.ones(len(vectors), np.bool_)
    columns = {
        "shard": _shard_column(shard, len(rows)),
        "embedding": _embedding(vectors, present, form.data.field("embedding").type),
        "tokens": pc.fill_null(rows.column("tokens"), 0),
        "truncated": pc.fill_null(rows.column("truncated"), False),
    }
    kept = {name.removeprefix(KEPT): rows.column(name) for name in _kept(rows)}
    own = {name: rows.column(name) for name in rows.column_names if name not in _kept(rows)}
    return _in_schema(own | kept | columns, form.data)


def quarantine_table(bad: pa.Table, shard: Shard, *, form: OutputSpec) -> pa.Table:
    """The bad rows, with their reasons."""
    columns = {name: bad.column(name) for name in bad.column_names}
    return _in_schema(columns | {"shard": _shard_column(shard, len(bad))}, form.quarantine)


def file_bytes(
    table: pa.Table, shard: Shard, *, form: OutputSpec, counts: Mapping[str, int]
) -> memoryview:
    """The table as a Parquet file with checksums, bounded row groups, and what made it."""
    stamped = table.replace_schema_metadata(_stamp(shard, form, counts))
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        stamped.schema,
        compression=form.compression,
        use_dictionary=_dictionary_columns(table.schema),
        write_statistics=[name for name in table.column_names if name not in _NO_STATISTICS],
        use_byte_stream_split=_split_columns(table.schema),
        write_page_checksum=True,
    ) as writer:
        writer.write_table(stamped, row_group_size=_group_rows(table))
        if form.calibration is not None:
            # Not in the schema, which the footer holds a second time.
            said = json.dumps(form.calibration.as_dict(), separators=(",", ":"))
            writer.add_key_value_metadata({CALIBRATION: said.encode()})
    return memoryview(sink.getvalue())


def _dictionary_columns(schema: pa.Schema) -> list[str]:
    """What repeats; and quantised embeddings, which Parquet else stores in 32 bits a number."""
    names = [name for name in schema.names if name not in _NO_DICTIONARY]
    return names + (["embedding.list.element"] if _item(schema) in _ONE_BYTE else [])


def _split_columns(schema: pa.Schema) -> list[str]:
    """Columns of vectors, their bytes stored by significance: a tenth smaller, and no slower.

    Not in half precision, which fewer readers can decode in this form.
    """
    lists = [field for field in schema if pa.types.is_nested(field.type)]
    return [f"{one.name}.list.element" for one in lists if one.type.value_type == pa.float32()]


def _item(schema: pa.Schema) -> pa.DataType | None:
    """The type of an embedding's numbers; None in a quarantine file, which has none."""
    return schema.field("embedding").type.value_type if "embedding" in schema.names else None


def _group_rows(table: pa.Table) -> int:
    rows, size = int(table.num_rows), int(table.nbytes)
    return max(1, GROUP_BYTES * rows // max(1, size))


def _sum_of(form: OutputSpec) -> dict[str, str]:
    """How what is beside the embedding counts, where a recipe says it."""
    found = form.weighted_sum
    return {"embedjob.weighted_sum": found.model_dump_json()} if found else {}


def _stamp(shard: Shard, form: OutputSpec, counts: Mapping[str, int]) -> dict[bytes, bytes]:
    said = {
        "embedjob.format_version": str(FORMAT_VERSION),
        "embedjob.similarity": form.similarity,
        **_sum_of(form),
        "embedjob.shard": _printable(shard.url),
        "embedjob.etag": shard.etag,
        **({"embedjob.vocabulary": str(form.vocabulary)} if form.vocabulary else {}),
        "embedjob.versions": json.dumps(dict(form.versions), sort_keys=True),
    }
    stamp = {key.encode(): value.encode() for key, value in said.items()}
    stamp[FINGERPRINT] = form.fingerprint.encode()
    return stamp | {COUNTS: json.dumps(dict(counts), sort_keys=True).encode()}


def _embedding(
    vectors: npt.NDArray[np.generic], present: npt.NDArray[np.bool_], kind: pa.DataType
) -> pa.Array:
    if present.all():
        return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), type=kind)
    spread = np.zeros((len(present), kind.list_size), vectors.dtype)
    spread[present] = vectors
    return pa.FixedSizeListArray.from_arrays(
        pa.array(spread.ravel()), type=kind, mask=pa.array(~present)
    )


def _shard_column(shard: Shard, rows: int) -> pa.Array:
    return pa.repeat(pa.scalar(_printable(shard.url), pa.string()), rows)


def _printable(url: str) -> str:
    """The url as UTF-8: a local file's name may hold bytes that are none."""
    return url.encode("utf-8", "backslashreplace").decode()


def _kept(table: pa.Table) -> list[str]:
    return [name for name in table.column_names if name.startswith(KEPT)]


def _in_schema(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    return pa.table({name: columns[name] for name in schema.names}).cast(schema)
