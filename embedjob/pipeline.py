"""The job in one sentence: read, tokenize, encode, write.

It claims the output before and publishes a snapshot after; between them, finished chunks are put
one by one, and what was put is never done again.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from embedjob.config.job_file import JobSource
from embedjob.errors import AccessError, FaultError, RefusedError
from embedjob.input.reading import read_chunk
from embedjob.job.output import (
    calibrate_of,
    calibration_notes,
    claim_of,
    form,
    is_published,
    require_own,
)
from embedjob.job.planning import largest_first
from embedjob.job.publishing import conclude, nothing_to_do
from embedjob.job.result import Result
from embedjob.job.survey import Survey, relisted, survey
from embedjob.output import snapshot
from embedjob.output.cleanup import damaged, delete_chunks, quarantined
from embedjob.output.lease import Lease, claim, held, superseded
from embedjob.stages.claiming import Prove
from embedjob.stages.cluster import connected, preflight, size_pool, threads_per_actor
from embedjob.stages.encode import PoolSize, encode
from embedjob.stages.engine import Engine, RecipeEngine
from embedjob.stages.execution import Watch, supervise
from embedjob.stages.ledger import Outcome, Tally, new_ledger, outcomes_of
from embedjob.stages.read import read
from embedjob.stages.tokenize import tokenize
from embedjob.stages.write import Committer, write

Say = Callable[[str], None]
Shown = Callable[[Survey], AbstractContextManager[Callable[[Tally], None]]]


@dataclass(frozen=True)
class Options:
    """How this run is to be started, beside what the job says."""

    address: str | None = None
    takeover: bool = False
    new_fingerprint: bool = False
    publish_partial: bool = False
    repair: bool = False
    retry_quarantined: bool = False


@dataclass(frozen=True)
class Console:
    """How a run speaks: a line now and then, and the progress while it embeds."""

    say: Say
    shown: Shown


def flow(found: Survey, engine: Engine, *, pool: PoolSize, prove: Prove, ledger: Any) -> None:
    """Every chunk that is left, the largest first: read, tokenized, encoded, written."""
    job = found.resolved.job
    left = largest_first(found.plan.left)
    rows = read(left, partial(read_chunk, job_input=job.input), ledger=ledger)
    views = tokenize(rows, engine)
    embeddings = encode(views, engine, pool=pool, prove=prove, ledger=ledger)
    committer = Committer(found.out, form(found), job.encoder.vector_dtype)
    write(embeddings, committer, ledger=ledger)


def embed(
    draft: JobSource,
    options: Options,
    console: Console,
    *,
    engine_of: Callable[[Survey, int], Engine] | None = None,
) -> Result:
    """The end of a run that did whatever was left of the job.

    Args:
        draft: the job file and its overrides.
        options: how to start.
        console: where to speak.
        engine_of: gives the engine for a survey and a number of threads; the recipe's own if None.

    Raises:
        RefusedError: nothing was embedded, because the job does not fit its world.
        InterruptedRunError: a signal came; a plain re-run resumes.
        FaultError: the pipeline itself broke, stalled, or was taken over.
    """
    started = time.monotonic()
    found = survey(draft)
    newest = snapshot.newest(found.out)
    require_own(found, newest, new_fingerprint=options.new_fingerprint)
    mends = options.repair or options.retry_quarantined
    if not mends and newest is not None and is_published(found, newest):
        return nothing_to_do(found, newest, seconds=time.monotonic() - started)
    name = f"{found.resolved.job.input.path} -> {found.out}"
    with held(claim(found.out, job=name, takeover=options.takeover)) as lease:
        again = _to_be_made_again(found, options, console.say)
        # Another run, or a prune, may have ended while this one waited for the lease.
        found = relisted(found, without=again)
        require_own(found, snapshot.newest(found.out), new_fingerprint=options.new_fingerprint)
        clear = partial(delete_chunks, found.out, found.fingerprint, again)
        outcomes = _run(found, options, console, lease, engine_of or recipe_engine, clear)
        with _faults_alone():
            return conclude(
                found,
                outcomes,
                lease=lease,
                publish_partial=options.publish_partial,
                seconds=time.monotonic() - started,
            )


def recipe_engine(found: Survey, threads: int) -> Engine:
    """The engine of the job's own recipe."""
    job = found.resolved.job
    budget, gpus = job.pool.tokens_per_microbatch, max(1, int(job.pool.gpus_per_actor))
    return RecipeEngine(job.encoder.model_dump_json(), budget, threads, gpus)


def _run(
    found: Survey,
    options: Options,
    console: Console,
    lease: Lease,
    engine_of: Callable[[Survey, int], Engine],
    clear: Callable[[], None],
) -> list[Outcome]:
    """How each chunk that was left ended; no Ray is started where none was.

    `clear` deletes what is to be made again, once the means to make it are there.
    """
    if not found.plan.left:
        clear()
        return []
    job = found.resolved.job
    with connected(options.address):
        preflight(engine_of(found, 1), shard=found.plan.left[0].shard.url, out=found.out)
        pool = size_pool(
            job.pool,
            chunks=len(found.plan.left),
            wait=job.run.resource_wait_seconds,
            say=console.say,
        )
        engine = engine_of(found, threads_per_actor(pool))
        prove = Prove(
            found.out,
            claim_of(found),
            job.encoder.dtype,
            options.new_fingerprint,
            calibrate=calibrate_of(found),
        )
        clear()
        ledger = new_ledger()
        work = partial(flow, found, engine, pool=pool, prove=prove, ledger=ledger)
        with console.shown(found) as show:
            watch = Watch(show, lambda: _taken(lease), job.run.stall_seconds)
            supervise(work, ledger, watch)
        outcomes = outcomes_of(ledger)
    with _faults_alone():
        for note in calibration_notes(found):
            console.say(note)
    return outcomes


@contextmanager
def _faults_alone() -> Iterator[None]:
    """Turns refusals into faults: after chunks were committed nothing is refused any more."""
    try:
        yield
    except RefusedError as error:
        raise FaultError(f"{error}; finished chunks are committed, run again") from error


def _to_be_made_again(found: Survey, options: Options, say: Say) -> frozenset[str]:
    """Names of the committed chunks that the options send back."""
    sent_back: frozenset[str] = frozenset()
    for option, asked, find in (
        ("repair", options.repair, damaged),
        ("retry-quarantined", options.retry_quarantined, quarantined),
    ):
        if asked:
            names = find(found.out, found.fingerprint)
            say(f"{option}: {len(names)} chunks are to be made again")
            sent_back |= names
    return sent_back


def _taken(lease: Lease) -> str | None:
    try:
        lost = superseded(lease)
    except (OSError, AccessError):
        return None  # The next look may succeed; create-only puts keep the output right meanwhile.
    return f"another run took {lease.out} over; nothing is published by this one" if lost else None
