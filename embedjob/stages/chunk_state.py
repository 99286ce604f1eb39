"""Chunk state in Ray: a chunk is a block of one row, so that Ray can neither split nor mix it."""

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa

from embedjob.errors import EmbedjobError
from embedjob.input.chunks import Chunk
from embedjob.text.views import TokenViews
from embedjob.vectors.encoded import Encoded


@dataclass(frozen=True)
class Failure:
    """Why a chunk has no embeddings: a fault is reported, an abandoned chunk is left for later."""

    kind: Literal["fault", "abandoned"]
    detail: str


@dataclass(frozen=True)
class ChunkState:
    """One chunk and what has been made of it so far, or why nothing can be made of it."""

    chunk: Chunk
    rows: pa.Table | None = None
    views: TokenViews | None = None
    encoded: Encoded | None = None
    failure: Failure | None = None
    stats: Mapping[str, float] = field(default_factory=dict)


def to_block(state: ChunkState) -> pa.Table:
    """Pack the state into a block of one row.

    The rows travel as Arrow IPC: pickling a sliced table would carry the whole parent.
    """
    rows = None if state.rows is None else _to_ipc(state.rows)
    rest = (
        state.chunk,
        state.views,
        state.encoded,
        state.failure,
        dict(state.stats),
    )
    return pa.table({"rows": _cell(rows), "rest": _cell(pickle.dumps(rest, protocol=5))})


def from_block(block: pa.Table) -> Iterator[ChunkState]:
    """Yield the states in a block; their rows are views of the block's memory."""
    for rows, rest in zip(block["rows"], block["rest"], strict=True):
        chunk, views, encoded, failure, stats = pickle.loads(rest.as_buffer())
        table = pa.ipc.open_stream(rows.as_buffer()).read_all() if rows.is_valid else None
        yield ChunkState(chunk, table, views, encoded, failure, stats)


def describe(error: BaseException) -> str:
    """Return the error in one line; errors that are not embedjob's own keep their type."""
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, EmbedjobError) else f"{type(error).__name__}: {text}"


def _cell(payload: pa.Buffer | bytes | None) -> pa.Array:
    """Return an array of one value, without copying its bytes."""
    if payload is None:
        return pa.nulls(1, pa.large_binary())
    data = payload if isinstance(payload, pa.Buffer) else pa.py_buffer(payload)
    offsets = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def _to_ipc(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()
