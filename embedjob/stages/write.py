"""WRITE: a Ray datasink that checks each chunk's file and puts it, whole and once."""

import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data.datasource import Datasink

from embedjob.errors import AccessError
from embedjob.job.result import Outcome
from embedjob.output.chunk_file import Committed
from embedjob.output.committing import commit
from embedjob.output.head_columns import INDEX_LIST, INDICES, ROUTER, VALUE_LIST, VALUES
from embedjob.output.lease import Lease, is_seen, unseen
from embedjob.output.schema import OutputSpec, embedding_type
from embedjob.stages.attempts import STORAGE_SHARE, begin_attempt, begin_parcel, limited
from embedjob.stages.calibrating import with_quantization
from embedjob.stages.chunk_state import ChunkState, Failure, describe, from_block
from embedjob.stages.reuse.merging import TAKEN, merged
from embedjob.storage.retrying import patience
from embedjob.vectors.encoded import Encoded, Failures, Lines

if TYPE_CHECKING:
    from embedjob.job.planning import JobPlan

Commit = Callable[[ChunkState], Committed]


def write(embeddings: ray.data.Dataset, commit: Commit, *, ledger: Any) -> None:
    """Run the pipeline: every chunk is committed, or its fault is noted, in the ledger."""
    embeddings.write_datasink(ChunkSink(commit, ledger))


class ChunkSink(Datasink[None]):
    """Puts files; it neither claims nor publishes, so it may run anywhere and more than once."""

    def __init__(self, commit: Commit, ledger: Any) -> None:
        """Take the function that commits a chunk."""
        self._commit = commit
        self._ledger = ledger

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> None:
        """Commit every chunk in the blocks, each by itself."""
        for block in blocks:
            states = [*from_block(block)]
            keys = [state.chunk.key for state in states]
            begin_parcel(("write",), dict.fromkeys(keys, 0.0), self._ledger)
            befores = [None, *keys]
            ends = [self._attempt(*one) for one in zip(states, befores, strict=False)]
            done = self._ledger.done.remote(*filter(None, ends))
            ray.get([done, self._ledger.abandon.remote(*keys)])

    def _attempt(self, state: ChunkState, before: str | None) -> Outcome | None:
        """Commit within an attempt: Ray Data repeats a write whose process died without end."""
        if state.failure is not None:
            return outcome_of(state, self._commit)
        attempt = begin_attempt("write", state.chunk.key, self._ledger, before=before)
        if isinstance(attempt, Failure):
            return outcome_of(replace(state, failure=attempt), self._commit)
        started = time.monotonic()
        with limited(attempt.seconds), patience(STORAGE_SHARE * attempt.seconds):
            end = outcome_of(state, self._commit)
        if end is None:
            return None
        return replace(end, stats={**end.stats, "write_seconds": time.monotonic() - started})


@dataclass(frozen=True)
class Committer:
    """Puts chunks' files under the output of a lease, with one spec and one vector dtype."""

    lease: Lease
    spec: OutputSpec
    vector_dtype: str = "float32"

    @classmethod
    def of(cls, plan: "JobPlan", lease: Lease) -> "Committer":
        """Return what puts the files of a plan's chunks, for the run that holds the lease."""
        # On the driver alone: what planning imports would cost each writing process seconds.
        from embedjob.job.output import output_spec

        return cls(lease, output_spec(plan), plan.job.config.encoder.vector_dtype)

    def __call__(self, state: ChunkState) -> Committed:
        """Put the file of the chunk's embeddings and return it; ChunkError if it may not be put.

        AccessError on a node with another disk at the output's path: it may have joined late.
        """
        require_seen(self.lease)
        out = self.lease.out
        rows_in = int(state.stats["rows"])
        # Read here: the first encoder to load put the ranges, and the driver never sees them.
        spec = with_quantization(self.spec, out, vector_dtype=self.vector_dtype)
        return commit(out, state.chunk, assemble_rows(state), rows_in=rows_in, spec=spec)


@lru_cache(maxsize=1)
def require_seen(lease: Lease) -> None:
    """Raise AccessError on a node with another disk at the output's path.

    A process looks once; a refusal is repeated for every chunk.
    """
    if not is_seen(lease):
        raise AccessError(f"node {socket.gethostname()}: {unseen(lease)}")


def outcome_of(state: ChunkState, commit: Commit) -> Outcome | None:
    """Return how the chunk ended; None if it was abandoned and is left for a later run."""
    chunk = state.chunk
    outcome = Outcome(
        key=chunk.key,
        shard=chunk.shard.url,
        start=chunk.start,
        stop=chunk.stop,
        stats=state.stats,
    )
    if state.failure is not None:
        if state.failure.kind == "abandoned":
            return None
        return replace(outcome, fault=state.failure.detail)
    try:
        committed = commit(state)
    except (
        Exception
    ) as error:  # a full disk, a lost bucket: a fault of this chunk, not the end of the run
        return replace(outcome, fault=describe(error))
    return replace(outcome, committed=committed)


