"""Parquet shards in, embedding shards out, exactly once.

`run` embeds a job and `plan` says what a run would do; `Encoder` embeds texts by a method, or by
the recipe of an output; `open_snapshot` reads what a run published.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedjob.models.quiet import hush_imports

if TYPE_CHECKING:
    from embedjob.config.job_file import JobSource
    from embedjob.encoder.encoder import Encoder
    from embedjob.job.planning import JobPlan
    from embedjob.job.result import Result
    from embedjob.output.snapshot import open_snapshot

__all__ = ["Encoder", "open_snapshot", "plan", "run"]

# Here, because it must come before any module imports transformers.
hush_imports()


def run(
    job: "str | Path | Mapping[str, Any] | JobSource",
    *,
    sets: Sequence[str] = (),
    progress: bool = False,
    **options: Any,
) -> "Result":
    """Embed what is left of a job, publish it, and return the run's result.

    Call it from the main thread, which alone can take signals. A Ray that the process has joined
    serves the run and stays joined; otherwise Ray is joined or started, and left at the end.

    Args:
        job: the path of a job file, or its sections as a mapping.
        sets: overrides of its keys, as `--set` takes them: `encoder.max_tokens=256`.
        progress: whether to show on stderr what the command line shows.
        options: `address`, `takeover`, `new_fingerprint`, `publish_partial`, `repair` and
            `retry_quarantined`, as on the command line.

    Raises:
        RefusedError: nothing was embedded, because the job does not fit its world.
        InterruptedRunError: a signal came; a plain re-run resumes.
        FaultError: the run itself broke, stalled, or another run holds the output. Chunks that
            failed are no error: they are in the result's `faults`.
    """
    from embedjob.job.options import Console, Options
    from embedjob.job.resolve import as_source
    from embedjob.pipeline import embed
    from embedjob.reports.progress import hidden, shown

    console = Console(logging.getLogger(__name__).info, shown if progress else hidden)
    return embed(as_source(job, sets), Options(**options), console)


def plan(
    job: "str | Path | Mapping[str, Any] | JobSource", *, sets: Sequence[str] = ()
) -> "JobPlan":
    """Plan a job: its chunks, those left to be done, and its fingerprint; writes nothing.

    Args:
        job: the path of a job file, or its sections as a mapping.
        sets: overrides of its keys, as `--set` takes them.

    Raises:
        RefusedError: the job does not fit its world, as far as can be known without a write.
    """
    from embedjob.job.planning import plan_job
    from embedjob.job.resolve import as_source

    return plan_job(as_source(job, sets))


def __getattr__(name: str) -> Any:
    # Loaded when asked for: `import embedjob` must not cost the seconds that torch takes.
    if name == "Encoder":
        from embedjob.encoder.encoder import Encoder

        return Encoder
    if name == "open_snapshot":
        from embedjob.output.snapshot import open_snapshot

        return open_snapshot
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
