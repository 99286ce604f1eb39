"""READ: Ray tasks that read and tokenize chunk after chunk, and pass them on in parcels."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa
import ray
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from embedjob.input.chunks import (
    PARCEL_CHUNKS,
    Chunk,
    newest_first,
    parcels,
    passes,
    text_of,
)
from embedjob.stages.attempts import STORAGE_SHARE, begin_attempt, begin_parcel, limited
from embedjob.stages.chunk_state import ChunkState, Failure, describe, to_block
from embedjob.stages.reuse.merging import NO_REUSE, Reuse
from embedjob.storage.retrying import patience, retried

ReadRows = Callable[[Sequence[Chunk]], Iterator[pa.Table]]
Then = Callable[[ChunkState], ChunkState]
# So many for each actor at least: else one would work on the last while the others wait.
_PARCELS_PER_ACTOR = 8
# READ and TOKENIZE of one chunk peak at 8 (ASCII) to 10 times (Cyrillic) its text.
_MEMORY_PER_TEXT_BYTE = 10
# Of the largest node, so that a request is never more than a node has beside its other tasks.
_MAX_SHARE = 0.75


def read(  # noqa: PLR0913 - each parameter is a part of the stage
    chunks: Sequence[Chunk],
    rows_of: ReadRows,
    then: Then | None,
    *,
    actors: int,
    ledger: Any,
    newest: bool = False,
    reuse: Reuse = NO_REUSE,
) -> ray.data.Dataset:
    """Return a dataset of the states of all chunks, the largest first, in parcels.

    Args:
        chunks: what to read.
        rows_of: reads the chunks of one pass.
        then: how the same task tokenizes each state before it reads on; another does it if None.
        actors: how many will share the parcels.
        ledger: the run's ledger.
        newest: whether the chunks of the newest shards come first, and not the largest.
        reuse: the vectors that chunks take over.
    """
    source = ChunkSource(
        chunks, rows_of, then, actors=actors, ledger=ledger, newest=newest, reuse=reuse
    )
    states: ray.data.Dataset = ray.data.read_datasource(
        source, override_num_blocks=len(source.tasks), memory=memory_of(chunks)
    )
    return states


def memory_of(chunks: Sequence[Chunk]) -> int:
    """Return the bytes of memory that a task for the largest of the chunks may take."""
    largest = max(chunk.text_bytes for chunk in chunks)
    nodes = [node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]]
    return int(min(largest * _MEMORY_PER_TEXT_BYTE, max(nodes) * _MAX_SHARE))


class ChunkSource(Datasource):
    """Chunks as a Ray datasource; what one task yields must stay apart, see `connected`.

    `tasks` are the chunks of each task: those of one pass over a shard, or of several small ones.
    """

    def __init__(  # noqa: PLR0913 - those of `read`
        self,
        chunks: Sequence[Chunk],
        rows_of: ReadRows,
        then: Then | None,
        *,
        actors: int,
        ledger: Any,
        newest: bool = False,
        reuse: Reuse = NO_REUSE,
    ) -> None:
        """Take what `read` takes."""
        super().__init__()
        self._most = max(1, min(PARCEL_CHUNKS, len(chunks) // (_PARCELS_PER_ACTOR * actors)))
        if newest:
            self.tasks = parcels(passes(newest_first(chunks)), most=self._most)
        else:
            # Actors would wait for a large one at the end.
            self.tasks = sorted(parcels(passes(chunks), most=self._most), key=text_of, reverse=True)
        self._rows_of = rows_of
        self._then = then
        self._ledger = ledger
        self._reuse = reuse

    def get_name(self) -> str:
        """Return the name that Ray's dashboard shows."""
        return "Chunks"

    def estimate_inmemory_data_size(self) -> int | None:
        """Return the bytes of text that the footers promise."""
        return sum(map(text_of, self.tasks))

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: Any = None,
    ) -> list[ReadTask]:
        """Return a Ray task for each of `tasks`; the parallelism that Ray requests is ignored."""
        return [self._task(chunks) for chunks in self.tasks]

    def _task(self, chunks: Sequence[Chunk]) -> ReadTask:
        rows_of, then, ledger = self._rows_of, self._then, self._ledger
        stages = ("read", "tokenize") if then else ("read",)
        made = parcels(((chunk,) for chunk in chunks), most=self._most)
        reuse = self._reuse.of(chunks)

        def blocks() -> Iterator[pa.Table]:
            states, before = map(reuse.attached, read_states(chunks, rows_of, ledger)), None
            states = map(then, states) if then else states
            for parcel in made:
                sizes = {chunk.key: float(chunk.text_bytes) for chunk in parcel}
                begin_parcel(stages, sizes, ledger, before=before)
                yield to_block(islice(states, len(parcel)))
                before = parcel[-1].key

        metadata = BlockMetadata(
            num_rows=len(made),
            size_bytes=text_of(chunks),
            exec_stats=None,
            input_files=(chunks[0].shard.url,),
        )
        return ReadTask(blocks, metadata)


def read_states(chunks: Sequence[Chunk], rows_of: ReadRows, ledger: Any) -> Iterator[ChunkState]:
    """Yield each chunk's rows, or the reason why there are none: a failed chunk is a value."""
    before = None
    for together in passes(chunks):
        for state in _read_pass(together, rows_of, ledger, before):
            yield state
            before = state.chunk.key


def _read_pass(
    chunks: Sequence[Chunk], rows_of: ReadRows, ledger: Any, before: str | None
) -> Iterator[ChunkState]:
    """Read in one pass; behind a chunk that failed, a further pass begins."""
    tables: Iterator[pa.Table] | None = None

    def next_rows(left: Sequence[Chunk]) -> pa.Table:
        nonlocal tables
        going, tables = tables or rows_of(left), None
        rows = next(going)
        tables = going
        return rows

    for place, chunk in enumerate(chunks):
        size = float(chunk.text_bytes)
        attempt = begin_attempt("read", chunk.key, ledger, size=size, before=before)
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
