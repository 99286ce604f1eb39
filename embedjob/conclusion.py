"""How a run ends: its faults gathered, its snapshot published or not, and its numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from embedjob.shards.committed import Committed
from embedjob.shards.lease import Lease
from embedjob.shards.names import data_directory
from embedjob.shards.planning import Request
from embedjob.shards.publishing import snapshot_of
from embedjob.shards.snapshot import Snapshot, newest, publish
from embedjob.stages.ledger import Outcome
from embedjob.stages.summary import Result, RunFacts, summarize
from embedjob.storage import Stored, join, list_files
from embedjob.survey import Survey

FAULTS_SHOWN = 20


def conclude(
    found: Survey,
    outcomes: Sequence[Outcome],
    *,
    lease: Lease,
    publish_partial: bool,
    seconds: float,
) -> Result:
    """The result; its snapshot is published where there are no faults, or where that was asked."""
    job = found.resolved.job
    request = Request(job.input, found.fingerprint, job.output.chunk_rows, job.run.limit)
    committed: list[Committed] = [end.committed for end in outcomes if end.committed is not None]
    listed = list_files(data_directory(found.out, found.fingerprint))
    snapshot = snapshot_of(
        found.plan,
        request=request,
        epoch=lease.epoch,
        listed=listed,
        committed=committed,
        previous=newest(found.out),
    )
    missing = (*_named(found, outcomes), *_gone(found, outcomes, listed))
    faults = [f"{fault['shard']}: {fault['reason']}" for fault in missing]
    faults += _quarantine(found, snapshot)
    url = None
    if not faults or publish_partial:
        publish(found.out, replace(snapshot, faults=missing))
        url = _snapshot_url(found, snapshot)
    return Result(
        summary=summarize(outcomes, _facts(found, seconds, url)),
        out=found.out,
        faults=tuple(faults),
        verdict=_verdict(faults, url),
    )


def nothing_to_do(found: Survey, standing: Snapshot, *, seconds: float) -> Result:
    """The result of a run that found everything done and published."""
    url = _snapshot_url(found, standing)
    return Result(
        summary=summarize((), _facts(found, seconds, url)),
        out=found.out,
        faults=(),
        verdict="every chunk of this input has its file, and the newest snapshot lists them all",
    )


def _named(found: Survey, outcomes: Sequence[Outcome]) -> tuple[dict[str, str], ...]:
    """What readers of a partial snapshot are told is missing, by shard."""
    planned = [{"shard": url, "reason": reason} for url, reason in found.plan.faults]
    ended = [
        {"shard": end.shard, "reason": f"rows {end.start} to {end.stop}: {end.fault}"}
        for end in outcomes
        if end.fault is not None
    ]
    return (*planned, *ended)


def _gone(
    found: Survey, outcomes: Sequence[Outcome], listed: Sequence[Stored]
) -> Iterator[dict[str, str]]:
    """Chunks that are neither there nor known to have failed: somebody deleted their files."""
    here = {file.name for file in listed}
    failed = {end.key for end in outcomes if end.fault is not None}
    for chunk in found.plan.chunks:
        if chunk.name not in here and chunk.key not in failed:
            reason = f"rows {chunk.start} to {chunk.stop}: the file {chunk.name} is gone; run again"
            yield {"shard": chunk.shard.url, "reason": reason}


def _quarantine(found: Survey, snapshot: Snapshot) -> list[str]:
    counts, most = snapshot.counts, found.resolved.job.run.max_quarantined
    if snapshot.quarantined_share <= most:
        return []
    return [
        f"run.max_quarantined: {counts['quarantined']} of {counts['rows']} rows are quarantined,"
        f" allowed is {most:.2%}; the rows and their reasons are in"
        f" {join(found.out, 'quarantine', found.fingerprint[:12])}"
    ]


def _verdict(faults: Sequence[str], url: str | None) -> str:
    if not faults:
        return f"published {url}"
    rest = len(faults) - FAULTS_SHOWN
    lines = [f"fault: {fault}" for fault in faults[:FAULTS_SHOWN]]
    lines += [f"and {rest} faults more"] if rest > 0 else []
    end = f"published in part: {url}" if url else "nothing was published"
    return "\n".join([*lines, f"{len(faults)} faults; everything else is committed; {end}"])


def _facts(found: Survey, seconds: float, url: str | None) -> RunFacts:
    plan = found.plan
    return RunFacts(
        chunks_planned=len(plan.chunks),
        chunks_done_before=len(plan.chunks) - len(plan.left),
        seconds=seconds,
        fingerprint=found.fingerprint,
        snapshot=url,
    )


def _snapshot_url(found: Survey, snapshot: Snapshot) -> str:
    return join(found.out, "snapshots", f"{snapshot.epoch:08d}.json")
