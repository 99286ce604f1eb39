"""Row checks: what must hold of a chunk's rows before they are put."""

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from embedjob.errors import ChunkError
from embedjob.input.chunks import Chunk
from embedjob.output.head_columns import INDICES, ROUTER, VALUES, head_column_problems
from embedjob.output.schema import CHARS, PART, ROW, STORED, OutputSpec
from embedjob.text.arrays import Flags

# How far a norm may be from 1, by the precision in which the vectors arrive.
_NORM_TOLERANCE: Mapping[np.dtype[np.floating], float] = {
    np.dtype(np.float32): 1e-4,
    np.dtype(np.float16): 2e-3,
}
_PLACES = pa.schema([(name, pa.uint32()) for name in (ROW.name, PART.name, *CHARS)])
_HEAD_COLUMNS = (INDICES, VALUES, ROUTER)


def first_lines(table: pa.Table) -> pa.Table:
    """Return one line of every row: the first, where a row may have several."""
    if PART.name not in table.column_names:
        return table
    return table.filter(pc.equal(table.column(PART.name), 0))


def lines_in_order(table: pa.Table, *, gaps: bool = False) -> bool:
    """Return whether rows ascend, and the lines of each are its parts from 0 on without a gap.

    With `gaps` a row may lack parts.
    """
    rows = table.column(ROW.name).to_numpy().astype(np.int64)
    if PART.name not in table.column_names:
        return bool(np.all(np.diff(rows) > 0))
    parts = table.column(PART.name).to_numpy().astype(np.int64)
    if gaps:
        return bool(np.all((np.diff(rows) > 0) | ((np.diff(rows) == 0) & (np.diff(parts) > 0))))
    # A line goes on with its row, or begins the next one.
    goes_on = (np.diff(rows) == 0) & (np.diff(parts) == 1)
    begins = (np.diff(rows) > 0) & (parts[1:] == 0)
    return not np.any(parts[:1]) and bool(np.all(goes_on | begins))


def sound(embedding: pa.ChunkedArray, *, normalized: bool) -> Flags:
    """Return which embeddings, of the type in which they are stored, are as promised [R].

    Codes are there or not; of numbers, each is finite, and with `normalized` the norm is 1.
    """
    good: Flags = embedding.is_valid().to_numpy()
    kind = embedding.type
    if pa.types.is_floating(kind.value_type):
        vectors = embedding.combine_chunks().flatten().to_numpy(zero_copy_only=False)
        good[good] = _as_promised(vectors.reshape(-1, kind.list_size), normalized=normalized)
    return good


def _as_promised(vectors: npt.NDArray[np.floating], *, normalized: bool) -> Flags:
    finite: Flags = np.isfinite(vectors).all(axis=1)
    return finite & _has_unit_norm(vectors) if normalized else finite


def _has_unit_norm(vectors: npt.NDArray[np.floating]) -> Flags:
    wide = vectors.astype(np.float32, copy=False)
    with np.errstate(invalid="ignore", over="ignore"):
        off = np.abs(np.sqrt(np.einsum("rd,rd->r", wide, wide)) - 1)
        return np.asarray(off <= _NORM_TOLERANCE[vectors.dtype])


def passage_problems(
    good: pa.Table, bad: pa.Table | None, counts: Mapping[str, int]
) -> Iterator[str]:
    """Yield what is wrong with the passages of a chunk, whose bad ones are in a file of their own.

    Of each row all passages must be there once, in one of the two files, and leave no character
    out.
    """
    both = [table for table in (good, bad) if table is not None]
    if any(_kinds(table) != _PLACES.types for table in both):
        names = ", ".join(_PLACES.names)
        yield f"lacks columns of passages, or has them in other types ({names})"
        return
    tables = [table.select(_PLACES.names).cast(_PLACES) for table in both]
    lines = pa.concat_tables(tables).sort_by([(ROW.name, "ascending"), (PART.name, "ascending")])
    rows, lost = len(lines[ROW.name].unique()), 0 if bad is None else len(bad[ROW.name].unique())
    if (rows, lost) != (counts["rows"], counts["quarantined"]):
        yield f"has passages of {rows} rows, {lost} quarantined, but its footer counts {counts}"
    if not lines_in_order(lines):
        yield "a row lacks a passage, or has it twice"
    lines = lines.filter(lines[CHARS[0]].is_valid())
    row, start, stop = (lines[name].to_numpy().astype(np.int64) for name in (ROW.name, *CHARS))
    goes_on = np.diff(row) == 0
    gap = goes_on & ((start[1:] > stop[:-1]) | (stop[1:] <= stop[:-1]))
    begins_late = np.append(True, ~goes_on)[: len(row)] & (start > 0)
    if gap.any() or begins_late.any():
        yield "the passages of a row leave characters out"


def _kinds(table: pa.Table) -> list[pa.DataType]:
    """Return the types of the columns that say which passage a line is."""
    return [table.schema.field(name).type for name in _PLACES.names if name in table.column_names]


