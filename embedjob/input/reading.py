"""One chunk's rows: only the columns, the row groups and, of a split group, the part it needs."""

import functools
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embedjob.config.job import Input
from embedjob.errors import ChunkError
from embedjob.input.chunks import Chunk, Shard
from embedjob.input.columns import KEPT, Columns, columns_of, plain_type
from embedjob.input.filtering import filter_rows, group_bounds, never_passes
from embedjob.input.joining import joined_text, validate_text
from embedjob.input.listing import read_metadata
from embedjob.storage.objects import Stored, open_unchanged

# A piece of a large row group is streamed up to its end, so that memory stays that of the piece.
_STREAM_BYTES = 4 * 2**20
_STREAM_ROWS = 8192
_ROW = "embedjob:row"  # no column of a shard is confused with it


def read_chunk(chunk: Chunk, job_input: Input) -> pa.Table:
    """row, text (null in a bad row), reason (null in a good one), id?, `keep.`-prefixed columns.

    ChunkError where the shard itself is at fault, InputChangedError where it is another by now.
    """
    columns = columns_of(job_input)
    try:
        table = _wanted_rows(chunk, columns, job_input)
        if job_input.filter is not None:
            table = filter_rows(table, job_input.filter)
        text, reason = validate_text(
            joined_text(table, job_input.text, separator=job_input.separator)
        )
    except (pa.ArrowException, OSError) as error:
        raise ChunkError(
            f"{chunk.shard.url}, rows {chunk.start} to {chunk.stop}: cannot be read: {error}"
        ) from error
    rows = {"row": table.column(_ROW), "text": text, "reason": reason}
    if columns.id:
        rows["id"] = table.column(columns.id)
    return pa.table(rows | {KEPT + name: table.column(name) for name in columns.keep})


def _wanted_rows(chunk: Chunk, columns: Columns, job_input: Input) -> pa.Table:
    """The needed columns, in their plain types, of the chunk's rows, and the rows' numbers."""
    metadata = _metadata(chunk.shard.stored, chunk.footer_bytes)
    groups = _groups(metadata, chunk, job_input)
    numbers = _row_numbers(metadata, groups)
    first, last = (int(place) for place in np.searchsorted(numbers, [chunk.start, chunk.stop]))
    own = [name for name in columns.needed if name in metadata.schema.to_arrow_schema().names]
    with open_unchanged(chunk.shard.stored) as source:
        if (first, last) == (0, len(numbers)):
            table = _whole(source, metadata, groups, own)
        else:
            table = _part(source, metadata, groups, own, (first, last))
    found = {name: _plain(table.column(name)) for name in own}
    found |= _partitions(chunk.shard, columns.needed, own, last - first)
    return pa.table(found | {_ROW: pa.array(numbers[first:last], pa.uint32())})


@functools.lru_cache(maxsize=4)
def _metadata(file: Stored, length: int) -> pq.FileMetaData:
    """The footer, kept because chunks of one shard follow each other in one process."""
    return read_metadata(file, length=length)[0]


def _groups(metadata: pq.FileMetaData, chunk: Chunk, job_input: Input) -> list[int]:
    """The chunk's row groups, less those whose bounds say that no row passes the filter."""
    groups = list(range(*chunk.groups))
    if job_input.filter is None:
        return groups
    names = columns_of(job_input).filter
    return [
        group
        for group in groups
        if not never_passes(job_input.filter, group_bounds(metadata, group, names))
    ]


def _row_numbers(metadata: pq.FileMetaData, groups: list[int]) -> npt.NDArray[np.int64]:
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    firsts = np.cumsum([0, *rows])
    spans = [np.arange(firsts[group], firsts[group + 1]) for group in groups]
    return np.concatenate([np.empty(0, np.int64), *spans])


def _whole(
    source: BinaryIO, metadata: pq.FileMetaData, groups: list[int], names: list[str]
) -> pa.Table:
    """All rows of the groups, fetched in few large reads."""
    with pq.ParquetFile(source, metadata=metadata, pre_buffer=True) as file:
        return file.read_row_groups(groups, columns=names, use_threads=False)


def _part(
    source: BinaryIO,
    metadata: pq.FileMetaData,
    groups: list[int],
    names: list[str],
    wanted: tuple[int, int],
) -> pa.Table:
    """Rows [first, last) of the groups' rows; nothing behind them is fetched or decoded."""
    first, last = wanted
    place = 0
    parts: list[pa.RecordBatch] = []
    with pq.ParquetFile(
        source, metadata=metadata, pre_buffer=False, buffer_size=_STREAM_BYTES
    ) as file:
        schema = file.schema_arrow
        batches = file.iter_batches(_STREAM_ROWS, groups, columns=names, use_threads=False)
        for batch in batches:
            begin, end = max(first - place, 0), min(last - place, batch.num_rows)
            parts += [batch.slice(begin, end - begin)] if begin < end else []
            place += batch.num_rows
            if place >= last:
                break
    if not parts:
        return pa.schema([schema.field(name) for name in names]).empty_table()
    return pa.Table.from_batches(parts)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(plain_type(column.type))


def _partitions(
    shard: Shard, needed: tuple[str, ...], own: list[str], rows: int
) -> dict[str, pa.Array]:
    """One constant column for each needed `key=value` directory; the file's columns come first."""
    return {
        key: pa.repeat(pa.scalar(value, pa.large_string()), rows)
        for key, value in shard.partitions
        if key in needed and key not in own
    }
