"""READ: one Ray read task for each pass over a shard, giving one chunk state after the other."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from embedjob.input.chunks import Chunk, passes
from embedjob.stages.attempts import STORAGE_SHARE, begin_attempt, limited, packed
from embedjob.stages.chunk_state import ChunkState, Failure, describe
from embedjob.storage.retrying import patience, retried

ReadRows = Callable[[Sequence[Chunk]], Iterator[pa.Table]]
# READ and TOKENIZE of one chunk peak at 8 (ASCII) to 10 times (Cyrillic) its text.
_MEMORY_PER_TEXT_BYTE = 10
# Of the largest node, so that a request is never more than a node has beside its other tasks.
_MAX_SHARE = 0.75


def read(
    chunks: Sequence[Chunk], rows_of: ReadRows, *, ledger: Any, memory: int
) -> ray.data.Dataset:
    """Return a dataset of chunk states, one for each chunk; `memory` as `memory_of` gives it."""
    source = ChunkSource(chunks, rows_of, ledger)
    rows: ray.data.Dataset = ray.data.read_datasource(
        source, override_num_blocks=source.passes, memory=memory
    )
    return rows


def memory_of(chunks: Sequence[Chunk]) -> int:
    """Return the bytes of memory that a task for the largest of the chunks may take."""
    largest = max(chunk.text_bytes for chunk in chunks)
    nodes = [node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]]
    return int(min(largest * _MEMORY_PER_TEXT_BYTE, max(nodes) * _MAX_SHARE))


class ChunkSource(Datasource):
    """Chunks as a Ray datasource; what one task yields must stay apart, see `connected`."""

    def __init__(self, chunks: Sequence[Chunk], rows_of: ReadRows, ledger: Any) -> None:
        """Take the chunks, and the function that reads the chunks of one pass."""
        super().__init__()
        self._passes = passes(chunks)
        self._rows_of = rows_of
        self._ledger = ledger

    @property
    def passes(self) -> int:
        """Return the number of passes, each of which is a task."""
        return len(self._passes)

    def get_name(self) -> str:
        """Return the name that Ray's dashboard shows."""
        return "Chunks"

    def estimate_inmemory_data_size(self) -> int | None:
        """Return the bytes of text that the footers promise."""
        return sum(chunk.text_bytes for chunks in self._passes for chunk in chunks)

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: Any = None,
    ) -> list[ReadTask]:
        """Return one task per pass; the parallelism that Ray requests is ignored."""
        return [self._task(chunks) for chunks in self._passes]

    def _task(self, chunks: Sequence[Chunk]) -> ReadTask:
        rows_of, ledger = self._rows_of, self._ledger

        def blocks() -> Iterator[pa.Table]:
            for state in read_states(chunks, rows_of, ledger):
                yield packed(state)

        metadata = BlockMetadata(
            num_rows=len(chunks),
            size_bytes=sum(chunk.text_bytes for chunk in chunks),
            exec_stats=None,
            input_files=(chunks[0].shard.url,),
        )
        return ReadTask(blocks, metadata)


def read_states(chunks: Sequence[Chunk], rows_of: ReadRows, ledger: Any) -> Iterator[ChunkState]:
    """Yield each chunk's rows, or the reason why there are none: a failed chunk is a value.

    Behind a chunk that failed, a further pass begins.
    """
    tables: Iterator[pa.Table] | None = None
    before = None

    def next_rows(left: Sequence[Chunk]) -> pa.Table:
        nonlocal tables
        going, tables = tables or rows_of(left), None
        rows = next(going)
        tables = going
        return rows

    for place, chunk in enumerate(chunks):
        attempt = begin_attempt("read", chunk.key, ledger, before=before)
        before = chunk.key
        if isinstance(attempt, Failure):
            tables = None
            yield ChunkState(chunk, failure=attempt)
            continue
        try:
            with limited(attempt.seconds), patience(STORAGE_SHARE * attempt.seconds):
                # As a whole: a read that is cut off half-way begins anew.
                rows = retried(partial(next_rows, chunks[place:]), what=chunk.shard.url)
        except Exception as error:  # a fault of one shard; the others go on
            yield ChunkState(chunk, failure=Failure("fault", describe(error)))
            continue
        stats = {"rows": rows.num_rows, "text_bytes": chunk.text_bytes}
        yield ChunkState(chunk, rows, stats=stats)
