"""The pipeline in one sentence: resolve -> plan -> claim -> fit -> flow -> publish.

The flow is read -> generate (if asked) -> tokenize -> encode -> write, chunk by chunk. What was put
is never done again: a plain re-run resumes. Stages are imported in functions: Ray takes seconds.
"""

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from embedjob.config.job_file import JobSource
from embedjob.input.reading import read_pass
from embedjob.job.options import Console, Options
from embedjob.job.output import check_output, is_published, planned_under_lease
from embedjob.job.planning import JobPlan, plan_job
from embedjob.job.publishing import nothing_to_do, publish_run
from embedjob.job.result import Result
from embedjob.output.lease import acquire, held
from embedjob.storage.create_only import require_create_only

if TYPE_CHECKING:
    from embedjob.stages.encode import PoolSize
    from embedjob.stages.engine import Engine
    from embedjob.stages.reuse.merging import Reuse
    from embedjob.stages.session import EngineOf


def flow(
    plan: JobPlan, engine: "Engine", *, reuse: "Reuse", pool: "PoolSize", claim: Any, ledger: Any
) -> None:
    """Read, tokenize, encode and write every chunk that is left; generate where the job does."""
    from embedjob.stages.encode import encode
    from embedjob.stages.language.generate import before_flow, generate, host_of
    from embedjob.stages.read import read
    from embedjob.stages.tokenize import tokenize
    from embedjob.stages.write import Committer, write

    rows_of = partial(read_pass, job_input=plan.job.config.input)
    tokenized = partial(tokenize, engine=engine, files=claim.files, ledger=ledger)
    rows = partial(read, plan.left, rows_of, ledger=ledger, reuse=reuse, newest=bool(plan.until))
    if pool.generators is None:
        views = rows(tokenized, actors=pool.largest)
    else:
        host = host_of(plan, pool, claim)
        before_flow(plan, rows_of, host, ledger=ledger)
        texts = rows(None, actors=pool.generators.largest)
        views = generate(texts, engine, tokenized, host=host, ledger=ledger)
    vectors = encode(views, engine, pool=pool, claim=claim, ledger=ledger)
    write(vectors, Committer.of(plan, claim.lease), ledger=ledger)


def embed(
    source: JobSource, options: Options, console: Console, *, engine_of: "EngineOf | None" = None
) -> Result:
    """Embed what is left of a job, publish it, and return the run's result.

    `engine_of` gives the engine for a config and a number of torch threads; if None, the recipe's.

    Raises:
        RefusedError: nothing was embedded, because the job does not fit its world.
        InterruptedRunError: a signal came; a plain re-run resumes.
        FaultError: the pipeline itself broke, stalled, or was taken over.
    """
    return embed_plan(plan_job(source, refit=options.refit), options, console, engine_of)


def embed_plan(
    plan: JobPlan, options: Options, console: Console, engine_of: "EngineOf | None" = None
) -> Result:
    """Embed what a plan leaves to do, as `embed`; the vectors that a fit needs go the same way."""
    started, out, newest = time.monotonic(), plan.job.out, check_output(plan, options)
    if newest is not None and not (options.redoes or plan.unfitted) and is_published(plan, newest):
        return nothing_to_do(plan, newest, started=started)
    require_create_only(out)
    from embedjob.stages import session
    from embedjob.stages.fits import fit

    name = f"{plan.job.config.input.source} -> {out}"
    vectors = partial(embed_plan, console=console, engine_of=engine_of)
    with (
        held(acquire(out, job=name, takeover=options.takeover, say=console.say)) as holder,
        fit.fitted(plan, vectors, options=options, console=console, holder=holder) as fitted,
    ):
        plan = planned_under_lease(fitted, options, epoch=holder.epoch, say=console.say)
        end = session.run_stages(
            plan, flow, options=options, console=console, holder=holder, engine_of=engine_of
        )
        return publish_run(
            plan, end, options=options, console=console, holder=holder, started=started
        )
