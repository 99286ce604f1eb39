"""A run's session on Ray: connected, checked, sized, and supervised until its stages end."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from ray.exceptions import RayError

from embedjob.config.job import Job
from embedjob.errors import EmbedjobError, ResourceError
from embedjob.input.reading import read_chunk
from embedjob.job.options import Console, Options
from embedjob.job.output import calibration_sample, claim_of, tokenizer_notes
from embedjob.job.planning import JobPlan
from embedjob.job.result import StagesEnd
from embedjob.output.lease import Holder, Lease
from embedjob.stages.calibrating import Calibrate
from embedjob.stages.claiming import ClaimAndCheck
from embedjob.stages.cluster import Look, preflight, size_pools, threads_per_actor
from embedjob.stages.connection import connected
from embedjob.stages.encode import PoolSize
from embedjob.stages.engine import Engine, PlannedFiles, recipe_engine
from embedjob.stages.execution import Watch, cluster_lost, supervise
from embedjob.stages.ledger import new_ledger, outcomes_of

# For the outcomes of a million chunks; after an error they are only counted, and it has to end.
ANSWER_SECONDS = 60.0
BRIEF_SECONDS = 4.0
EngineOf = Callable[[Job, int], Engine]


class Flow(Protocol):
    """The stages of a run, from READ to WRITE."""

    def __call__(
        self, plan: JobPlan, engine: Engine, *, pool: PoolSize, claim: ClaimAndCheck, ledger: Any
    ) -> None:
        """Read, tokenize, encode and write every chunk that is left."""
        ...


def run_stages(
    plan: JobPlan,
    flow: Flow,
    *,
    options: Options,
    console: Console,
    holder: Holder,
    engine_of: EngineOf | None = None,
) -> StagesEnd:
    """Run the stages over every chunk that is left; no Ray is started where none is.

    Args:
        plan: the chunks.
        flow: the stages.
        options: where Ray is, and whether a further recipe may be claimed.
        console: where to speak.
        holder: ends the run once the output is no longer its own.
        engine_of: gives the engine for a config and a number of torch threads; the recipe's own
            if None.

    Returns:
        The outcome of each chunk, and the error that stopped the stages early, if one did.
    """
    if not plan.left:
        return StagesEnd()
    config, engine_of = plan.job.config, engine_of or recipe_engine
    until = _seconds(plan)
    if time.time() >= until:
        return StagesEnd(late="it came before the run could begin to embed")
    _announce(plan, console)
    try:
        with connected(options.address):
            shard = plan.left[0].shard.stored.url
            look = Look(engine_of(config, 1), _files(plan), shard, holder.lease)
            looked = preflight(look)
            pool = size_pools(_waiting(config, until), chunks=len(plan.left), say=console.say)
            # Nodes that were started meanwhile.
            preflight(look, but=looked)
            engine = engine_of(config, threads_per_actor(pool, beside=pool.generators))
            claim = _claim(plan, options, holder.lease)
            ledger = new_ledger(config.run.stall_seconds, until)
            work = partial(flow, plan, engine, pool=pool, claim=claim, ledger=ledger)
            return _supervised(plan, work, ledger, console, holder)
    except ResourceError as error:
        if time.time() >= until:
            return StagesEnd(late=f"the cluster had no room for an encoder in time: {error}")
        return StagesEnd(error=error)
    except EmbedjobError as error:
        return StagesEnd(error=error)


def _announce(plan: JobPlan, console: Console) -> None:
    for note in tokenizer_notes(plan.job):
        console.say(note)
    if plan.generation is not None:
        made = plan.generation
        console.say(f"to generate: at most {made.texts:,} texts of {made.tokens:,} tokens together")
    if plan.until is not None:
        console.say(
            "run.until: the newest shards come first, and nothing is begun that would not be done"
            f" by {plan.until.isoformat(' ', 'seconds')}"
        )


def _seconds(plan: JobPlan) -> float:
    """Return the run's deadline in seconds since 1970; infinity where it has none."""
    return math.inf if plan.until is None else plan.until.timestamp()


def _waiting(config: Job, until: float) -> Job:
    """Return the job, which waits for machines no longer than to its deadline."""
    wait = min(config.run.resource_wait_seconds, max(0.0, until - time.time()))
    run = config.run.model_copy(update={"wait_for_resources": f"{wait:f}s"})
    return config.model_copy(update={"run": run})


def _files(plan: JobPlan) -> PlannedFiles:
    recipe = plan.job.config.encoder.model_dump_json()
    return PlannedFiles(recipe, tuple(plan.job.digests.items()))


def _claim(plan: JobPlan, options: Options, lease: Lease) -> ClaimAndCheck:
    """What each encoder does before its first chunk, as a value that travels to the actors."""
    config, sample = plan.job.config, calibration_sample(plan)
    rows_of = partial(read_chunk, job_input=config.input)
    return ClaimAndCheck(
        lease=lease,
        claim=claim_of(plan),
        dtype=config.encoder.dtype,
        files=_files(plan),
        new_fingerprint=options.new_fingerprint,
        calibrate=None if sample is None else Calibrate(sample, rows_of),
    )


def _supervised(
    plan: JobPlan, work: Callable[[], None], ledger: Any, console: Console, holder: Holder
) -> StagesEnd:
    error: EmbedjobError | None = None
    late: str | None = None
    try:
        with console.shown(plan) as show:
            stall_seconds = plan.job.config.run.stall_seconds
            watch = Watch(show, holder.lost, stall_seconds, _seconds(plan))
            late = supervise(work, ledger, watch)
    except EmbedjobError as stopped:
        error = stopped
    try:
        timeout = BRIEF_SECONDS if error else ANSWER_SECONDS
        outcomes, notes = outcomes_of(ledger, timeout=timeout)
        return StagesEnd(outcomes, error, notes, late)
    except RayError as lost:
        return StagesEnd(None, error or cluster_lost(lost))
