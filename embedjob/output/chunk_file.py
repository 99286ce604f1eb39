"""The Parquet files of one chunk: their tables, their bytes, and what their footers say."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedjob.errors import OutputError
from embedjob.input.chunks import Shard
from embedjob.input.column_types import in_type
from embedjob.input.columns import KEPT
from embedjob.input.listing import FIRST_READ, read_metadata
from embedjob.output.head_columns import ROUTER, VALUES
from embedjob.output.schema import FORMAT_VERSION, OutputSpec
from embedjob.storage.objects import Stored

FINGERPRINT_KEY = b"embedjob.fingerprint"
COUNTS_KEY = b"embedjob.counts"
VOCABULARY_KEY = b"embedjob.vocabulary"
CALIBRATION_KEY = b"embedjob.calibration"

# Readers hold a row group in memory, and some of them count its bytes in 31 bits.
GROUP_BYTES = 64 * 2**20
_NO_DICTIONARY = frozenset({"row", "id", "embedding", "text_hash", "truncated"})
_ONE_BYTE = (pa.int8(), pa.uint8())
_VECTORS = ("embedding", VALUES, ROUTER)
_NO_STATISTICS = frozenset({"embedding", "text_hash"})


@dataclass(frozen=True)
class Committed:
    """A chunk's file in storage; `written` is True where this call put it.

    `rows` is Parquet's count, of lines; `counts` count rows of the chunk.
    """

    name: str
    rows: int
    bytes: int
    etag: str
    counts: Mapping[str, int]
    written: bool


def data_table(
    table: pa.Table, vectors: npt.NDArray[np.generic], shard: Shard, *, spec: OutputSpec
) -> pa.Table:
    """Return the good rows, or all rows if bad rows become null; `vectors` are the good rows'."""
    good = table.column("reason").is_null()
    filled = spec.on_bad_row == "null"
    rows = table.drop_columns(["embedding"])
    rows = rows if filled or len(vectors) == len(rows) else rows.filter(good)
    present = good.to_numpy() if filled else np.ones(len(vectors), np.bool_)
    columns = {
        "shard": _shard_column(shard, len(rows)),
        "embedding": _embedding(vectors, present, spec.data.field("embedding").type),
        "tokens": pc.fill_null(rows.column("tokens"), 0),
        "truncated": pc.fill_null(rows.column("truncated"), False),
    }
    kept = {name.removeprefix(KEPT): rows.column(name) for name in _kept(rows)}
    own = {name: rows.column(name) for name in rows.column_names if name not in _kept(rows)}
    made = _in_schema(own | kept | columns, spec.data)
    return made if spec.vector_list == "fixed" else made.cast(spec.stored)


def quarantine_table(bad: pa.Table, shard: Shard, *, spec: OutputSpec) -> pa.Table:
    """Return the bad rows, with their reasons."""
    columns = {name: bad.column(name) for name in bad.column_names}
    return _in_schema(columns | {"shard": _shard_column(shard, len(bad))}, spec.quarantine)


def file_bytes(
    table: pa.Table, shard: Shard, *, spec: OutputSpec, counts: Mapping[str, int]
) -> memoryview:
    """Return the table as a Parquet file with checksums, bounded row groups, and its origin."""
    stamped = table.replace_schema_metadata(_stamp(shard, spec, counts))
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        stamped.schema,
        compression=spec.compression,
        use_dictionary=_dictionary_columns(table.schema),
        write_statistics=[name for name in table.column_names if name not in _NO_STATISTICS],
        use_byte_stream_split=_split_columns(table.schema),
        write_page_checksum=True,
    ) as writer:
        writer.write_table(stamped, row_group_size=_group_rows(table))
        if spec.calibration is not None:
            # Not in the schema, which the footer holds a second time.
            document = json.dumps(spec.calibration.as_dict(), separators=(",", ":"))
            writer.add_key_value_metadata({CALIBRATION_KEY: document.encode()})
    return memoryview(sink.getvalue())


