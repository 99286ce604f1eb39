"""Publishing: the faults of a run, its snapshot, and its summary, which is kept for every run."""

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedjob.errors import AccessError, FaultError, RefusedError, amount
from embedjob.input.chunks import Chunk
from embedjob.input.columns import columns_of
from embedjob.input.listing import described_unread
from embedjob.job.deadline import (
    chunks_left,
    described_left,
    left_shards,
    served_once_more,
    why_unpublished,
)
from embedjob.job.options import Console, Options
from embedjob.job.output import calibration_notes, entries
from embedjob.job.planning import JobPlan, committed_files
from embedjob.job.result import (
    Drift,
    Outcome,
    Outcomes,
    Result,
    RunFacts,
    StagesEnd,
    Summary,
    summarize,
)
from embedjob.output.chunk_file import read_all_committed
from embedjob.output.file_names import data_directory, data_folder, parse_name
from embedjob.output.fingerprint import version
from embedjob.output.lease import Holder
from embedjob.output.manifest import (
    FILES,
    FileList,
    Footers,
    Layout,
    SnapshotFile,
    as_table,
    described,
)
from embedjob.output.snapshot import LeftShard, Snapshot, publish
from embedjob.storage.objects import Stored, create, join, list_files

_CONTENT = pa.schema(map(FILES.field, ("rows", "counts")))


def snapshot_of(
    plan: JobPlan,
    *,
    epoch: int,
    listed: Sequence[Stored],
    outcomes: Outcomes | None = None,
    left: tuple[LeftShard, ...] = (),
) -> Snapshot:
    """Return the planned files that are there, and of incomplete shards the files served until now.

    `outcomes` spare reading the footers of what this run wrote; the faults are the plan's. Of
    shards that a deadline has `left` there is nothing new.
    """
    fingerprint, served = plan.job.fingerprint, plan.served
    here = committed_files(listed, served, plan.chunks)
    unfinished = {chunk.shard.url for chunk in plan.chunks if chunk.name not in here}
    waiting = {one.shard for one in left}
    unfinished |= {url for url, _ in plan.faults} | waiting
    alike = served is not None and served.fingerprint == fingerprint
    before = served.files if served is not None and alike else FileList.of(())
    held_back = [*_standing(before.of_shards(unfinished), listed, plan)] if unfinished else []
    replaced = {file.shard for file in held_back} | waiting
    chunks = [
        chunk for chunk in plan.chunks if chunk.name in here and chunk.shard.url not in replaced
    ]
    files = _files(chunks, here, fingerprint, _known(outcomes or Outcomes(), before, fingerprint))
    layouts: dict[Layout, int] = {}
    shards = _shards(plan, unfinished, layouts)
    return Snapshot(
        epoch=epoch,
        fingerprint=fingerprint,
        files=FileList(pa.concat_tables([files, FileList.of(held_back).table])),
        shards=shards,
        footers=Footers.of(
            plan.listing.wanted or columns_of(plan.job.config.input).wanted, layouts
        ),
        faults=tuple({"shard": url, "reason": reason} for url, reason in plan.faults),
        limit=plan.job.config.run.limit,
        input=plan.job.input_paths,
        input_version=plan.listing.version,
        projection=plan.projection or (served.projection if served and alike else None),
        pruned=None if served is None else served.pruned,
        left=left,
    )


def _standing(before: FileList, listed: Sequence[Stored], plan: JobPlan) -> Iterator[SnapshotFile]:
    """Yield the served files that are as they were published, and have tonight's columns."""
    names = before.names
    etags = {file.name: file.etag for file in listed if file.name in names}
    for file in before:
        if etags.get(file.name) != file.etag:
            continue
        made = version(file.shard_etag, plan.job.fingerprint, plan.projection)
        # Without a shard that can be read, no columns are known, and none are written.
        if not plan.projection or parse_name(file.name).version == made:
            yield file


def _known(outcomes: Outcomes, before: FileList, fingerprint: str) -> pa.Table:
    """Return path, etag, rows and counts of the files whose footers need not be read."""
    columns, made = ["path", "etag", "rows", "counts"], outcomes.files
    paths = pc.binary_join_element_wise(data_folder(fingerprint), made["name"], "/")
    return pa.concat_tables(
        [made.append_column("path", paths).select(columns), before.table.select(columns)]
    )


def _files(
    chunks: Sequence[Chunk], here: Mapping[str, Stored], fingerprint: str, known: pa.Table
) -> pa.Table:
    """Return the chunks' entries as a table of FILES; footers are read where `known` lacks them."""
    placed = entries(chunks, here, fingerprint)
    place = pc.index_in(placed["path"], value_set=known["path"])
    same = pc.equal(known["etag"].take(place), placed["etag"]).fill_null(False).to_numpy()
    unknown = [here[chunks[number].name] for number in np.flatnonzero(~same).tolist()]
    read = as_table(read_all_committed(unknown), _CONTENT)
    behind = len(known) + np.cumsum(~same) - 1
    content = pa.concat_tables([known.select(_CONTENT.names), read]).take(
        np.where(same, place.fill_null(0).to_numpy(), behind)
    )
    return pa.table(
        {n: (placed if n in placed.column_names else content)[n] for n in FILES.names}, FILES
    )


