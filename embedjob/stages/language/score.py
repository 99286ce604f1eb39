"""SCORE: a Ray job over pairs of texts; each chunk's distances are a file that is put once.

What was put is not scored again: the name of a file says which rows of which shard it holds, by
which model and settings. No lease is needed, as nothing is published or deleted.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError

from embedjob.config.generation import TrajectorySettings
from embedjob.config.heads import Decode
from embedjob.config.job import Input, Pool
from embedjob.config.recipe import Recipe
from embedjob.errors import FaultError, InputError
from embedjob.input.chunks import Chunk
from embedjob.input.columns import KEPT
from embedjob.input.joining import validate_text
from embedjob.input.reading import read_chunk
from embedjob.job.input_listing import list_input
from embedjob.job.planning import cut_input
from embedjob.models.components import components_of
from embedjob.models.digests import model_digests
from embedjob.output.fingerprint import fingerprint_of
from embedjob.stages.attempts import begin_attempt, limited
from embedjob.stages.chunk_state import Failure, describe
from embedjob.stages.cluster import size_pool, threads_per_actor
from embedjob.stages.connection import connected
from embedjob.stages.engine import PlannedFiles
from embedjob.stages.ledger import new_ledger
from embedjob.storage.create_only import require_create_only
from embedjob.storage.objects import absolute, create, join, list_files

DISTANCES_SCHEMA = pa.schema([("row", pa.uint32()), ("distance", pa.float64())])
_WAIT_SECONDS = 1800.0


@dataclass(frozen=True)
class Pairs:
    """The pairs: Parquet files, and the columns of their two texts."""

    path: str
    left: str
    right: str
    chunk_rows: int = 1024

    @property
    def read_as(self) -> Input:
        """The pairs as an input: the left text as the text, the right beside it."""
        return Input(path=self.path, text=self.left, keep=(self.right,))


@dataclass(frozen=True)
class Scored:
    """How a scoring ended: `directory` holds the files, `faults` say which chunks have none."""

    directory: str
    pairs: int
    chunks: int
    chunks_done_before: int
    faults: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class ScoreWork:
    """What an actor needs: the model's files, how it compares, where distances go."""

    model: str
    planned: PlannedFiles
    settings: TrajectorySettings
    pairs: Pairs
    directory: str


def score(
    pairs: Pairs,
    out: str,
    model: str,
    *,
    settings: TrajectorySettings,
    gpus: float = 0,
    address: str | None = None,
) -> Scored:
    """Score what is left of the pairs with the exact trajectory distance, on a Ray cluster.

    Args:
        pairs: where the pairs are.
        out: where the files go, below `scores/`.
        model: a language model, as in `encoder.model`.
        settings: how continuations are sampled.
        gpus: the GPUs of each actor.
        address: a Ray cluster; a local Ray if None.

    Raises:
        RefusedError: there are no pairs, no such model, or files cannot be created.
    """
    plan = _plan(pairs, out, model, settings)
    if plan.left:
        require_create_only(absolute(out))
        with connected(address):
            faults = (*plan.faults, *_run(plan, gpus))
    else:
        faults = plan.faults
    return Scored(
        plan.work.directory,
        sum(chunk.rows for chunk in plan.chunks),
        len(plan.chunks),
        len(plan.chunks) - len(plan.left),
        faults,
    )


@dataclass(frozen=True)
class _Plan:
    work: ScoreWork
    chunks: tuple[Chunk, ...]
    left: tuple[Chunk, ...]
    faults: tuple[str, ...]


