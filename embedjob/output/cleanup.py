"""Clean-up: files that `prune` deletes, and chunks that a run is to make again."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timezone

import pyarrow as pa
import pyarrow.parquet as pq

from embedjob.errors import EmbedjobError, OutputError
from embedjob.output import lease
from embedjob.output.chunk_file import read_committed
from embedjob.output.claim import read_claims
from embedjob.output.derived.generations import GENERATIONS_FOLDER as GENERATIONS
from embedjob.output.derived.generations import used_generators
from embedjob.output.file_names import (
    data_directory,
    parse_name,
    parsed,
    quarantine_directory,
)
from embedjob.output.fits.artefacts import artefact_problems
from embedjob.output.fits.records import VECTORS_FOLDER, read_records
from embedjob.output.snapshot import (
    Snapshot,
    publish,
    published,
    read_snapshot,
    snapshot_files,
)
from embedjob.storage.local import SCRATCH
from embedjob.storage.objects import Stored, absolute, delete, join, list_files, open_unchanged

CLEANUP_THREADS = 8


GRACE_SECONDS = 24 * 3600.0
_BATCH = 256
_FOLDER = re.compile("[0-9a-f]{12}")


@dataclass(frozen=True)
class Pruned:
    """The number of files and snapshots that were deleted, and of files of generations."""

    files: int
    snapshots: int
    generations: int = 0


def prune(
    out: str,
    *,
    keep: int,
    grace_seconds: float = GRACE_SECONDS,
    say: Callable[[str], object] = lambda line: None,
) -> Pruned:
    """Delete files that no kept snapshot names, and the snapshots that are not kept.

    Vectors that were embedded for a fit whose artefact is recorded are deleted too, and so are the
    generations of generators that no kept snapshot's recipe has. Artefacts never are.

    Kept are the newest `keep`, and those that were replaced less than `grace_seconds` ago: their
    readers may still read. The newest is published once more, under the number of this prune, so
    that a run that is suspended meanwhile can only publish below it, and so that no later run
    counts on a file that is about to be deleted. `say` takes a line where the lease is waited for.

    Raises:
        OutputError: nothing was published here.
        FaultError: the output was taken over; what is left is deleted by the next prune.
    """
    if not published(out):
        raise OutputError(
            f"{out}: no snapshot was published here, so every file would be deleted; run its job to"
            " the end first, or delete the folder yourself"
        )
    with lease.held(lease.acquire(out, job="prune", say=say)) as holder:
        # Under the lease no fit is being made.
        spare = [*_spare_vectors(out)]
        # Listed under the lease: the run that held it before may have published at its very end.
        snapshots = [read_snapshot(out, epoch) for epoch in published(out)]
        kept = _kept(snapshots, keep=keep, grace_seconds=grace_seconds)
        named = {join(absolute(out), path) for one in kept for path in one.paths}
        embeddings = _named_by_runs(out, "data", "quarantine")
        doomed = [file.url for file in embeddings if file.url not in named]
        idle = [*_idle_generations(out, kept)]
        numbers = {one.epoch for one in kept}
        dropped = [one.epoch for one in snapshots if one.epoch not in numbers]
        if doomed or dropped:
            last = snapshots[-1]
            original = last.epoch if last.original is None else last.original
            again = replace(last, epoch=holder.epoch, pruned=holder.epoch, original=original)
            holder.require()
            publish(out, again)
        # Files that killed writers had not linked into place.
        left_over = [file.url for file in list_files(join(out, SCRATCH))]
        # The lists go before the files that they name.
        lists = [url for epoch in dropped for url in snapshot_files(out, epoch)]
        _delete([*lists, *doomed, *spare, *idle, *left_over], holder)
    lost = {_original(one) for one in snapshots} - {_original(one) for one in kept}
    return Pruned(len(doomed) + len(spare), snapshots=len(lost), generations=len(idle))


def _kept(snapshots: Sequence[Snapshot], *, keep: int, grace_seconds: float) -> list[Snapshot]:
    """Return the snapshots that stay; a list that a prune published again counts once."""
    now = datetime.now(timezone.utc)
    kept: list[Snapshot] = []
    replaced: datetime | None = None  # when the next newer list was published
    for snapshot in reversed(snapshots):
        lists = {_original(one) for one in kept}
        recent = replaced is not None and (now - replaced).total_seconds() < grace_seconds
        if _original(snapshot) in lists or len(lists) < keep or recent:
            kept.append(snapshot)
        if snapshot.original is None:
            replaced = datetime.fromisoformat(snapshot.created)
    return kept


def _original(snapshot: Snapshot) -> int:
    return snapshot.epoch if snapshot.original is None else snapshot.original


def _named_by_runs(out: str, *folders: str) -> Iterator[Stored]:
    """Yield what a prune may delete of folders: files where a run puts them, under its names."""
    for folder in folders:
        place = join(absolute(out), folder)
        for file in list_files(place):
            inner = file.url[len(place) + 1 :].split("/")
            if len(inner) == 2 and _FOLDER.fullmatch(inner[0]) and parsed(file.name):
                yield file


def _idle_generations(out: str, kept: Sequence[Snapshot]) -> Iterator[str]:
    """Yield the generations of generators that no kept snapshot's recipe has."""
    files = [*_named_by_runs(out, GENERATIONS)]
    if not files:
        return
    claims = read_claims(out)
    with_files = {snapshot.fingerprint for snapshot in kept if len(snapshot.files)}
    # A run with a deadline goes on with these, perhaps by another recipe than readers have.
    left = {path.split("/")[1] for one in kept for shard in one.left for path in shard.files}
    with_files |= {one.fingerprint for one in claims if one.fingerprint[:12] in left}
    used = used_generators(claims, with_files)
    if used is None:
        return
    for file in files:
        if file.url.split("/")[-2] not in used:
            yield file.url


