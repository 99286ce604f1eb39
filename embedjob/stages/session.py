"""A run's session on Ray: connected, checked, sized, and supervised until its stages end."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from embedjob.config.job import Job
from embedjob.errors import EmbedjobError, FaultError, RefusedError, ResourceError
from embedjob.input.chunks import Chunk
from embedjob.input.reading import read_chunk
from embedjob.job.options import Console, Options
from embedjob.job.output import calibration_sample, claim_of, tokenizer_notes
from embedjob.job.planning import JobPlan
from embedjob.job.result import StagesEnd
from embedjob.output.claim import read_claims
from embedjob.output.lease import Holder, Lease
from embedjob.stages.calibrating import FindRanges
from embedjob.stages.claiming import ClaimAndCheck
from embedjob.stages.cluster import (
    Look,
    preflight,
    preflight_here,
    size_pools,
    threads_per_actor,
)
from embedjob.stages.connection import connected
from embedjob.stages.encode import PoolSize
from embedjob.stages.engine import Engine, PlannedFiles, recipe_engine
from embedjob.stages.execution import Watch, cluster_lost, supervise, why_late
from embedjob.stages.ledger import new_ledger, outcomes_of
from embedjob.stages.reuse.merging import Reuse
from embedjob.stages.reuse.take_over import take_over, write_whole

# For the outcomes of a million chunks; after an error they are only counted, and it has to end.
OUTCOMES_SECONDS = 60.0
BRIEF_SECONDS = 4.0
EngineOf = Callable[[Job, int], Engine]


class RunsStages(Protocol):
    """The stages of a run, from READ to WRITE."""

    def __call__(
        self,
        plan: JobPlan,
        engine: Engine,
        *,
        reuse: Reuse,
        pool: PoolSize,
        claim: ClaimAndCheck,
        ledger: Any,
    ) -> None:
        """Read, tokenize, encode and write every chunk that is left."""
        ...


def run_stages(
    plan: JobPlan,
    flow: RunsStages,
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
    engine_of = engine_of or recipe_engine
    until = _seconds(plan)
    if time.time() >= until:
        return StagesEnd(late="it came before the run could begin to embed")
    _announce(plan, console)
    try:
        with connected(options.address) as started_here:
            shard = plan.left[0].shard.stored.url
            look = Look(engine_of(plan.job.config, 1), _files(plan), shard, holder.lease)
            looked = preflight_here(look) if started_here else preflight(look)
            run = _Run(
                plan=plan,
                flow=flow,
                look=look,
                claim=_claim(plan, options, holder.lease),
                ledger=new_ledger(plan.job.config.run.stall_seconds, until),
                console=console,
                engine_of=engine_of,
            )
            return _run_parts(run, looked, holder)
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


@dataclass(frozen=True)
class _Run:
    """What the parts of a run share: its chunks and stages, and what they are given."""

    plan: JobPlan
    flow: RunsStages
    look: Look
    claim: ClaimAndCheck
    ledger: Any
    console: Console
    engine_of: EngineOf

    @property
    def may_take_over(self) -> bool:
        """Whether anything was published before whose vectors the run could take over."""
        return self.plan.served is not None or bool(self.plan.job.config.output.reuse_from)

    def take_over(self) -> Reuse:
        """Find the vectors that are there already, and write the chunks that need no others.

        The first chunks of an output wait for its first encoder, which puts the claim.
        """
        reuse = take_over(self.plan, self.look.engine, ledger=self.ledger, say=self.console.say)
        whole = tuple(chunk for chunk in self.plan.left if chunk.key in reuse.whole)
        claims = read_claims(self.plan.job.out)
        if whole and any(one.fingerprint == self.plan.job.fingerprint for one in claims):
            plan, engine = replace(self.plan, left=whole), self.look.engine
            write_whole(plan, reuse, engine, claim=self.claim, ledger=self.ledger)
        return reuse

    def encode(self, left: tuple[Chunk, ...], pool: PoolSize, reuse: Reuse) -> None:
        """Run all stages over the chunks that are left."""
        threads = threads_per_actor(pool, beside=pool.generators)
        engine, plan = self.engine_of(self.plan.job.config, threads), replace(self.plan, left=left)
        self.flow(plan, engine, reuse=reuse, pool=pool, claim=self.claim, ledger=self.ledger)

    def unended(self) -> tuple[Chunk, ...]:
        """Return the chunks that have no end yet."""
        keys = ray.get(self.ledger.unended.remote(*(chunk.key for chunk in self.plan.left)))
        left = frozenset(keys)
        return tuple(chunk for chunk in self.plan.left if chunk.key in left)


def _files(plan: JobPlan) -> PlannedFiles:
    recipe = plan.job.config.encoder.model_dump_json()
    return PlannedFiles(recipe, tuple(plan.job.digests.items()))


def _claim(plan: JobPlan, options: Options, lease: Lease) -> ClaimAndCheck:
    """Return what each encoder does before its first chunk; it travels to the actors."""
    config, sample = plan.job.config, calibration_sample(plan)
    rows_of = partial(read_chunk, job_input=config.input)
    return ClaimAndCheck(
        lease=lease,
        claim=claim_of(plan),
        dtype=config.encoder.dtype,
        files=_files(plan),
        new_fingerprint=options.new_fingerprint,
        calibrate=None if sample is None else FindRanges(sample, rows_of),
    )


def _taken_over(run: _Run, watch: Watch) -> tuple[str | None, tuple[Chunk, ...], Reuse]:
    """Write what needs no encoder; return why that was not done in time, and what it leaves.

    What it leaves are the chunks that have no end yet, and the vectors that they take over.
    """
    if not run.may_take_over:
        if time.time() >= watch.until:
            return why_late(None), (), Reuse()
        # The ledger, which takes a second to start, is not waited for.
        return None, run.plan.left, Reuse()
    reuse: list[Reuse] = []
    late = supervise(lambda: reuse.append(run.take_over()), run.ledger, watch)
    return (None, run.unended(), reuse[0]) if late is None else (late, (), Reuse())


def _run_parts(run: _Run, looked: frozenset[str], holder: Holder) -> StagesEnd:
    """Run both parts under supervision: what needs no encoder, and then the rest, if any is left.

    No encoder is waited for, and none is loaded, where nothing is left.
    """
    error: EmbedjobError | None = None
    late: str | None = None
    begun = run.may_take_over
    config, until = run.plan.job.config, _seconds(run.plan)
    try:
        with run.console.shown(run.plan) as show:
            watch = Watch(show, holder.lost, config.run.stall_seconds, until)
            # Nothing is shown before a first chunk has ended, or encoders are on their way.
            quiet = replace(watch, show=lambda tally: show(tally) if tally.chunks else None)
            late, left, reuse = _taken_over(run, quiet)
            if left:
                pool = size_pools(_waiting(config, until), chunks=len(left), say=run.console.say)
                # Nodes that were started meanwhile.
                preflight(run.look, but=looked)
                run.ledger.goes_on.remote()
                begun = True
                late = supervise(partial(run.encode, left, pool, reuse), run.ledger, watch)
    except ResourceError as error_of_size:
        if time.time() >= until:
            late = f"the cluster had no room for an encoder in time: {error_of_size}"
        else:
            error = error_of_size
    except EmbedjobError as stopped:
        error = stopped
    except RayError as lost:
        error = cluster_lost(lost)
    return _end(run, error, late) if begun else StagesEnd(error=error, late=late)


def _end(run: _Run, error: EmbedjobError | None, late: str | None) -> StagesEnd:
    """Return how the stages ended: what the ledger knows, and the error that stopped them."""
    try:
        timeout = BRIEF_SECONDS if error else OUTCOMES_SECONDS
        outcomes, notes = outcomes_of(run.ledger, timeout=timeout)
        if isinstance(error, RefusedError) and outcomes.committed:
            # Chunks that need no encoder are written by then, and no longer refused.
            error = FaultError(f"{error}; finished chunks are committed; run again to resume")
        return StagesEnd(outcomes, error, notes, late)
    except RayError as lost:
        return StagesEnd(None, error or cluster_lost(lost))