def _shards(
    plan: JobPlan, unfinished: set[str], layouts: dict[Layout, int]
) -> tuple[dict[str, Any], ...]:
    """Return every shard once, the empty ones with no rows, the unfinished ones named so."""
    rows = {shard.url: 0 for shard in plan.empty}
    etags = {shard.url: shard.etag for shard in plan.empty}
    for chunk in plan.chunks:
        rows[chunk.shard.url] = rows.get(chunk.shard.url, 0) + chunk.rows
        etags[chunk.shard.url] = chunk.shard.etag
    return tuple(
        {
            "url": url,
            "etag": etags[url],
            "rows": rows[url],
            "complete": url not in unfinished,
            **described(plan.footers.get(url), layouts),
        }
        for url in sorted(rows)
    )


FAULTS_SHOWN = 20


def publish_run(
    plan: JobPlan,
    end: StagesEnd,
    *,
    options: Options,
    console: Console,
    holder: Holder,
    started: float,
) -> Result:
    """Publish what a run made, keep its summary, and return its result.

    The snapshot is published where there are no faults, or with `publish_partial`; where a deadline
    left chunks, with the whole shards alone. The summary is kept as runs/<epoch>.json in any case.

    Raises:
        EmbedjobError: what stopped the stages early.
        FaultError: the output refused the snapshot or the summary.
    """
    if end.error is not None or end.outcomes is None:
        if end.outcomes is not None:
            # A full disk may be what stopped it: that is then the message, not this put.
            with suppress(AccessError, OSError):
                _keep_summary(plan, _summary(plan, end.outcomes, None, started), holder)
        raise end.error or FaultError("the stages ended without outcomes; run again to resume")
    with _refusals_as_faults():
        for note in calibration_notes(plan.job) if end.outcomes else ():
            console.say(note)
        listed = list_files(data_directory(plan.job.out, plan.job.fingerprint))
        unreached = chunks_left(plan, end.outcomes, listed) if end.late else ()
        left = left_shards(plan, unreached, listed) if unreached else ()
        made = snapshot_of(
            plan, epoch=holder.epoch, listed=listed, outcomes=end.outcomes, left=left
        )
        gone = _gone(plan, end.outcomes, listed, but={chunk.key for chunk in unreached})
        missing = (*_failed(plan, end.outcomes), *gone)
        snapshot = replace(made, faults=missing)
        faults = [f"{fault['shard']}: {fault['reason']}" for fault in missing]
        faults += _quarantine(plan, snapshot)
        # Faults that keep a snapshot back say more than that it would be smaller.
        whole = not faults or options.publish_partial
        kept_back = why_unpublished(plan, snapshot, options) if left and whole else None
        meant = options.allow_shrink or (options.new_input and not left)
        shrunk = [*_shrunk(plan, snapshot)] if whole and not kept_back and not meant else []
        shown = served_once_more(plan, snapshot) if kept_back else snapshot
        if whole and not shrunk and shown is not None:
            holder.require()
            publish(plan.job.out, shown)
        url = _snapshot_url(plan, snapshot) if whole and not shrunk and not kept_back else None
        summary = _summary(plan, end.outcomes, url, started)
        summary = replace(summary, chunks_left=len(unreached), shards_left=len(left))
        _keep_summary(plan, summary, holder)
    faults += shrunk
    verdict, notes = verdict_of(faults, url), end.notes
    if left:
        unpublished = f"nothing new was published: {kept_back}" if kept_back else verdict
        verdict = f"{unpublished}\n{described_left(left, why=end.late or '')}"
    if url and (why := _why_empty(plan, snapshot)):
        empty = f"the published snapshot is empty: {why}"
        verdict, notes = f"{verdict}\n{empty}", (*notes, empty)
    return Result(summary, plan.job.out, tuple(faults), verdict, notes, left)


def nothing_to_do(plan: JobPlan, standing: Snapshot, *, started: float) -> Result:
    """Return the result of a run whose chunks are all done and published; it keeps no summary."""
    verdict = "every chunk of this input has its file, and the newest snapshot lists them all"
    empty = _why_empty(plan, standing)
    return Result(
        summary=_summary(plan, Outcomes(), _snapshot_url(plan, standing), started),
        out=plan.job.out,
        faults=(),
        verdict=f"the newest snapshot is empty: {empty}" if empty else verdict,
    )


@contextmanager
def _refusals_as_faults() -> Iterator[None]:
    """Turn refusals into faults: after chunks were committed nothing is refused any more."""
    try:
        yield
    except RefusedError as error:
        raise FaultError(f"{error}; finished chunks are committed; run again") from error


