"""Small corpora of several epochs: what is left is committed, and a snapshot of all is made."""

from dataclasses import replace
from pathlib import Path

from embedjob.config.job import Input
from embedjob.input.reading import read_chunk
from embedjob.job.planning import JobPlan
from embedjob.job.publishing import snapshot_of
from embedjob.job.result import Outcome, Outcomes
from embedjob.output.committing import commit
from embedjob.output.file_names import data_directory
from embedjob.output.snapshot import Snapshot
from embedjob.storage.objects import Stored, list_files
from tests.shards import FINGERPRINT, finished, output_spec, plan_of, write_shard


def small_corpus(folder: Path, *, shards: int = 2, rows: int = 25) -> Input:
    for number in range(shards):
        texts = [None if row == 3 else f"{number} {row}" for row in range(rows)]
        write_shard(
            folder / "in" / f"{number}.parquet", {"t": texts, "n": range(rows)}, group_rows=5
        )
    return Input(path=str(folder / "in"), text="t", id="n")


def commit_left(
    job_input: Input, out: str, *, epoch: int, skip: str = "none", previous: Snapshot | None = None
) -> tuple[JobPlan, Snapshot]:
    """Commit what is left, but for the shard named `skip`, and give what could be published."""
    plan = plan_of(job_input, listed=_listed(out), served=previous)
    return plan, commit_chunks(plan, job_input, out, epoch=epoch, skip=skip)


def commit_chunks(
    plan: JobPlan, job_input: Input, out: str, *, epoch: int, skip: str = "none"
) -> Snapshot:
    """Commit what a plan has left, but for the shard named `skip`; give what could be published."""
    ours = output_spec(job_input, plan.types)
    ends = Outcomes()
    for chunk in plan.left:
        if skip not in chunk.shard.url:
            rows = read_chunk(chunk, job_input)
            done = commit(out, chunk, finished(rows), rows_in=len(rows), spec=ours)
            ends.add(Outcome(chunk.key, chunk.shard.url, chunk.start, chunk.stop, done))
    return snapshot_of(plan, epoch=epoch, listed=_listed(out), outcomes=ends)


def replace_out(plan: JobPlan, out: str) -> JobPlan:
    """The plan of a job that writes there."""
    config = plan.job.config
    output = config.output.model_copy(update={"path": out})
    return replace(plan, job=replace(plan.job, config=config.model_copy(update={"output": output})))


def _listed(out: str) -> list[Stored]:
    return list_files(data_directory(out, FINGERPRINT))
