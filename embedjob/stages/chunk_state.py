"""Chunk states in Ray: a parcel is a block of one row, so that Ray can neither split nor mix it."""

import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
from ray.exceptions import RayError

from embedjob.errors import EmbedjobError, FaultError
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
    """One chunk and what has been made of it so far, or why nothing can be made of it.

    `reused` are the lines of old files that it takes over, None where it takes none; `repeated` are
    the hashes of its texts, one behind the other, that other chunks are to embed too.
    """

    chunk: Chunk
    rows: pa.Table | None = None
    views: TokenViews | None = None
    encoded: Encoded | None = None
    failure: Failure | None = None
    stats: Mapping[str, float] = field(default_factory=dict)
    reused: pa.Table | None = None
    repeated: bytes = b""


def to_block(states: Iterable[ChunkState]) -> pa.Table:
    """Pack a parcel into a block of one row; a state becomes a fault where memory is too small."""
    rows, reused, rest = zip(*map(_packed, states), strict=True)
    cells = {"rows": rows, "reused": reused, "rest": rest}
    return pa.table({name: _one_row(some) for name, some in cells.items()})


def from_block(block: pa.Table) -> Iterator[ChunkState]:
    """Yield the states in a block; their rows are views of the block's memory."""
    for cells in zip(block["rows"], block["reused"], block["rest"], strict=True):
        for rows, reused, rest in zip(*(cell.values for cell in cells), strict=True):
            chunk, views, encoded, failure, stats, repeated = pickle.loads(rest.as_buffer())
            tables = (_from_ipc(rows), _from_ipc(reused))
            yield ChunkState(chunk, tables[0], views, encoded, failure, stats, tables[1], repeated)


def describe(error: BaseException) -> str:
    """Return the error in one line; errors that are not embedjob's own keep their type."""
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, EmbedjobError) else f"{type(error).__name__}: {text}"


def raised_in_worker(error: Exception, what: str) -> Exception:
    """Return the error that a worker raised: Ray wraps it in the worker's traceback.

    Any other error of Ray's is a fault, and `what` says what cannot be done for it.
    """
    cause = getattr(error, "cause", None)
    if isinstance(cause, EmbedjobError):
        return cause
    if isinstance(error, RayError):
        return FaultError(f"{what}: {describe(cause or error)}; run again to resume")
    return error


def _packed(state: ChunkState) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Return tables as Arrow IPC, since pickling a slice would carry its parent, and the rest."""
    try:
        rows, reused = (
            None if table is None else _to_ipc(table) for table in (state.rows, state.reused)
        )
        rest = (
            state.chunk,
            state.views,
            state.encoded,
            state.failure,
            dict(state.stats),
            state.repeated,
        )
        return _cell(rows), _cell(reused), _cell(pickle.dumps(rest, protocol=5))
    except Exception as error:
        failure = Failure("fault", describe(error))
        return _packed(ChunkState(state.chunk, failure=failure, stats=state.stats))


def _one_row(cells: Sequence[pa.Array]) -> pa.Array:
    """Return the cells as the one value of a column; a cell that is alone is not copied."""
    values = cells[0] if len(cells) == 1 else pa.concat_arrays(cells)
    return pa.LargeListArray.from_arrays([0, len(values)], values)


def _cell(payload: pa.Buffer | bytes | None) -> pa.Array:
    """Return an array of one value, without copying its bytes."""
    if payload is None:
        return pa.nulls(1, pa.large_binary())
    data = payload if isinstance(payload, pa.Buffer) else pa.py_buffer(payload)
    offsets = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def _from_ipc(cell: pa.Scalar) -> pa.Table | None:
    return pa.ipc.open_stream(cell.as_buffer()).read_all() if cell.is_valid else None


def _to_ipc(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()
