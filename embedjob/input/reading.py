"""Chunk reading: only the needed columns and row groups, and the needed part of a split group."""

import functools
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedjob.config.job import Input, SampledInput
from embedjob.errors import ChunkError
from embedjob.input.chunks import Chunk, Shard
from embedjob.input.column_types import TEXT, has_inner_dictionary, in_type, read_type
from embedjob.input.columns import KEPT, Columns, columns_of
from embedjob.input.filtering import filter_rows, never_passes
from embedjob.input.footers import group_bounds
from embedjob.input.int96 import exact_units, stored_unit
from embedjob.input.joining import INVALID_UTF8, joined_text, validate_text
from embedjob.input.json_lines import line_tables
from embedjob.input.listing import read_metadata
from embedjob.input.samples import sampled_rows
from embedjob.input.tables.table_files import file_columns, table_columns
from embedjob.storage.objects import Stored, open_unchanged, require_unchanged
from embedjob.storage.retrying import is_passing

# Part of a large row group is streamed up to its end, to hold no more than that part in memory.
_STREAM_BYTES = 4 * 2**20
_STREAM_ROWS = 8192
_FEWER = 16
_ROW = "embedjob:row"  # no shard has a column of this name
# The column of what stands before every passage of a row.
HEADING = "heading"


def read_chunk(chunk: Chunk, job_input: Input) -> pa.Table:
    """Return row, text (null in a bad row), reason (null in a good row), id?, `keep.` columns.

    Before the kept columns comes `heading`, what stands before a row's passages, where jobs ask.

    ChunkError where the shard itself is at fault, InputChangedError where it was replaced.
    """
    (table,) = read_pass([chunk], job_input)
    return table


def read_pass(chunks: Sequence[Chunk], job_input: Input) -> Iterator[pa.Table]:
    """Yield what `read_chunk` returns for one chunk, or in one pass for pieces of a row group.

    The pieces are in the order of their rows. After an error there are no further tables. An error
    of storage that may pass by itself is raised as it is.
    """
    columns = columns_of(job_input)
    tables = _wanted_rows(chunks, columns, job_input)
    for chunk in chunks:
        try:
            rows = _undeleted(next(tables), chunk)
            yield _finished(_sampled(rows, chunk, job_input), columns, job_input)
        except (pa.ArrowException, OSError) as error:
            if is_passing(error):  # storage's trouble, and no fault of the shard
                raise
            raise ChunkError(
                f"{chunk.shard.url}, rows {chunk.start} to {chunk.stop}: cannot be read: {error}"
            ) from error


def passing_rows(chunk: Chunk, job_input: Input) -> npt.NDArray[np.uint32]:
    """Return the numbers of a chunk's rows that pass the filter; no other column is read.

    Errors as `read_chunk`.
    """
    assert job_input.filter is not None, "every row passes"
    columns = Columns(text=(), id=None, keep=(), filter=columns_of(job_input).filter)
    try:
        [table] = _wanted_rows([chunk], columns, job_input)
        table = _undeleted(table, chunk)
        passing: npt.NDArray[np.uint32] = filter_rows(table, job_input.filter)[_ROW].to_numpy()
    except (pa.ArrowException, OSError) as error:
        if is_passing(error):
            raise
        raise ChunkError(f"{chunk.shard.url}: its rows cannot be filtered: {error}") from error
    return passing


def _undeleted(table: pa.Table, chunk: Chunk) -> pa.Table:
    """Return the rows that the shard's table still has."""
    if not chunk.deleted:
        return table
    gone = np.frombuffer(chunk.deleted, np.uint32)
    return table.filter(pa.array(~np.isin(table.column(_ROW).to_numpy(), gone)))


def _sampled(table: pa.Table, chunk: Chunk, job_input: Input) -> pa.Table:
    """Return the rows that the sample of a fit has, all where the input is no sample."""
    if not isinstance(job_input, SampledInput):
        return table
    rows = table.column(_ROW).to_numpy()
    return table.filter(pa.array(sampled_rows(job_input.sample, chunk.shard.url, rows)))


def _finished(table: pa.Table, columns: Columns, job_input: Input) -> pa.Table:
    if job_input.filter is not None:
        table = filter_rows(table, job_input.filter)
    text, reason = validate_text(joined_text(table, job_input.text, separator=job_input.separator))
    rows = {"row": table.column(_ROW), "text": text, "reason": reason}
    if columns.headings:
        rows |= _headings(table, columns.headings, text, reason)
    if columns.id:
        rows["id"] = table.column(columns.id)
    return pa.table(rows | {KEPT + name: table.column(name) for name in columns.keep})


