"""Parquet shards in, embedding shards out, exactly once.

`run` embeds a job and `plan` says what a run would do; `Encoder` embeds texts by a method, or by
the recipe of an output; `open_snapshot` reads what a run published. `trajectory_distance` compares
texts without vectors.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedjob.models.quiet import hush_imports

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from embedjob.config.job_file import JobSource
    from embedjob.encoder.encoder import Encoder
    from embedjob.job.planning import JobPlan
    from embedjob.job.result import Result
    from embedjob.output.snapshot import open_snapshot

__all__ = ["Encoder", "open_snapshot", "plan", "run", "trajectory_distance"]

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
        options: `address`, `takeover`, `new_fingerprint`, `publish_partial`, `repair`, `refit` and
            `retry_quarantined`, as on the command line.

    Raises:
        RefusedError: nothing was embedded, because the job does not fit its world.
        InterruptedRunError: a signal came, or the deadline before the vectors of a fit were
            embedded; a plain re-run resumes.
        FaultError: the run itself broke, stalled, or another run holds the output. Chunks that
            failed are no error: they are in the result's `faults`, and the shards that its deadline
            left in `left`.
    """
    from embedjob.job.options import Console, Options
    from embedjob.job.resolve import as_source
    from embedjob.pipeline import embed
    from embedjob.reports.progress import hidden, shown

    console = Console(logging.getLogger(__name__).info, shown if progress else hidden)
    return embed(as_source(job, sets), Options(**options), console)


def plan(
    job: "str | Path | Mapping[str, Any] | JobSource",
    *,
    sets: Sequence[str] = (),
    reusable: bool = False,
) -> "JobPlan":
    """Plan a job: its chunks, those left to be done, and its fingerprint; writes nothing.

    Args:
        job: the path of a job file, or its sections as a mapping.
        sets: overrides of its keys, as `--set` takes them.
        reusable: whether to count `rows_reusable`, the rows whose vectors a run would take over.
            All texts that are left are read and hashed for this, in this process.

    Raises:
        RefusedError: the job does not fit its world, as far as can be known without a write.
    """
    from embedjob.job.planning import plan_job
    from embedjob.job.resolve import as_source

    made = plan_job(as_source(job, sets))
    if not reusable:
        return made
    from embedjob.stages.engine import recipe_engine
    from embedjob.stages.reuse.take_over import rows_reusable

    engine = recipe_engine(made.job.config, threads=1)
    return replace(made, rows_reusable=rows_reusable(made, engine))


def trajectory_distance(
    left: Sequence[str],
    right: Sequence[str],
    *,
    model: str,
    device: str | None = None,
    **settings: Any,
) -> "npt.NDArray[np.float64]":
    """Return how far the texts of each pair are from each other [N], by a language model as it is.

    The exact distance of Liu et al. (arXiv:2310.18348): continuations are sampled from both texts,
    and the differences of their mean log-probabilities after the one and after the other summed.

    Args:
        left: the one text of each pair.
        right: the other text of each pair.
        model: a language model, as in `encoder.model`.
        device: where it runs; the first GPU if there is one, if None.
        settings: those of `embedjob.config.generation.TrajectorySettings`: `count`,
            `max_new_tokens`, `temperature`, `prompt`, `prepare`, `max_tokens`, `seed`.

    Raises:
        ConfigError: a setting is wrong.
        InputError: there are not as many texts on both sides, or one has no token.
        ModelError: there is no such model, or it predicts no next token.
    """
    from embedjob.config.generation import TrajectorySettings
    from embedjob.config.job_file import validate
    from embedjob.encoder.trajectories import Trajectories

    chosen = validate(TrajectorySettings, settings, at="settings")
    return Trajectories.load(model, chosen, device=device).distances(left, right)


def __getattr__(name: str) -> Any:
    # Loaded when asked for: `import embedjob` must not cost the seconds that torch takes.
    if name == "Encoder":
        from embedjob.encoder.encoder import Encoder

        return Encoder
    if name == "open_snapshot":
        from embedjob.output.snapshot import open_snapshot

        return open_snapshot
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