def read_committed(file: Stored) -> Committed:
    """Read the footer of an embedding file; OutputError when embedjob did not write it."""
    return committed(file, file_metadata(file))


def read_all_committed(files: Sequence[Stored], *, threads: int = 32) -> list[Committed]:
    """Read the footers of many embedding files, in their order."""
    with ThreadPoolExecutor(max_workers=threads) as pool:
        return list(pool.map(read_committed, files))


def file_metadata(file: Stored) -> pq.FileMetaData:
    """Return the footer; OutputError when embedjob did not write it."""
    try:
        metadata, _ = read_metadata(file, length=FIRST_READ)
    except pa.ArrowException as error:
        raise OutputError(f"{file.url}: is not a whole Parquet file ({error})") from error
    if COUNTS_KEY not in (metadata.metadata or {}):
        raise OutputError(f"{file.url}: is a Parquet file that embedjob did not write")
    return metadata


def committed(file: Stored, metadata: pq.FileMetaData) -> Committed:
    """Return a file and its footer as a value."""
    counts = json.loads(metadata.metadata[COUNTS_KEY])
    name = file.url.rsplit("/", 1)[-1]
    return Committed(name, metadata.num_rows, file.size, file.etag, counts, written=False)


def _dictionary_columns(schema: pa.Schema) -> list[str]:
    """Return repetitive columns, and quantised embeddings, which else take 32 bits a number."""
    names = [name for name in schema.names if name not in _NO_DICTIONARY]
    return names + (["embedding.list.element"] if _item(schema) in _ONE_BYTE else [])


def _split_columns(schema: pa.Schema) -> list[str]:
    """Return the vector columns, stored by byte significance: a tenth smaller and no slower.

    Half precision is left out, since fewer readers can decode it in this encoding. Kept columns
    are not looked at: they may have any type.
    """
    vectors = [schema.field(name) for name in _VECTORS if name in schema.names]
    return [
        f"{field.name}.list.element"
        for field in vectors
        if pa.types.is_nested(field.type) and field.type.value_type == pa.float32()
    ]


def _item(schema: pa.Schema) -> pa.DataType | None:
    """Return the type of an embedding's numbers; None in a quarantine file, which has none."""
    return schema.field("embedding").type.value_type if "embedding" in schema.names else None


def _group_rows(table: pa.Table) -> int:
    rows, size = int(table.num_rows), int(table.nbytes)
    return max(1, GROUP_BYTES * rows // max(1, size))


def _similarity_weights(spec: OutputSpec) -> dict[str, str]:
    """Return the weights of a weighted similarity, where the recipe sets them."""
    weights = spec.weighted_sum
    return {"embedjob.weighted_sum": weights.model_dump_json()} if weights else {}


def _stamp(shard: Shard, spec: OutputSpec, counts: Mapping[str, int]) -> dict[bytes, bytes]:
    metadata = {
        "embedjob.format_version": str(FORMAT_VERSION),
        "embedjob.similarity": spec.similarity,
        **_similarity_weights(spec),
        "embedjob.shard": shard.url,
        "embedjob.etag": shard.etag,
        **({"embedjob.vocabulary": str(spec.vocabulary)} if spec.vocabulary else {}),
        "embedjob.versions": json.dumps(dict(spec.versions), sort_keys=True),
    }
    stamp = {key.encode(): value.encode() for key, value in metadata.items()}
    stamp[FINGERPRINT_KEY] = spec.fingerprint.encode()
    return stamp | {COUNTS_KEY: json.dumps(dict(counts), sort_keys=True).encode()}


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
    return pa.repeat(pa.scalar(shard.url, pa.string()), rows)


def _kept(table: pa.Table) -> list[str]:
    return [name for name in table.column_names if name.startswith(KEPT)]


def _in_schema(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    made = {field.name: in_type(_chunked(columns[field.name]), field.type) for field in schema}
    return pa.table(made).cast(schema)  # which fails where a value lacks that must not


def _chunked(column: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
    return column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])
