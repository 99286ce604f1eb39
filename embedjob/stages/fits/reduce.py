"""Reduce: the vectors of a snapshot to what a fit leaves, by Ray tasks over groups of its files.

Groups are the same whatever the cluster is, and their states are merged in their order: the same
files give the same bytes. A task holds one batch of vectors and one state.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import DataContext
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from embedjob.errors import FitError
from embedjob.input.samples import has_chunk, row_keys
from embedjob.job.fit_plan import VectorSource
from embedjob.output.schema import vectors_of
from embedjob.stages.chunk_state import raised_in_worker
from embedjob.storage.objects import Stored, join, open_unchanged
from embedjob.storage.retrying import retried
from embedjob.vectors.encoded import Vectors
from embedjob.vectors.finishing import finished
from embedjob.vectors.fits.fitted import Block, Fitted, Pass, State, Training

GROUP_ROWS = 131_072
_BATCH_ROWS = 8192
_UNREAD = "vectors cannot be read"
_COLUMNS = ["row", "embedding", "text_hash"]


class VectorFile(NamedTuple):
    """An embedding file, the shard whose rows it holds, and the other output's files of these."""

    stored: Stored
    shard: str
    rows: int
    others: tuple[Stored, ...] = ()


Group = tuple[VectorFile, ...]
StateOf = Callable[[Pass, Group], State]


def reduced(
    step: Pass | Training, source: VectorSource, fitted: dict[str, Fitted], *, gpus: float = 0
) -> Fitted:
    """Return what a fit leaves, after as many passes over the vectors as it asks for.

    Args:
        step: the first pass; a training goes over them by itself.
        source: the snapshot, and the finishing steps that its vectors still need.
        fitted: what the fits of these steps left.
        gpus: the GPUs that a training asks Ray for, a share of one or one; none for a CPU.

    Raises:
        FitError: the vectors do not give what the fit asks of them.
        FaultError: a file cannot be read, or the cluster is lost.
    """
    groups, state_of = groups_of(source), partial(state_of_group, source=source, fitted=fitted)
    if isinstance(step, Training):
        return _trained(step, groups, source, fitted, gpus)
    done: Pass | Fitted = step
    while not isinstance(done, Fitted):
        state = _merged(done, groups, state_of) if groups else None
        if state is None:
            raise FitError("there are no vectors; are all rows of the input bad, or filtered out?")
        done = done.finish(state)
    return done


def _trained(
    step: Training,
    groups: Sequence[Group],
    source: VectorSource,
    fitted: dict[str, Fitted],
    gpus: float,
) -> Fitted:
    """Return what a training leaves, which one task on one node does."""
    task: Any = ray.remote(train).options(num_cpus=1, num_gpus=gpus)
    device = "cuda" if gpus else "cpu"
    try:
        made: Fitted = ray.get(task.remote(step, groups, source, fitted, device))
    except Exception as error:
        raise raised_in_worker(error, _UNREAD) from error
    return made


def train(
    step: Training,
    groups: Sequence[Group],
    source: VectorSource,
    fitted: dict[str, Fitted],
    device: Literal["cpu", "cuda"],
) -> Fitted:
    """Return what a training leaves of the vectors of all files, in their order."""
    return step.train(_all_blocks(groups, source, fitted), device)


def _all_blocks(
    groups: Sequence[Group], source: VectorSource, fitted: dict[str, Fitted]
) -> Iterator[Block]:
    for file in chain.from_iterable(groups):
        # As a whole: a read that is cut off half-way begins anew.
        read = partial(_blocks, file, source, fitted)
        yield from retried(read, what=file.stored.url)


def _blocks(file: VectorFile, source: VectorSource, fitted: dict[str, Fitted]) -> list[Block]:
    return [block for block in blocks(file, source, fitted) if len(block.vectors_RD)]


def groups_of(source: VectorSource, *, rows: int = GROUP_ROWS) -> list[Group]:
    """Return the files that a fit reads, in groups of at least so many rows."""
    groups: list[list[VectorFile]] = [[]]
    held = 0
    others = _by_shard(source.others)
    for file in source.snapshot.files:
        if source.sample and not has_chunk(source.sample, file.shard, file.start):
            continue
        if held >= rows:
            groups.append([])
            held = 0
        beside = tuple(
            other
            for start, stop, other in others.get(file.shard, ())
            if start < file.stop and file.start < stop
        )
        stored = Stored(join(source.out, file.path), file.bytes, file.etag)
        groups[-1].append(VectorFile(stored, file.shard, file.rows, beside))
        held += file.rows
    return [tuple(group) for group in groups if group]


def _by_shard(source: VectorSource | None) -> dict[str, list[tuple[int, int, Stored]]]:
    """Return an output's files by the shard whose rows they hold."""
    files: dict[str, list[tuple[int, int, Stored]]] = {}
    for file in source.snapshot.files if source else ():
        assert source is not None
        stored = Stored(join(source.out, file.path), file.bytes, file.etag)
        files.setdefault(file.shard, []).append((file.start, file.stop, stored))
    return files