def _plan(pairs: Pairs, out: str, model: str, settings: TrajectorySettings) -> _Plan:
    """Return the chunks of the pairs and those that are left; writes nothing."""
    listing = list_input(pairs.read_as)
    recipe = Recipe(model=model, span="last_token", decode=Decode())
    parts = components_of(recipe).pinned()
    recipe, digests = recipe.model_copy(update=parts.keys()), model_digests(parts)
    mark = fingerprint_of({"trajectories": settings.model_dump(), "digests": digests})
    cut = cut_input(pairs.read_as, listing, chunk_rows=pairs.chunk_rows, fingerprint=mark)
    if not cut.chunks and not cut.faults:
        raise InputError(f"{pairs.path}: every shard is empty; there is nothing to score")
    kind = cut.types.get(pairs.right)
    if kind is not None and not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(f"{pairs.path}: {pairs.right} holds {kind}, allowed is a column of texts")
    directory = join(absolute(out), "scores", mark[:12])
    planned = PlannedFiles(recipe.model_dump_json(), tuple(digests.items()))
    work = ScoreWork(recipe.model, planned, settings, pairs, directory)
    done = {file.name for file in list_files(directory)}
    left = tuple(chunk for chunk in cut.chunks if chunk.name not in done)
    faults = tuple(f"{url}: {reason}" for url, reason in cut.faults)
    return _Plan(work, cut.chunks, left, faults)


def _run(plan: _Plan, gpus: float) -> Iterator[str]:
    """Score the chunks that are left; yield a fault for each that has no file after it."""
    pool = size_pool(
        Pool(gpus_per_actor=gpus),
        chunks=len(plan.left),
        wait=_WAIT_SECONDS,
        say=lambda line: None,
    )
    rows = [{"chunk": number} for number in range(len(plan.left))]
    states = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        ScoreActor,
        fn_constructor_args=(plan.work, plan.left, threads_per_actor(pool), new_ledger()),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=pool.smallest, max_size=pool.largest),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
    )
    try:
        yield from (row["fault"] for row in states.iter_rows() if row["fault"])
    except RayError as error:
        raise FaultError(
            f"the scoring failed: {describe(error)}; files that were put stay, and another run"
            " goes on from them"
        ) from error


class ScoreActor:
    """Hosts one model for the length of a run."""

    def __init__(self, work: ScoreWork, chunks: Sequence[Chunk], threads: int, ledger: Any) -> None:
        """Load the model; ModelError if its files are not those of the plan."""
        # Here alone: the driver needs no torch.
        from embedjob.encoder.trajectories import Trajectories

        self._work, self._chunks, self._ledger = work, chunks, ledger
        self._trajectories = Trajectories.load(work.model, work.settings, threads=threads)
        work.planned.check()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Score the chunks of these numbers and put their files; return what failed."""
        chunks = [self._chunks[number] for number in block["chunk"].to_pylist()]
        faults = [self._scored(chunk) for chunk in chunks]
        return block.append_column("fault", pa.array(faults, pa.string()))

    def _scored(self, chunk: Chunk) -> str | None:
        place = f"{chunk.shard.url}, rows {chunk.start} to {chunk.stop}"
        # Ray starts a process that died again for ever: the ledger counts how often a chunk was it.
        attempt = begin_attempt("encode", chunk.key, self._ledger, size=chunk.text_bytes)
        if isinstance(attempt, Failure):
            return f"{place}: {attempt.detail}"
        try:
            with limited(attempt.seconds) as moved:
                distances = partial(self._trajectories.distances, moved=moved)
                table = score_chunk(chunk, self._work.pairs, distances)
            put_scores(join(self._work.directory, chunk.name), table)
        except Exception as error:  # a fault of one chunk; the others go on
            return f"{place}: {describe(error)}"
        return None


def score_chunk(
    chunk: Chunk,
    pairs: Pairs,
    distances: Callable[[Sequence[str], Sequence[str]], Any],
) -> pa.Table:
    """Return the distance of each pair of a chunk; null where one of its texts is null or bad."""
    rows = read_chunk(chunk, pairs.read_as)
    right, _ = validate_text(rows[f"{KEPT}{pairs.right}"])
    left = rows["text"].to_pylist()
    both = list(zip(left, right.to_pylist(), strict=True))
    good = [number for number, pair in enumerate(both) if None not in pair]
    found: list[float | None] = [None] * len(both)
    scored = distances([both[n][0] for n in good], [both[n][1] for n in good])
    for number, distance in zip(good, np.asarray(scored).tolist(), strict=True):
        found[number] = distance
    return pa.table(
        [rows["row"].cast(pa.uint32()), pa.array(found, pa.float64())], schema=DISTANCES_SCHEMA
    )


def put_scores(url: str, table: pa.Table) -> None:
    """Put the distances of a chunk; a file that is there already stands."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    create(url, memoryview(sink.getvalue()))
