"""From the plan and the listing at a run's end to what a reader may trust."""

from collections.abc import Mapping, Sequence

from embedjob.shards.chunks import Chunk
from embedjob.shards.committed import Committed, read_all_committed
from embedjob.shards.planning import Plan, Request
from embedjob.shards.snapshot import Snapshot, SnapshotFile
from embedjob.storage import Stored

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
