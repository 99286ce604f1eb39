"""The pipeline in one sentence: resolve -> plan -> claim -> flow -> publish.

The flow is read -> generate (if asked) -> tokenize -> encode -> write, chunk by chunk. What was put
is never done again: a plain re-run resumes. The stages are imported inside the functions: Ray takes
seconds to import, and a job that is refused or done by its plan needs none.
"""

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from embedjob.config.job_file import JobSource
from embedjob.input.reading import read_pass
from embedjob.job.options import Console, Options
from embedjob.job.output import check_output, chunks_to_redo, is_published, output_spec
from embedjob.job.planning import JobPlan, plan_job, relisted
from embedjob.job.publishing import nothing_to_do, publish_run
from embedjob.job.result import Result
from embedjob.output.lease import claim, held
from embedjob.storage.create_only import require_create_only

if TYPE_CHECKING:
    from embedjob.stages.claiming import ClaimAndCheck
    from embedjob.stages.encode import PoolSize
    from embedjob.stages.engine import Engine
    from embedjob.stages.session import EngineOf


def flow(
    plan: JobPlan, engine: "Engine", *, pool: "PoolSize", claim: "ClaimAndCheck", ledger: Any
) -> None:
    """Read, tokenize, encode and write every chunk that is left; generate where the job does."""
    from embedjob.stages.encode import encode
    from embedjob.stages.language.generate import before_flow, generate, host_of
    from embedjob.stages.read import read
    from embedjob.stages.tokenize import tokenize
    from embedjob.stages.write import Committer, write

    rows_of = partial(read_pass, job_input=plan.job.config.input)
    tokenized = partial(tokenize, engine=engine, files=claim.files, ledger=ledger)
    if pool.generators is None:
        views = read(plan.left, rows_of, tokenized, actors=pool.largest, ledger=ledger)
    else:
        host = host_of(plan, pool, claim)
        before_flow(plan, rows_of, host, ledger=ledger)
        rows = read(plan.left, rows_of, None, actors=pool.generators.largest, ledger=ledger)
        views = generate(rows, engine, tokenized, host=host, ledger=ledger)
    embeddings = encode(views, engine, pool=pool, claim=claim, ledger=ledger)
    committer = Committer(claim.lease, output_spec(plan), plan.job.config.encoder.vector_dtype)
    write(embeddings, committer, ledger=ledger)


def embed(
    source: JobSource, options: Options, console: Console, *, engine_of: "EngineOf | None" = None
) -> Result:
    """Embed what is left of a job, publish it, and return the run's result.

    Args:
        source: the job file and its overrides.
        options: how to start.
        console: where to speak.
        engine_of: gives the engine for a config and a number of torch threads; the recipe's own
            if None.

    Raises:
        RefusedError: nothing was embedded, because the job does not fit its world.
        InterruptedRunError: a signal came; a plain re-run resumes.
        FaultError: the pipeline itself broke, stalled, or was taken over.
    """
    started = time.monotonic()
    plan = plan_job(source)
    out = plan.job.out
    newest = check_output(plan, options)
    if newest is not None and not options.redoes and is_published(plan, newest):
        return nothing_to_do(plan, newest, started=started)
    require_create_only(out)
    from embedjob.stages.session import run_stages

    name = f"{plan.job.config.input.path} -> {out}"
    with held(claim(out, job=name, takeover=options.takeover, say=console.say)) as holder:
        redo = chunks_to_redo(plan, options, console.say)
        # Another run, or a prune, may have ended while this one waited for the lease.
        plan = relisted(plan, epoch=holder.epoch, redo=redo)
        check_output(plan, options)
        end = run_stages(
            plan, flow, options=options, console=console, holder=holder, engine_of=engine_of
        )
        return publish_run(
            plan, end, options=options, console=console, holder=holder, started=started
        )
