"""Head columns: sparse entries and router scores beside the embedding, and their checks.

Shapes: R rows, N entries of all rows together.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa

from embedjob.output.schema import OutputSpec, embedding_type, vectors_of
from embedjob.text.arrays import Flags

INDICES, VALUES, ROUTER = "sparse_indices", "sparse_values", "router"
# Items are named as Parquet names them, so that a round trip is exact.
INDEX_LIST = pa.list_(pa.field("element", pa.uint32()))
VALUE_LIST = pa.list_(pa.field("element", pa.float32()))


def with_head_columns(
    spec: OutputSpec, *, vocabulary: int | None, routers: int | None
) -> OutputSpec:
    """Add columns for sparse entries below `vocabulary`, and for `routers` router scores."""
    fields = []
    if vocabulary is not None:
        fields += [pa.field(INDICES, INDEX_LIST), pa.field(VALUES, VALUE_LIST)]
    if routers is not None:
        fields.append(pa.field(ROUTER, embedding_type(routers, "float32")))
    data = spec.data
    for place, field in enumerate(fields, start=data.get_field_index("embedding") + 1):
        data = data.insert(place, field)
    return replace(spec, data=data, vocabulary=vocabulary)


def head_column_problems(table: pa.Table, *, vocabulary: int | None) -> Iterator[tuple[int, str]]:
    """Yield the place of a row and the problem with its head columns, for each kind of problem.

    A row without an embedding has no head columns either.
    """
    absent = table["embedding"].is_null().to_numpy()
    for name in (INDICES, VALUES, ROUTER):
        if name in table.column_names:
            unpaired: Flags = np.not_equal(table[name].is_null().to_numpy(), absent)
            yield from _first(
                unpaired, f"has {name} without an embedding, or an embedding without {name}"
            )
    if INDICES in table.column_names:
        yield from _broken_entries(table, vocabulary)
    if ROUTER in table.column_names:
        try:
            finite = np.isfinite(vectors_of(table[ROUTER])).all(axis=1)
        except ValueError as error:
            yield 0, f"has router scores beside others of another number: {error}"
            return
        yield from _first(np.logical_not(finite), "has router scores that are not finite", absent)


def _broken_entries(table: pa.Table, vocabulary: int | None) -> Iterator[tuple[int, str]]:
    absent = table[INDICES].is_null().to_numpy()
    columns = [_whole(table[name]).drop_null() for name in (INDICES, VALUES)]
    sizes, value_sizes = (np.asarray(column.value_lengths(), np.int64) for column in columns)
    yield from _first(
        np.not_equal(sizes, value_sizes),
        "has different numbers of sparse indices and values",
        absent,
    )
    if not np.array_equal(sizes, value_sizes):
        return
    indices = np.asarray(columns[0].flatten(), np.int64)
    values = np.asarray(columns[1].flatten(), np.float32)
    row = np.repeat(np.arange(len(sizes)), sizes)
    falls = np.logical_and(np.diff(indices) <= 0, np.diff(row) == 0)
    for wrong, what in (
        (row[~np.isfinite(values)], "has a sparse value that is not finite"),
        (row[1:][falls], "has sparse indices that are repeated or out of order"),
        (row[indices >= (vocabulary or np.inf)], f"has a sparse index of {vocabulary} or more"),
    ):
        yield from _first(np.isin(np.arange(len(sizes)), wrong), what, absent)


def _first(wrong: Flags, what: str, absent: Flags | None = None) -> Iterator[tuple[int, str]]:
    """Yield the first wrong row; its place counts all rows if only present rows are given."""
    if wrong.any():
        places = np.arange(len(wrong)) if absent is None else np.flatnonzero(~absent)
        yield int(places[wrong][0]), what


def _whole(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    return whole.combine_chunks() if isinstance(whole, pa.ChunkedArray) else whole
