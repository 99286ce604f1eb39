"""READ: one Ray read task per chunk, each giving one chunk state with rows."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from embedjob.input.chunks import Chunk
from embedjob.stages.attempts import STORAGE_SHARE, begin_attempt, limited, packed
from embedjob.stages.chunk_state import ChunkState, Failure, describe
from embedjob.storage.retrying import patience, retried

ReadRows = Callable[[Chunk], pa.Table]


def read(chunks: Sequence[Chunk], rows_of: ReadRows, *, ledger: Any) -> ray.data.Dataset:
    """Return a dataset of chunk states, one for each chunk, in the order of `chunks`."""
    source = ChunkSource(chunks, rows_of, ledger)
    rows: ray.data.Dataset = ray.data.read_datasource(source, override_num_blocks=len(chunks))
    return rows


class ChunkSource(Datasource):
    """Chunks as a Ray datasource; Ray may merge what one task yields, so a task reads one chunk."""

    def __init__(self, chunks: Sequence[Chunk], rows_of: ReadRows, ledger: Any) -> None:
        """Take the chunks, and the function that reads a chunk's rows."""
        super().__init__()
        self._chunks = chunks
        self._rows_of = rows_of
        self._ledger = ledger

    def get_name(self) -> str:
        """Return the name that Ray's dashboard shows."""
        return "Chunks"

    def estimate_inmemory_data_size(self) -> int | None:
        """Return the bytes of text that the footers promise."""
        return sum(chunk.text_bytes for chunk in self._chunks)

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: Any = None,
    ) -> list[ReadTask]:
        """Return one task per chunk, whatever parallelism Ray requests."""
        return [self._task(chunk) for chunk in self._chunks]

    def _task(self, chunk: Chunk) -> ReadTask:
        rows_of, ledger = self._rows_of, self._ledger

        def blocks() -> Iterator[pa.Table]:
            yield packed(read_state(chunk, rows_of, ledger))

        metadata = BlockMetadata(
            num_rows=1,
            size_bytes=chunk.text_bytes,
            exec_stats=None,
            input_files=(chunk.shard.url,),
        )
        return ReadTask(blocks, metadata)


def read_state(chunk: Chunk, rows_of: ReadRows, ledger: Any) -> ChunkState:
    """Return the chunk's rows, or the reason why there are none: a failed chunk is a value."""
    attempt = begin_attempt("read", chunk.key, ledger)
    if isinstance(attempt, Failure):
        return ChunkState(chunk, failure=attempt)
    try:
        with limited(attempt.seconds), patience(STORAGE_SHARE * attempt.seconds):
            # As a whole: a read that is cut off half-way begins anew.
            rows = retried(partial(rows_of, chunk), what=chunk.shard.url)
    except Exception as error:  # a fault of one shard; the others go on
        return ChunkState(chunk, failure=Failure("fault", describe(error)))
    return ChunkState(chunk, rows, stats={"rows": rows.num_rows, "text_bytes": chunk.text_bytes})