def _spare_vectors(out: str) -> Iterator[str]:
    """Yield the files of vectors that were embedded for a fit whose artefact is recorded."""
    for record in read_records(out).values():
        if record.vectors is not None and not artefact_problems(
            out, [{record.kind: record.artefact}]
        ):
            folder = join(absolute(out), VECTORS_FOLDER, record.vectors)
            # The leases stay: numbers of snapshots go on from them. The claim, whose name is the
            # first, goes last: what is left beside it can be made whole again.
            leases = join(folder, "leases/")
            urls = [f.url for f in list_files(folder) if not f.url.startswith(leases)]
            yield from reversed(urls)


def _delete(urls: Sequence[str], holder: lease.Holder) -> None:
    """Delete files, some at a time, and none once the output is another's."""
    for start in range(0, len(urls), _BATCH):
        holder.require()
        with ThreadPoolExecutor(CLEANUP_THREADS) as pool:
            list(pool.map(delete, urls[start : start + _BATCH]))


def damaged(out: str, fingerprint: str) -> frozenset[str]:
    """Return the names of chunks whose last file cannot be read whole, or was only half put."""
    data = _last(list_files(data_directory(out, fingerprint)))
    quarantine = {file.name: file for file in _last(_bad_rows(out, fingerprint))}
    with ThreadPoolExecutor(CLEANUP_THREADS) as pool:
        sound = list(pool.map(lambda file: _is_sound(file, quarantine.get(file.name)), data))
    unsound = {file.name for file, whole in zip(data, sound, strict=True) if not whole}
    halves = quarantine.keys() - {file.name for file in data}
    return frozenset(parse_name(name).chunk for name in unsound | halves)


def quarantined(out: str, fingerprint: str) -> frozenset[str]:
    """Return the names of chunks with quarantined rows, which may now succeed."""
    # An earlier generation may have had bad rows that the last has not.
    data = {file.name for file in _last(list_files(data_directory(out, fingerprint)))}
    bad = {file.name for file in _bad_rows(out, fingerprint)}
    return frozenset(parse_name(name).chunk for name in data & bad)


def _bad_rows(out: str, fingerprint: str) -> list[Stored]:
    return list_files(quarantine_directory(out, fingerprint))


def _last(files: Iterable[Stored]) -> list[Stored]:
    """Return the last generation of each chunk's files."""
    last: dict[str, Stored] = {}
    for file in files:
        if name := parsed(file.name):
            before = last.get(name.chunk)
            if before is None or parse_name(before.name).generation < name.generation:
                last[name.chunk] = file
    return [*last.values()]


def _is_sound(file: Stored, quarantine: Stored | None) -> bool:
    """Return whether the chunk's good rows and its quarantined rows are all there."""
    try:
        counts = read_committed(file).counts
        bad = _rows(quarantine) if counts["quarantined"] and quarantine is not None else set()
        # A row of which one passage is bad is in both.
        whole = len(_rows(file) | bad) == counts["rows"]
        return whole and len(bad) == counts["quarantined"]
    except (EmbedjobError, OSError, pa.ArrowException):
        return False


def _rows(file: Stored) -> set[int]:
    """Read a file whole; return the numbers of its rows."""
    with open_unchanged(file) as source:
        table = pq.ParquetFile(source, page_checksum_verification=True).read()
    return set(table["row"].unique().to_pylist())