def _failed(plan: JobPlan, outcomes: Outcomes) -> tuple[dict[str, str], ...]:
    """Return the shards and rows that failed, as readers of a partial snapshot see them."""
    planned = [{"shard": url, "reason": reason} for url, reason in plan.faults]
    ended = [
        {"shard": end.shard, "reason": f"rows {end.start} to {end.stop}: {_without_place(end)}"}
        for end in outcomes.faults
    ]
    return (*planned, *ended)


def _without_place(end: Outcome) -> str:
    """Return what went wrong without the shard and the rows, which stand before it already."""
    fault = (end.fault or "").removeprefix(end.shard)
    return fault.removeprefix(f", rows {end.start} to {end.stop}").removeprefix(": ")


def _gone(
    plan: JobPlan, outcomes: Outcomes, listed: Sequence[Stored], *, but: Collection[str]
) -> Iterator[dict[str, str]]:
    """Yield chunks that are neither there nor known to have failed: somebody deleted their files.

    `but` are the keys of those that a deadline left.
    """
    here = committed_files(listed, plan.served, plan.chunks)
    failed = {end.key for end in outcomes.faults} | {*but}
    for chunk in plan.chunks:
        if chunk.name not in here and chunk.key not in failed:
            reason = f"rows {chunk.start} to {chunk.stop}: the file {chunk.name} is gone; run again"
            yield {"shard": chunk.shard.url, "reason": reason}


def _quarantine(plan: JobPlan, snapshot: Snapshot) -> list[str]:
    counts, most = snapshot.counts, plan.job.config.run.max_quarantined
    if snapshot.quarantined_share <= most:
        return []
    return [
        f"run.max_quarantined: {counts['quarantined']} of {counts['rows']} rows are quarantined,"
        f" allowed is {most:.2%}; the rows and their reasons are in"
        f" {join(plan.job.out, 'quarantine', plan.job.fingerprint[:12])}"
    ]


def _shrunk(plan: JobPlan, snapshot: Snapshot) -> Iterator[str]:
    """Yield why readers would lose more rows than the job allows."""
    served, most = plan.served, plan.job.config.run.max_shrink
    if served is None or served.limit is not None:
        return
    before, now = served.counts.get("rows", 0), snapshot.counts.get("rows", 0)
    if now < before * (1 - most):
        removed = drift_of(plan).shards_removed
        yield (
            f"run.max_shrink: {amount(now, 'row')} would replace {before:,}, allowed is a loss of"
            f" at most {most:.0%}; gone from the input: {amount(removed, 'shard')}. Is it listed"
            " whole? --allow-shrink publishes it, if that is meant"
        )


def _why_empty(plan: JobPlan, snapshot: Snapshot) -> str | None:
    """Return why a snapshot has no row, good or bad; None where it has some."""
    if snapshot.counts.get("rows"):
        return None
    if not plan.rows:
        return f"the input has no row in {amount(len(plan.shards), 'shard')}"
    return f"input.filter lets none of {amount(plan.rows, 'row')} pass"


def drift_of(plan: JobPlan) -> Drift:
    """Return how the input differs from the corpus that was served when the run planned."""
    drift = Drift(files_not_read=len(plan.unread), not_read=described_unread(plan.unread))
    if plan.served is None:
        return replace(drift, shards_added=len(plan.shards))
    before = {shard["url"]: shard["etag"] for shard in plan.served.shards}
    now = {shard.url: shard.etag for shard in plan.shards}
    return replace(
        drift,
        rows_before=plan.served.counts.get("rows", 0),
        shards_added=len(now.keys() - before.keys()),
        shards_changed=sum(before.get(url, etag) != etag for url, etag in now.items()),
        shards_removed=len(before.keys() - now.keys()),
    )


def verdict_of(faults: Sequence[str], url: str | None) -> str:
    """Return the first faults, how many there are, and what was published at `url`, if anything."""
    if not faults:
        return f"published {url}"
    rest = len(faults) - FAULTS_SHOWN
    lines = [f"fault: {fault}" for fault in faults[:FAULTS_SHOWN]]
    lines += [f"further faults: {rest}"] if rest > 0 else []
    end = f"published in part: {url}" if url else "nothing was published"
    number = amount(len(faults), "fault")
    return "\n".join([*lines, f"{number}; everything else is committed; {end}"])


def _summary(plan: JobPlan, outcomes: Outcomes, url: str | None, started: float) -> Summary:
    facts = RunFacts(
        chunks_planned=len(plan.chunks),
        chunks_done_before=len(plan.chunks) - len(plan.left),
        seconds=time.monotonic() - started,
        fingerprint=plan.job.fingerprint,
        snapshot=url,
        drift=drift_of(plan),
    )
    return summarize(outcomes, facts)


def _keep_summary(plan: JobPlan, summary: Summary, holder: Holder) -> None:
    """Put the summary beside the snapshots; the epoch is this run's alone, so the name is free."""
    url = join(plan.job.out, "runs", f"{holder.epoch:08d}.json")
    create(url, json.dumps(summary.as_dict(), indent=1).encode())


def _snapshot_url(plan: JobPlan, snapshot: Snapshot) -> str:
    return join(plan.job.out, "snapshots", f"{snapshot.epoch:08d}.json")
