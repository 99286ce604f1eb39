"""How a run ends: its faults gathered, its snapshot published or not, and its numbers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from embedjob.input.chunks import Chunk
from embedjob.job.planning import Plan, Request
from embedjob.job.result import Result, RunFacts, summarize
from embedjob.job.survey import Survey
from embedjob.output.chunk_file import Committed, read_all_committed
from embedjob.output.file_names import data_directory
from embedjob.output.lease import Lease
from embedjob.output.snapshot import Snapshot, SnapshotFile, newest, publish
from embedjob.stages.ledger import Outcome
from embedjob.storage.objects import Stored, join, list_files

Known = Mapping[tuple[str, str], tuple[int, Mapping[str, int]]]  # rows and counts, by name, etag


def snapshot_of(
    plan: Plan,
    *,
    request: Request,
    epoch: int,
    listed: Sequence[Stored],
    committed: Sequence[Committed] = (),
    previous: Snapshot | None = None,
) -> Snapshot:
    """The planned files that are there, and of incomplete shards the files published before.

    `committed` spares reading the footers of what this run wrote; the faults are the plan's.
    """
    here = {file.name: file for file in listed}
    unfinished = {chunk.shard.url for chunk in plan.chunks if chunk.name not in here}
    unfinished |= {url for url, _ in plan.faults}
    alike = previous is not None and previous.fingerprint == request.fingerprint
    before = previous.files if previous is not None and alike else ()
    held_back = tuple(file for file in before if file.shard in unfinished)
    replaced = {file.shard for file in held_back}
    chunks = [
        chunk for chunk in plan.chunks if chunk.name in here and chunk.shard.url not in replaced
    ]
    files = _files(chunks, here, request.fingerprint, _known(committed, before))
    return Snapshot(
        epoch=epoch,
        fingerprint=request.fingerprint,
        files=(*files, *held_back),
        shards=_shards(plan, unfinished),
        faults=tuple({"shard": url, "reason": reason} for url, reason in plan.faults),
        quarantine=tuple(
            file.path.replace("data/", "quarantine/", 1)
            for file in (*files, *held_back)
            if file.counts["quarantined"]
        ),
        limit=request.limit,
    )


def _known(committed: Sequence[Committed], before: Sequence[SnapshotFile]) -> Known:
    found = {(file.path.rsplit("/", 1)[-1], file.etag): (file.rows, file.counts) for file in before}
    return found | {(file.name, file.etag): (file.rows, file.counts) for file in committed}


def _files(
    chunks: Sequence[Chunk], here: Mapping[str, Stored], fingerprint: str, known: Known
) -> tuple[SnapshotFile, ...]:
    unknown = [here[c.name] for c in chunks if (c.name, here[c.name].etag) not in known]
    known = {**known, **_known(read_all_committed(unknown), ())}
    return tuple(
        _file(chunk, here[chunk.name], fingerprint, known[chunk.name, here[chunk.name].etag])
        for chunk in chunks
    )


def _file(
    chunk: Chunk, file: Stored, fingerprint: str, content: tuple[int, Mapping[str, int]]
) -> SnapshotFile:
    rows, counts = content
    return SnapshotFile(
        path=f"data/{fingerprint[:12]}/{chunk.name}",
        rows=rows,
        bytes=file.size,
        etag=file.etag,
        shard=chunk.shard.url,
        shard_etag=chunk.shard.etag,
        start=chunk.start,
        stop=chunk.stop,
        counts=counts,
    )


def _shards(plan: Plan, unfinished: set[str]) -> tuple[dict[str, str | int | bool], ...]:
    """Every shard once, the empty ones with no rows, the unfinished ones named so."""
    rows = {shard.url: 0 for shard in plan.empty}
    etags = {shard.url: shard.etag for shard in plan.empty}
    for chunk in plan.chunks:
        rows[chunk.shard.url] = rows.get(chunk.shard.url, 0) + chunk.rows
        etags[chunk.shard.url] = chunk.shard.etag
    return tuple(
        {"url": url, "etag": etags[url], "rows": rows[url], "complete": url not in unfinished}
        for url in sorted(rows)
    )


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