def _headings(
    table: pa.Table, names: Sequence[str], text: pa.ChunkedArray, reason: pa.ChunkedArray
) -> dict[str, pa.ChunkedArray]:
    """Return what stands before each row's passages; a row is bad too where that is not UTF-8."""
    heading, trouble = validate_text(joined_text(table, names, separator="\n"))
    bad = pc.equal(trouble, INVALID_UTF8).fill_null(False)
    return {
        "text": pc.if_else(bad, pa.scalar(None, TEXT), text),
        "reason": pc.if_else(bad, pc.coalesce(reason, trouble), reason),
        HEADING: heading,
    }


def _wanted_rows(chunks: Sequence[Chunk], columns: Columns, job_input: Input) -> Iterator[pa.Table]:
    """Yield the needed columns, in plain types, of each chunk's rows, and the row numbers."""
    if chunks[0].lines is not None:
        yield from _wanted_lines(chunks, columns)
        return
    shard = chunks[0].shard
    metadata = _metadata(shard.stored, chunks[0].footer_bytes)
    groups = _groups(metadata, chunks[0], job_input)
    numbers = _row_numbers(metadata, chunks[0], groups)
    places = [
        (int(first), int(last))
        for first, last in np.searchsorted(numbers, [(chunk.start, chunk.stop) for chunk in chunks])
    ]
    named = _names_in(shard, metadata.schema.to_arrow_schema(), columns)
    own = [*dict.fromkeys(named.values())]
    with open_unchanged(shard.stored) as source:
        if places == [(0, len(numbers))]:
            tables = iter([_whole(source, metadata, groups, own)])
        else:
            tables = _parts(source, metadata, groups, own, places)
        for place, (first, last) in enumerate(places):
            table = next(tables)
            wanted = {name: _plain(table.column(place)) for name, place in named.items()}
            wanted |= _partitions(shard, columns.needed, own, last - first)
            if shard.table is not None:
                wanted = table_columns(shard.table, wanted, last - first)
            rows = pa.table(wanted | {_ROW: pa.array(numbers[first:last], pa.uint32())})
            if place + 1 < len(places):
                require_unchanged(shard.stored)
                yield rows
    yield rows  # the end of the block has compared the etag for it


def _names_in(shard: Shard, schema: pa.Schema, columns: Columns) -> dict[str, str]:
    """Return by needed column its name in the file; none of a column that the file has not."""
    if shard.table is not None:
        places = file_columns(shard.table, schema)
        return {name: place for name, place in places.items() if name in columns.needed}
    return {name: name for name in columns.needed if name in schema.names}


def _wanted_lines(chunks: Sequence[Chunk], columns: Columns) -> Iterator[pa.Table]:
    """Yield what `_wanted_rows` does, of a shard of JSON Lines."""
    shard, lines = chunks[0].shard, chunks[0].lines
    assert lines is not None
    own = [name for name in columns.needed if name in lines.schema.names]
    with open_unchanged(shard.stored) as source:
        for chunk, table in zip(chunks, line_tables(source, chunks, own), strict=True):
            wanted = {name: _plain(table.column(name)) for name in own}
            wanted |= _partitions(shard, columns.needed, own, chunk.rows)
            numbers = pa.array(np.arange(chunk.start, chunk.stop), pa.uint32())
            rows = pa.table(wanted | {_ROW: numbers})
            if chunk is not chunks[-1]:
                require_unchanged(shard.stored)
                yield rows
    yield rows  # the end of the block has compared the etag for it


@functools.lru_cache(maxsize=4)
def _metadata(file: Stored, length: int) -> pq.FileMetaData:
    """Return the footer, cached because chunks of one shard follow each other in one process."""
    return read_metadata(file, length=length)[0]


def _groups(metadata: pq.FileMetaData, chunk: Chunk, job_input: Input) -> list[int]:
    """Return the chunk's row groups, without those in which the filter passes no row."""
    groups = list(range(*chunk.groups))
    if job_input.filter is None or chunk.shard.table is not None:
        return groups  # a table's columns may have other names and types than the file's
    names = columns_of(job_input).filter
    kinds = {name: TEXT for name in names}  # of directories
    kinds |= {field.name: field.type for field in metadata.schema.to_arrow_schema()}
    return [
        group
        for group in groups
        if not never_passes(job_input.filter, group_bounds(metadata, group, names), kinds)
    ]