def state_of_group(
    step: Pass, group: Group, *, source: VectorSource, fitted: dict[str, Fitted]
) -> State:
    """Return the state of the vectors of some files; None where they hold none."""
    state = None
    for file in group:
        read = partial(_state_of_file, step, file, source, fitted)
        part = retried(read, what=file.stored.url)
        state = _both(step, state, part)
    return state


def _state_of_file(
    step: Pass, file: VectorFile, source: VectorSource, fitted: dict[str, Fitted]
) -> State:
    state = None
    for block in blocks(file, source, fitted):
        if len(block.vectors_RD):
            state = _both(step, state, step.partial(block))
    return state


def _both(step: Pass, left: State, right: State) -> State:
    if left is None or right is None:
        return right if left is None else left
    return step.merge(left, right)


def blocks(file: VectorFile, source: VectorSource, fitted: dict[str, Fitted]) -> Iterator[Block]:
    """Yield the vectors of a file that a fit takes, some rows at a time."""
    others = [_read_all(other) for other in file.others]
    with open_unchanged(file.stored) as handle:
        parquet = pq.ParquetFile(handle, page_checksum_verification=True)
        for batch in parquet.iter_batches(_BATCH_ROWS, columns=_COLUMNS, use_threads=False):
            yield _block(pa.Table.from_batches([batch]), others, file, source, fitted)


def _block(
    rows: pa.Table,
    others: Sequence[pa.Table],
    file: VectorFile,
    source: VectorSource,
    fitted: dict[str, Fitted],
) -> Block:
    rows = rows.filter(rows["embedding"].is_valid())
    sample = source.sample
    keys_R = row_keys(file.shard, rows["row"].to_numpy(), seed=sample.seed if sample else 0)
    if sample:
        chosen_R = keys_R <= np.uint64(sample.rows)
        rows, keys_R = rows.filter(pa.array(chosen_R)), keys_R[chosen_R]
    others_RK = None
    if source.others is not None:
        matched, beside = _matched(rows, others)
        rows, keys_R, others_RK = rows.take(matched), keys_R[matched], _matrix(beside)
    vectors_RD = _matrix(rows)
    if source.steps and len(vectors_RD):
        vectors_RD = finished(vectors_RD, source.steps, fitted)
    return Block(vectors_RD, keys_R, others_RK)


def _read_all(file: Stored) -> pa.Table:
    with open_unchanged(file) as handle:
        parquet = pq.ParquetFile(handle, page_checksum_verification=True)
        table = parquet.read(columns=_COLUMNS, use_threads=False)
    return table.filter(table["embedding"].is_valid())


def _matched(rows: pa.Table, others: Sequence[pa.Table]) -> tuple[npt.NDArray[np.int64], pa.Table]:
    """Return the places of the rows that others have too, with the same text, and these others."""
    place = pa.table({"row": rows["row"], "text_hash": rows["text_hash"]})
    place = place.append_column("place", pa.array(np.arange(len(rows))))
    if not others:
        return np.empty(0, np.int64), rows.slice(0, 0)
    beside = pa.concat_tables(others)
    numbered = beside.select(["row", "text_hash"])
    numbered = numbered.append_column("other", pa.array(np.arange(len(beside))))
    joined = place.join(numbered, ["row", "text_hash"], join_type="inner").sort_by("place")
    return joined["place"].to_numpy(), beside.take(joined["other"])


def _matrix(rows: pa.Table) -> Vectors:
    return cast(Vectors, vectors_of(rows["embedding"]))


def _merged(step: Pass, groups: Sequence[Group], state_of: StateOf) -> State:
    """Return the state of all groups, computed on Ray and merged in their order."""
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    state = None
    try:
        with DataContext.current(context):
            dataset = ray.data.read_datasource(
                GroupSource(step, groups, state_of), override_num_blocks=len(groups)
            )
            for batch in dataset.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=1
            ):
                for cell in batch["state"]:
                    state = _both(step, state, pickle.loads(cell.as_buffer()))
    except Exception as error:
        raise raised_in_worker(error, _UNREAD) from error
    return state


class GroupSource(Datasource):
    """The states of groups of files as a Ray datasource: a task and a block for each."""

    def __init__(self, step: Pass, groups: Sequence[Group], state_of: StateOf) -> None:
        """Take the pass, the groups, and what makes a state of both."""
        super().__init__()
        self._step, self._groups, self._state_of = step, groups, state_of

    def get_name(self) -> str:
        """Return the name that Ray's dashboard shows."""
        return "VectorGroups"

    def estimate_inmemory_data_size(self) -> int | None:
        """Return the bytes of the files."""
        return sum(file.stored.size for group in self._groups for file in group)

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: Any = None,
    ) -> list[ReadTask]:
        """Return a Ray task for each group; the parallelism that Ray requests is ignored."""
        return [self._task(group) for group in self._groups]

    def _task(self, group: Group) -> ReadTask:
        step, state_of = self._step, self._state_of

        def states() -> Iterator[pa.Table]:
            state = pickle.dumps(state_of(step, group), protocol=5)
            yield pa.table({"state": pa.array([state], pa.large_binary())})

        metadata = BlockMetadata(
            num_rows=1,
            size_bytes=sum(file.stored.size for file in group),
            exec_stats=None,
            input_files=tuple(file.stored.url for file in group),
        )
        return ReadTask(states, metadata)
