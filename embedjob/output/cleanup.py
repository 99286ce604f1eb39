"""Deletion: files that `prune` drops, and chunks that a run is to make again."""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from embedjob.errors import EmbedjobError, OutputError
from embedjob.output import lease
from embedjob.output.chunk_file import read_committed
from embedjob.output.file_names import data_directory, quarantine_directory
from embedjob.output.row_checks import first_lines
from embedjob.output.snapshot import Snapshot, published, read_snapshot
from embedjob.storage.local import SCRATCH
from embedjob.storage.objects import Stored, absolute, delete, join, list_files, open_unchanged

THREADS = 8


@dataclass(frozen=True)
class Pruned:
    """The number of files and snapshots that were deleted."""

    files: int
    snapshots: int


def prune(out: str, *, keep: int) -> Pruned:
    """Delete files that none of the newest `keep` snapshots names, and the older snapshots.

    It holds the lease meanwhile, because a run's files are in no snapshot until the run ends.
    """
    if not published(out):
        raise OutputError(f"{out}: no snapshot was published here, so every file would be deleted")
    with lease.held(lease.claim(out, job="prune")):
        # Listed under the lease: the run that held it before may have published at its very end.
        epochs = published(out)
        kept = [read_snapshot(out, epoch) for epoch in epochs[-keep:]]
        named = {join(absolute(out), path) for snapshot in kept for path in _paths(snapshot)}
        doomed = [
            file.url
            for folder in ("data", "quarantine")
            for file in list_files(join(out, folder))
            if file.url not in named
        ]
        # Files that killed writers had not linked into place.
        left_over = [file.url for file in list_files(join(out, SCRATCH))]
        for url in [*doomed, *left_over]:
            delete(url)
        for epoch in epochs[:-keep]:
            delete(join(out, "snapshots", f"{epoch:08d}.json"))
    return Pruned(files=len(doomed), snapshots=len(epochs[:-keep]))


def _paths(snapshot: Snapshot) -> list[str]:
    return [file.path for file in snapshot.files] + list(snapshot.quarantine)


def damaged(out: str, fingerprint: str) -> frozenset[str]:
    """Return the names of chunks whose files cannot be read whole, or were only half put."""
    data = list_files(data_directory(out, fingerprint))
    quarantine = {file.name: file for file in list_files(quarantine_directory(out, fingerprint))}
    with ThreadPoolExecutor(THREADS) as pool:
        sound = list(pool.map(lambda file: _is_sound(file, quarantine.get(file.name)), data))
    head_column_problems = {file.name for file, whole in zip(data, sound, strict=True) if not whole}
    halves = quarantine.keys() - {file.name for file in data}
    return frozenset(head_column_problems | halves)


def quarantined(out: str, fingerprint: str) -> frozenset[str]:
    """Return the names of chunks with quarantined rows, which may now succeed."""
    return frozenset(file.name for file in list_files(quarantine_directory(out, fingerprint)))


def delete_chunks(out: str, fingerprint: str, names: Collection[str]) -> None:
    """Delete chunks, each data file first: a chunk without it is work left, whatever remains."""
    for name in sorted(names):
        delete(join(data_directory(out, fingerprint), name))
        delete(join(quarantine_directory(out, fingerprint), name))


def _is_sound(file: Stored, quarantine: Stored | None) -> bool:
    """Return whether the chunk's good rows and its quarantined rows are all there."""
    try:
        counts = read_committed(file).counts
        if counts["quarantined"] and (
            quarantine is None or _rows(quarantine) != counts["quarantined"]
        ):
            return False
        return _rows(file) + counts["quarantined"] == counts["rows"]
    except (EmbedjobError, OSError, pa.ArrowException):
        return False


def _rows(file: Stored) -> int:
    with open_unchanged(file) as source:
        table = pq.ParquetFile(source, page_checksum_verification=True).read()
    return len(first_lines(table))