def _row_numbers(
    metadata: pq.FileMetaData, chunk: Chunk, groups: list[int]
) -> npt.NDArray[np.int64]:
    """Return the numbers of the rows in `groups`, which are some of the chunk's."""
    first, stop = chunk.groups
    rows = [metadata.row_group(group).num_rows for group in range(first, stop)]
    firsts = chunk.first_row + np.cumsum([0, *rows])
    spans = [np.arange(firsts[group - first], firsts[group - first + 1]) for group in groups]
    return np.concatenate([np.empty(0, np.int64), *spans])


def _whole(
    source: BinaryIO, metadata: pq.FileMetaData, groups: list[int], names: list[str]
) -> pa.Table:
    """Read all rows of the groups, in few large reads."""
    unit = _int96_unit(source, metadata, groups, names)
    with pq.ParquetFile(
        source,
        metadata=metadata,
        pre_buffer=True,
        page_checksum_verification=True,
        coerce_int96_timestamp_unit=unit,
    ) as file:
        tables = [
            _at_once(file, together, names)
            for together in _together(file.schema_arrow, groups, names)
        ]
    return pa.concat_tables(tables)


def _at_once(file: pq.ParquetFile, groups: list[int], names: list[str]) -> pa.Table:
    try:
        return file.read_row_groups(groups, columns=names, use_threads=False)
    except pa.ArrowNotImplementedError:  # more in a nested column than its 32-bit offsets reach
        return pa.Table.from_batches([*_batches(file, groups, names)])


def _batches(file: pq.ParquetFile, groups: list[int], names: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield the groups' rows in order, fewer at once where offsets do not reach so many."""
    rows, done = _STREAM_ROWS, 0
    while True:
        seen = 0
        try:
            for batch in file.iter_batches(rows, groups, columns=names, use_threads=False):
                begin, seen = seen, seen + batch.num_rows
                if seen > done:
                    yield batch.slice(max(0, done - begin))
        except pa.ArrowNotImplementedError:
            if rows == 1:
                raise
            rows, done = max(1, rows // _FEWER), max(done, seen)
        else:
            return


def _int96_unit(
    source: BinaryIO, metadata: pq.FileMetaData, groups: list[int], names: list[str]
) -> str:
    """Return a unit in which these groups' int96 is exact.

    It may be another than that of the whole shard or corpus, in which planning has seen that all
    values are exact, too: they get it when they are written.
    """
    return stored_unit(metadata, names) or exact_units(source, metadata, groups, names)[0]


def _together(schema: pa.Schema, groups: list[int], names: list[str]) -> list[list[int]]:
    """Return the row groups that Arrow can read at once: all, for most columns."""
    alone = any(has_inner_dictionary(schema.field(name).type) for name in names)
    return [[group] for group in groups] if alone and groups else [groups]


def _parts(
    source: BinaryIO,
    metadata: pq.FileMetaData,
    groups: list[int],
    names: list[str],
    wanted: Sequence[tuple[int, int]],
) -> Iterator[pa.Table]:
    """Yield the groups' rows [first, last) of each pair in `wanted`, in order and in one pass.

    Nothing behind the last is fetched or decoded, but int96 whose unit the file does not say.
    """
    unit = _int96_unit(source, metadata, groups, names)
    with pq.ParquetFile(
        source,
        metadata=metadata,
        pre_buffer=False,
        buffer_size=_STREAM_BYTES,
        page_checksum_verification=True,
        coerce_int96_timestamp_unit=unit,
    ) as file:
        schema = file.schema_arrow
        batches = chain.from_iterable(
            _batches(file, together, names) for together in _together(schema, groups, names)
        )
        end, batch = 0, None  # a batch may hold the end of what is wanted and the next beginning
        for first, last in wanted:
            parts = [] if batch is None else _within(batch, end, first, last)
            while end < last and (batch := next(batches, None)) is not None:
                end += batch.num_rows
                parts += _within(batch, end, first, last)
            if parts:
                yield pa.Table.from_batches(parts)
            else:
                yield pa.schema([schema.field(name) for name in names]).empty_table()


def _within(batch: pa.RecordBatch, end: int, first: int, last: int) -> list[pa.RecordBatch]:
    """Return the rows [first, last) of a batch that ends before row `end`; nothing if none is."""
    begin = end - batch.num_rows
    start, stop = max(first - begin, 0), min(last - begin, batch.num_rows)
    return [batch.slice(start, stop - start)] if start < stop else []


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return in_type(column, read_type(column.type))


def _partitions(
    shard: Shard, needed: tuple[str, ...], own: list[str], rows: int
) -> dict[str, pa.Array]:
    """Return a constant column for each needed `key=value` directory not held by the file."""
    return {
        key: pa.repeat(pa.scalar(value, TEXT), rows)
        for key, value in shard.partitions
        if key in needed and key not in own
    }
