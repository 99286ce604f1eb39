"""Deadlines: the chunks and shards that `run.until` left, and what is published without them."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace

from embedjob.errors import amount
from embedjob.input.chunks import Chunk
from embedjob.job.options import Options
from embedjob.job.planning import JobPlan, committed_files
from embedjob.job.result import Outcomes
from embedjob.output.file_names import data_folder, parse_name
from embedjob.output.snapshot import LeftShard, Snapshot
from embedjob.storage.objects import Stored

SHARDS_SHOWN = 5


def chunks_left(plan: JobPlan, outcomes: Outcomes, listed: Sequence[Stored]) -> tuple[Chunk, ...]:
    """Return the chunks that a run had to do, and that neither were committed nor failed."""
    here = committed_files(listed, plan.served, plan.chunks)
    ended = {parse_name(name).chunk for name in outcomes.files["name"].to_pylist()}
    ended |= {end.key for end in outcomes.faults}

    def is_put(chunk: Chunk) -> bool:
        # A writer may have put it when nobody counted any more.
        file = here.get(chunk.name)
        return file is not None and parse_name(file.name).generation >= chunk.generation

    return tuple(chunk for chunk in plan.left if chunk.name not in ended and not is_put(chunk))


def left_shards(
    plan: JobPlan, chunks: Collection[Chunk], listed: Sequence[Stored]
) -> tuple[LeftShard, ...]:
    """Return the shards of the chunks that are left, with what is committed of them already."""
    here = committed_files(listed, plan.served, plan.chunks)
    rows: dict[str, int] = defaultdict(int)
    for chunk in chunks:
        rows[chunk.shard.url] += chunk.rows
    folder, files = data_folder(plan.job.fingerprint), defaultdict[str, list[str]](list)
    for chunk in plan.chunks:
        if chunk.shard.url in rows and chunk.name in here:
            files[chunk.shard.url].append(f"{folder}/{here[chunk.name].name}")
    return tuple(LeftShard(url, rows[url], tuple(files[url])) for url in sorted(rows))


def why_unpublished(plan: JobPlan, snapshot: Snapshot, options: Options) -> str | None:
    """Return why readers are not to have a snapshot without the shards that are left; else None.

    It has to show them something whole, and nothing less than they have: the vectors of one recipe,
    and as many rows as `run.max_shrink` asks for. Where fewer rows would be there with all shards
    too, that is no matter of the deadline, and None.
    """
    served, most = plan.served, plan.job.config.run.max_shrink
    if served is None:
        whole = any(shard["complete"] for shard in snapshot.shards)
        return None if whole else "no shard is whole yet"
    if served.fingerprint != snapshot.fingerprint and not options.publish_partial:
        return f"readers stay with the recipe of snapshot {served.epoch} until no shard is left"
    before, now = (one.counts.get("rows", 0) for one in (served, snapshot))
    fewest = before * (1 - most)
    if options.allow_shrink or served.limit is not None or now >= fewest:
        return None
    urls = {one.shard for one in snapshot.left}
    with_all = now + sum(chunk.rows for chunk in plan.chunks if chunk.shard.url in urls)
    with_all -= snapshot.files.of_shards(urls).counts.get("rows", 0)
    if with_all < fewest:
        return None
    return (
        f"run.max_shrink: {amount(now, 'row')} would replace {before:,}, allowed is a loss of at"
        f" most {most:.0%} (--allow-shrink publishes it, if that is meant)"
    )


def served_once_more(plan: JobPlan, snapshot: Snapshot) -> Snapshot | None:
    """Return what readers have now under the number of a snapshot that they are not to have.

    With it goes what is committed of all shards, for the next run to go on from; None where readers
    have nothing.
    """
    served = plan.served
    if served is None:
        return None
    urls, whole = {one.shard for one in snapshot.left}, defaultdict[str, list[str]](list)
    for file in snapshot.files:
        if file.shard not in urls:
            whole[file.shard].append(file.path)
    waiting = (LeftShard(url, 0, tuple(paths)) for url, paths in whole.items())
    original = served.epoch if served.original is None else served.original
    left = (*snapshot.left, *waiting)
    return replace(served, epoch=snapshot.epoch, original=original, left=left)


def described_left(left: Sequence[LeftShard], *, why: str) -> str:
    """Return in one line which shards a deadline left; `why` is what kept them from being done."""
    rows = sum(one.rows for one in left)
    named = ", ".join(one.shard for one in left[:SHARDS_SHOWN])
    more = f" and {len(left) - SHARDS_SHOWN:,} more" if len(left) > SHARDS_SHOWN else ""
    return (
        f"run.until: {why}; left: {amount(len(left), 'shard')} with {amount(rows, 'row')}"
        f" ({named}{more}). Run again to go on with them"
    )