def check_rows(table: pa.Table, chunk: Chunk, *, rows_in: int, spec: OutputSpec) -> None:
    """Raise ChunkError unless every row that came in is here once, in order, embedded or bad."""
    rows = first_lines(table).column("row").to_numpy()
    if len(rows) != rows_in:
        raise _refused(chunk, f"{rows_in} rows came in and {len(rows)} came out")
    if not lines_in_order(table):
        raise _refused(chunk, "its rows are repeated or out of order")
    if len(rows) and not (chunk.start <= rows[0] and rows[-1] < chunk.stop):
        raise _refused(chunk, f"it holds rows {rows[0]} to {rows[-1]}, not all inside its range")
    bad = table.column("reason").is_valid()
    unexplained = pc.and_not(pc.invert(_has_vector(table)), bad)
    if pc.any(unexplained).as_py():
        row = table.column("row").filter(unexplained)[0]
        raise _refused(chunk, f"row {row} has neither an embedding nor a reason")
    if spec.on_bad_row == "fail" and pc.any(bad).as_py():
        first = table.filter(bad).slice(0, 1).to_pylist()[0]
        raise _refused(chunk, f"row {first['row']} is bad: {first['reason']} ({first['detail']})")


def _has_vector(table: pa.Table) -> pa.ChunkedArray:
    has = table.column("embedding").is_valid()
    return pc.or_(has, table.column(STORED).is_valid()) if STORED in table.column_names else has


def checked_vectors(table: pa.Table, chunk: Chunk, *, spec: OutputSpec) -> npt.NDArray[np.generic]:
    """Return the good rows' embeddings, one line each; ChunkError when one is not as promised.

    They are checked as they arrive, and only then converted to the type in which they are stored;
    a vector in STORED has that type already.
    """
    good = table.filter(table.column("reason").is_null())
    if STORED not in table.column_names:
        return _checked(good, chunk, spec=spec)
    stored = good.column(STORED)
    taken = stored.is_valid().to_numpy()
    made = _checked(good.filter(pa.array(~taken)), chunk, spec=spec)
    old = stored.combine_chunks().flatten().to_numpy()
    vectors = np.empty((len(good), stored.type.list_size), old.dtype)
    vectors[~taken] = made
    vectors[taken] = old.reshape(-1, stored.type.list_size)
    return vectors


def _checked(good: pa.Table, chunk: Chunk, *, spec: OutputSpec) -> npt.NDArray[np.generic]:
    column = good.column("embedding")
    width = spec.width
    if column.type.list_size != width:
        raise _refused(
            chunk, f"its vectors are {column.type.list_size} wide, but {width} was planned"
        )
    flat = pa.chunked_array([part.flatten() for part in column.chunks], column.type.value_type)
    if flat.null_count:
        raise _refused(chunk, f"{flat.null_count} numbers of its vectors are null")
    vectors: npt.NDArray[np.floating] = flat.to_numpy().reshape(-1, width)
    rows = good.column("row").to_numpy()
    _require(np.isfinite(vectors).all(axis=1), rows, chunk, "has a vector that is not finite")
    if spec.normalized:
        _require(_has_unit_norm(vectors), rows, chunk, "has a vector whose norm is not 1")
    if spec.quantize is not None:
        return spec.quantize(vectors)
    planned = spec.data.field("embedding").type.value_type
    assert pa.types.is_floating(planned), f"{planned} is not made by a cast"
    with np.errstate(over="ignore"):  # reported below, with its row
        stored = vectors.astype(planned.to_pandas_dtype(), copy=False)
    _require(np.isfinite(stored).all(axis=1), rows, chunk, f"has a vector too large for {planned}")
    return stored


def check_head_columns(table: pa.Table, chunk: Chunk, *, spec: OutputSpec) -> None:
    """Raise ChunkError when the columns beside a good row's embedding are not as promised."""
    names = [name for name in spec.data.names if name in _HEAD_COLUMNS]
    lacking = sorted(set(names) - set(table.column_names))
    if lacking:
        raise _refused(chunk, f"it has no {', '.join(lacking)}")
    good = table.select(["row", "embedding", *names]).filter(table.column("reason").is_null())
    if STORED in table.column_names:
        place = good.schema.get_field_index("embedding")
        good = good.set_column(place, "embedding", pa.repeat(True, len(good)))
    for place, what in head_column_problems(good, vocabulary=spec.vocabulary):
        raise _refused(chunk, f"row {good.column('row')[place]} {what}")
    if ROUTER in names and table.schema.field(ROUTER).type != spec.data.field(ROUTER).type:
        got = table.schema.field(ROUTER).type.list_size
        planned = spec.data.field(ROUTER).type.list_size
        raise _refused(chunk, f"it has {got} router scores, but {planned} were planned")


def _require(
    holds: npt.NDArray[np.bool_], rows: npt.NDArray[np.uint32], chunk: Chunk, otherwise: str
) -> None:
    if not holds.all():
        raise _refused(chunk, f"row {rows[~holds][0]} {otherwise}")


def _refused(chunk: Chunk, what: str) -> ChunkError:
    return ChunkError(
        f"{chunk.shard.url}, rows {chunk.start} to {chunk.stop}: not written, because {what}"
    )
