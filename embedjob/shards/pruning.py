"""Deleting what no kept snapshot names."""

from dataclasses import dataclass

from embedjob.backends.local import SCRATCH
from embedjob.errors import OutputError
from embedjob.shards import lease
from embedjob.shards.snapshot import Snapshot, published, read_snapshot
from embedjob.storage import absolute, delete, join, list_files


@dataclass(frozen=True)
class Pruned:
    """How much was deleted."""

    files: int
    snapshots: int


def prune(out: str, *, keep: int) -> Pruned:
    """What was deleted; the newest `keep` snapshots and their files stay.

    It holds the lease meanwhile, because a run's files are named by no snapshot until it ends.
    """
    if not published(out):
        raise OutputError(f"{out}: no snapshot was published here, so every file would go")
    with lease.held(lease.claim(out, job="prune")):
        # Only now: the run that held the lease before may have published at its very end.
        epochs = published(out)
        kept = [read_snapshot(out, epoch) for epoch in epochs[-keep:]]
        named = {join(absolute(out), path) for snapshot in kept for path in _paths(snapshot)}
        doomed = [
            file.url
            for folder in ("data", "quarantine")
            for file in list_files(join(out, folder))
            if file.url not in named
        ]
        # What writers that were killed had not linked into place yet.
        left_over = [file.url for file in list_files(join(out, SCRATCH))]
        for url in [*doomed, *left_over]:
            delete(url)
        for epoch in epochs[:-keep]:
            delete(join(out, "snapshots", f"{epoch:08d}.json"))
    return Pruned(files=len(doomed), snapshots=len(epochs[:-keep]))


def _paths(snapshot: Snapshot) -> list[str]:
    return [file.path for file in snapshot.files] + list(snapshot.quarantine)
