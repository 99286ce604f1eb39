"""FIT: make the artefacts of a job's fits: those of finishing steps before its first chunk.

Vectors that are embedded for a fit are a job of their own, whose output is in the job's: in chunks,
committed once, resumed after a crash.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import ray

from embedjob.config.fits.fit_kinds import FITS
from embedjob.config.job import Input, Sample, SampledInput
from embedjob.errors import (
    ChunkError,
    ConfigError,
    FaultError,
    FitError,
    InterruptedRunError,
    RefusedError,
    amount,
)
from embedjob.input.chunks import Chunk
from embedjob.input.reading import passing_rows
from embedjob.input.samples import Rows, SamplePlace, all_rows
from embedjob.job.fit_plan import VectorSource, other_vectors, sample_for, vectors_at_hand
from embedjob.job.options import Console, Options
from embedjob.job.planned_fits import PlannedFit
from embedjob.job.planning import JobPlan, plan_settled
from embedjob.job.result import Result
from embedjob.output.fits.artefacts import ArtefactHead, copy_artefacts, put_artefact, read_fitted
from embedjob.output.fits.records import Record, put_record, vectors_place
from embedjob.output.lease import Holder, acquire, held
from embedjob.output.snapshot import newest_snapshot
from embedjob.stages.connection import connected
from embedjob.stages.fits.continuations import sampled_continuations
from embedjob.stages.fits.reduce import reduced
from embedjob.stages.fits.term_counts import counted_vocabulary
from embedjob.stages.fits.word_counts import counted_words
from embedjob.storage.create_only import require_create_only
from embedjob.storage.retrying import retried
from embedjob.vectors.fits.fit_arithmetic import first_pass
from embedjob.vectors.fits.fitted import Fitted

# So many chunks are filtered ahead of the one that is counted.
_READ_AHEAD = 8
# The pipeline itself, for the vectors that a fit needs: a plan, and how it is run.
EmbedPlan = Callable[[JobPlan, Options], Result]


@dataclass(frozen=True)
class Maker:
    """How artefacts are made: what embeds vectors, how it is started, and where it speaks."""

    embed: EmbedPlan
    options: Options
    console: Console
    holder: Holder


@contextmanager
def fitted(
    plan: JobPlan, embed: EmbedPlan, *, options: Options, console: Console, holder: Holder
) -> Iterator[JobPlan]:
    """Yield the plan with the artefacts of its finishing steps, made here where they are lacking.

    The fits that serve no step are made after the block, of the vectors that it has published.
    What is made joins Ray, which stays joined in the block. Each fit is recorded as soon as its
    artefact is put: what is killed goes on with the next.

    Args:
        plan: the job's; one without fits is yielded as it is.
        embed: embeds the vectors of a fit.
        options: where Ray is, and whether artefacts are made again that are there.
        console: where to speak.
        holder: the lease on the output.

    Raises:
        FitError: the vectors do not give what a fit asks of them.
        FaultError: vectors could not be embedded or read; a plain re-run resumes.
        InterruptedRunError: the deadline came before the vectors of a fit were embedded.
    """
    if plan.unfitted:
        # Another run may have made them while this one waited for the lease.
        plan = replanned(plan)
    if not plan.unfitted and not (options.refit and plan.fits):
        yield plan
        return
    maker = Maker(embed, options, console, holder)
    with connected(options.address):
        plan = _all_made(plan, maker, lambda fit: fit.is_first)
        yield plan
        snapshot = newest_snapshot(plan.job.out)
        if snapshot is None or snapshot.fingerprint != plan.job.fingerprint or snapshot.left:
            return  # which the run says by its faults, or by what it left
        try:
            _all_made(plan, maker, lambda fit: not fit.is_first)
        except RefusedError as error:
            raise FaultError(f"{error}; the vectors are published") from error


def make_artefacts(
    plan: JobPlan, embed: EmbedPlan, *, options: Options, console: Console
) -> JobPlan:
    """Make the artefacts of a job's fits and nothing else; return the plan that has them.

    Arguments and errors are those of `fitted`; the lease on the output is acquired here.
    """
    if not plan.fits:
        raise ConfigError("fit: the job has none; give it a fit: section, or a method that has one")
    if not plan.unfitted and not options.refit:
        return plan
    out = plan.job.out
    require_create_only(out)
    lease = acquire(out, job=f"fit -> {out}", takeover=options.takeover, say=console.say)
    with held(lease) as holder, connected(options.address):
        plan = replanned(plan)
        return _all_made(plan, Maker(embed, options, console, holder), lambda fit: True)


def _all_made(plan: JobPlan, maker: Maker, wanted: Callable[[PlannedFit], bool]) -> JobPlan:
    """Make the artefacts of the wanted fits that lack one, and those of the others before them."""
    made: set[str] = set()
    refit = maker.options.refit
    while True:
        ready = (fit for fit in plan.fits if wanted(fit) and fit.base and fit.key not in made)
        fit = next((fit for fit in ready if fit.made is None or refit), None)
        if fit is None:
            return plan
        head = _make(plan, fit, maker)
        what = "text" if FITS[fit.section.kind].of_texts else "vector"
        maker.console.say(f"fit {fit.name}: {head.name} from {amount(head.rows, what)}")
        made.add(fit.key)
        plan = replanned(plan)


def _make(plan: JobPlan, fit: PlannedFit, maker: Maker) -> ArtefactHead:
    job = plan.job
    if FITS[fit.section.kind].of_texts:
        return _of_texts(plan, fit, maker)
    source = vectors_at_hand(fit, job) or _embedded(plan, fit, maker)
    source = replace(source, others=other_vectors(fit, job))
    earlier = read_fitted(job.out, [fit.base] if fit.base and source.steps else [])
    try:
        # Of a model that is spread over several, no fit needs more than one.
        gpus = min(1.0, job.config.pool.gpus_per_actor)
        result = reduced(first_pass(fit.section), source, earlier, gpus=gpus)
    except FitError as error:
        raise FitError(f"fit: {fit.name}: {error}") from error
    vectors = fit.vectors if source.embedded else None
    return _put(job.out, fit, result, holder=maker.holder, vectors=vectors)


def _put(
    out: str, fit: PlannedFit, result: Fitted, *, holder: Holder, vectors: str | None = None
) -> ArtefactHead:
    """Put the artefact of a fit, and its record; `vectors` is where they were embedded for it."""
    parameters = fit.section.model_dump(mode="json", exclude={"name", "kind"})
    holder.require()
    head = put_artefact(out, result, encoder=fit.fingerprint, parameters=parameters)
    put_record(out, Record(fit.key, fit.number + 1, head.kind, head.sha256, fit.name, vectors))
    return head


def _of_texts(plan: JobPlan, fit: PlannedFit, maker: Maker) -> ArtefactHead:
    """Make the artefact of a fit that is computed from texts."""
    if plan.faults and not maker.options.publish_partial:
        raise FaultError(f"fit: {fit.name}: {plan.faults[0][0]}: {plan.faults[0][1]}")
    try:
        if fit.section.kind == "vocabulary":
            result = counted_vocabulary(plan.corpus, plan.job.config.input, fit.section)
        elif fit.section.kind == "word_counts":
            result = counted_words(plan.corpus, plan.job.config, rows=fit.width)
        else:
            result = sampled_continuations(plan.corpus, plan.job, fit.section, maker.console)
    except FitError as error:
        raise FitError(f"fit: {fit.name}: {error}") from error
    return _put(plan.job.out, fit, result, holder=maker.holder)


def _embedded(plan: JobPlan, fit: PlannedFit, maker: Maker) -> VectorSource:
    """Embed the vectors of a fit, or what is left of them."""
    nested = planned_vectors(plan, fit)
    rows = min(nested.rows, fit.section.sample or nested.rows)
    maker.console.say(f"fit {fit.name}: embedding {rows:,} rows in {nested.job.out}")
    copy_artefacts(plan.job.out, nested.job.out, nested.job.recipes.values())
    # Whoever holds the output's own lease is alone here, too.
    partial = maker.options.publish_partial
    within = Options(
        address=maker.options.address, takeover=True, publish_partial=partial, allow_shrink=True
    )
    result = maker.embed(nested, within)
    if result.left:
        raise InterruptedRunError(f"fit: {fit.name}: its vectors are not whole:\n{result.verdict}")
    snapshot = newest_snapshot(nested.job.out)
    if snapshot is None or (result.faults and not partial):
        raise FaultError(f"fit: {fit.name}: its vectors are not whole:\n{result.verdict}")
    return VectorSource(nested.job.out, snapshot, embedded=True)


def planned_vectors(plan: JobPlan, fit: PlannedFit) -> JobPlan:
    """Plan the vectors of a fit: the base recipe over the rows that the fit takes of the input.

    They are the rows of the whole corpus also in a trial.
    """
    job, base = plan.job, fit.base
    assert base is not None
    counted = all_rows if job.config.input.filter is None else partial(_passing, plan)
    config = job.config.model_copy(
        update={
            "input": _input_of(job.config.input, sample_for(fit, plan.places, counted)),
            "encoder": base,
            "fit": (),
            "output": job.config.output.model_copy(
                update={"path": vectors_place(job.out, fit.vectors), "reuse_from": ()}
            ),
            # A bad row has no vector; how many a corpus may have, its own run decides.
            "run": job.config.run.model_copy(update={"limit": None, "max_quarantined": 1.0}),
        }
    )
    ends = {"finish": base.finish, "vector_dtype": base.vector_dtype}
    recipes = {role: recipe.model_copy(update=ends) for role, recipe in job.recipes.items()}
    vectors = replace(
        job, config=config, recipes=recipes, width=fit.width, fingerprint=fit.fingerprint
    )
    nested = plan_settled(vectors, plan.listing)
    # A run before may have generated for all rows, and another fit for some of them.
    others = (one for one in plan.generated_in if one != nested.job.out)
    return replace(nested, generated_in=(job.out, *others))


def _passing(plan: JobPlan, places: Sequence[SamplePlace]) -> Iterator[Rows]:
    """Yield the numbers of the rows of each place that pass the filter, read by Ray tasks."""
    chunks = {SamplePlace(one.shard.url, one.start, one.stop): one for one in plan.corpus}
    read = ray.remote(_rows_that_pass).options(num_cpus=1)
    ahead: deque[Any] = deque()
    for place in places:
        ahead.append(read.remote(chunks[place], plan.job.config.input))
        if len(ahead) == _READ_AHEAD:
            yield ray.get(ahead.popleft())
    while ahead:
        yield ray.get(ahead.popleft())


def _rows_that_pass(chunk: Chunk, job_input: Input) -> Rows:
    try:
        return retried(partial(passing_rows, chunk, job_input), what=chunk.shard.url)
    except ChunkError:  # which the run over the sample names
        return np.empty(0, np.uint32)


def replanned(plan: JobPlan) -> JobPlan:
    """Plan again with the artefacts that the job's fits have made by now."""
    assert plan.named is not None
    return plan_settled(plan.named, plan.listing, refit=plan.refit)


def _input_of(whole: Input, sample: Sample | None) -> Input:
    """Return the input without what only its own output carries, and with the rows of a sample."""
    bare = {**dict(whole), "id": None, "keep": (), "on_bad_row": "quarantine"}
    if sample is None:
        return whole.model_copy(update=bare)
    return SampledInput.model_construct(**bare, sample=sample)