def assemble_rows(state: ChunkState) -> pa.Table:
    """Return the chunk's rows with their embeddings; null, with a reason, where a row has none.

    A row whose text has several embeddings has as many lines, numbered by `part`. Rows that take
    over old lines have these, their vectors in STORED.
    """
    rows, encoded = state.rows, state.encoded
    assert rows is not None
    assert encoded is not None
    if state.reused is None:
        return _assembled(rows, encoded)
    taken = rows[TAKEN].is_valid()
    made = rows.filter(pc.invert(taken)).drop_columns([TAKEN])
    return merged(_assembled(made, encoded), rows.filter(taken), state.reused)


def _assembled(rows: pa.Table, encoded: Encoded) -> pa.Table:
    if encoded.lines is not None:
        rows, which = _lines(rows, encoded.lines, encoded.failed)
    else:
        which = rows["unique"].fill_null(0).to_numpy()
    texts = rows["unique"]
    good = texts.is_valid().to_numpy()
    lost = np.array(sorted(encoded.failed), np.int64)
    good[good] = ~np.isin(texts.drop_null().to_numpy(), lost)
    matrix = np.zeros((len(good), encoded.embeddings.shape[1]), np.float32)
    matrix[good] = encoded.embeddings[which[good]]
    embedding = pa.FixedSizeListArray.from_arrays(
        pa.array(matrix.reshape(-1)), matrix.shape[1], mask=pa.array(~good)
    )
    failures = [encoded.failed.get(text) for text in texts.to_pylist()] if len(lost) else None
    table = _with_failures(rows, failures).drop_columns("unique")
    table = table.append_column("embedding", embedding)
    for name, column in _head_columns(encoded, good, which[good]):
        table = table.append_column(name, column)
    return table


def _head_columns(
    encoded: Encoded, good: npt.NDArray[np.bool_], texts: npt.NDArray[np.integer]
) -> Iterator[tuple[str, pa.Array]]:
    """Yield the columns beside the embedding: these texts' values in good rows, null in others."""
    absent = pa.array(~good)
    if encoded.sparse is not None:
        sparse = encoded.sparse.take(texts)
        sizes = np.zeros(len(good), np.int64)
        sizes[good] = np.diff(sparse.offsets)
        offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int64()).cast(pa.int32())
        for name, values, kind in (
            (INDICES, sparse.indices, INDEX_LIST),
            (VALUES, sparse.values, VALUE_LIST),
        ):
            column = pa.ListArray.from_arrays(offsets, pa.array(values), type=kind, mask=absent)
            yield name, column
    if encoded.routers is not None:
        scores = np.zeros((len(good), encoded.routers.shape[1]), np.float32)
        scores[good] = encoded.routers[texts]
        kind = embedding_type(scores.shape[1], "float32")
        flat = pa.array(scores.ravel())
        yield ROUTER, pa.FixedSizeListArray.from_arrays(flat, type=kind, mask=absent)


def _lines(
    rows: pa.Table, lines: Lines, failed: Failures
) -> tuple[pa.Table, npt.NDArray[np.int64]]:
    """Repeat rows as often as they have embeddings, at least once; return whose each line is."""
    texts = rows["unique"].fill_null(0).to_numpy()
    good = rows["unique"].is_valid().to_numpy() & ~np.isin(texts, list(failed))
    counts = np.ones(len(texts), np.int64)
    counts[good] = lines.counts[texts[good]]
    source = np.repeat(np.arange(len(texts)), counts)
    part = np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)
    which = np.where(good[source], lines.offsets[texts[source]] + part, 0)
    # Only bad rows need an excerpt: on each line of a long text it could make gigabytes.
    excerpt = pc.if_else(pa.array(good), pa.scalar(None, pa.string()), rows["excerpt"])
    rows = rows.set_column(rows.schema.get_field_index("excerpt"), "excerpt", excerpt)
    spread = rows.take(pa.array(source)).append_column("part", pa.array(part, pa.uint32()))
    if lines.chars is not None:
        absent = ~good[source]
        chars = np.zeros((len(source), 2), np.int64)
        chars[good[source]] = lines.chars[which[good[source]]]
        for place, name in enumerate(("char_start", "char_stop")):
            column = pa.array(chars[:, place], pa.uint32(), mask=absent)
            spread = spread.append_column(name, column)
    return spread, which


def _with_failures(rows: pa.Table, failures: Sequence[tuple[str, str] | None] | None) -> pa.Table:
    if failures is None:
        return rows
    for place, name in enumerate(("reason", "detail")):
        values = pa.array([failure and failure[place] for failure in failures], pa.string())
        column = pc.coalesce(rows[name], values)
        rows = rows.set_column(rows.schema.get_field_index(name), name, column)
    return rows
