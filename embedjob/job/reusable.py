"""Reusable files: embedding files of kept snapshots, whose vectors a run may take over.

They are those of the output itself, and of the outputs that `output.reuse_from` names, under the
run's own fingerprint.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedjob.errors import AccessError, EmbedjobError, OutputError
from embedjob.job.planning import JobPlan
from embedjob.job.resolve import IdentifiedJob
from embedjob.output.snapshot import Snapshot, published, read_snapshot
from embedjob.storage.objects import Stored, absolute

SNAPSHOT_THREADS = 8
# As columns: the entries of a million files would take gigabytes as objects.
_FILES = pa.schema(
    [
        ("url", pa.string()),
        ("bytes", pa.int64()),
        ("etag", pa.string()),
        ("rows", pa.int64()),
        ("nulls", pa.bool_()),
    ]
)


class OldFile(NamedTuple):
    """An embedding file and its lines; `nulls` says that some of them may have no vector."""

    stored: Stored
    rows: int
    nulls: bool


class OldFiles:
    """The distinct files of several snapshots, numbered from the newest snapshot on."""

    def __init__(self, tables: Sequence[pa.Table] = ()) -> None:
        """Take tables of files, of which a URL counts where it comes first."""
        every = pa.concat_tables([_FILES.empty_table(), *tables])
        place = pc.index_in(every["url"], value_set=every["url"].unique())
        _, first = np.unique(place.to_numpy(), return_index=True)
        self._table = every.take(pa.array(first)).combine_chunks()

    def __len__(self) -> int:
        """Return the number of files."""
        return int(self._table.num_rows)

    @property
    def rows(self) -> list[int]:
        """The number of lines of each file."""
        rows: list[int] = self._table["rows"].to_pylist()
        return rows

    def take(self, numbers: Sequence[int]) -> list[tuple[int, OldFile]]:
        """Return the files of these numbers, each with its number."""
        some = self._table.take(pa.array(numbers, pa.int64())).to_pylist()
        return [
            (
                number,
                OldFile(Stored(one["url"], one["bytes"], one["etag"]), one["rows"], one["nulls"]),
            )
            for number, one in zip(numbers, some, strict=True)
        ]


def old_files(plan: JobPlan) -> OldFiles:
    """Return the files whose vectors a run may take over; a snapshot that is gone has none.

    Those of the output come first, those of `output.reuse_from` after them.
    """
    job = plan.job
    tables = [
        _files_of(out, snapshot)
        for out in dict.fromkeys([job.out, *map(absolute, job.config.output.reuse_from)])
        for snapshot in _snapshots(out, plan)
        if snapshot.fingerprint == job.fingerprint
    ]
    return OldFiles(tables)


def check_reuse_from(job: IdentifiedJob) -> None:
    """Check that each output of `output.reuse_from` has a snapshot of the job's fingerprint.

    Raises:
        OutputError: it has none; the message shows both fingerprints.
        AccessError: it cannot be listed.
    """
    for out in map(absolute, job.config.output.reuse_from):
        seen = dict.fromkeys(snapshot.fingerprint for snapshot in _newest_first(out))
        if job.fingerprint in seen:
            continue
        theirs = ", ".join(one[:12] for one in seen)
        has = f"has vectors of fingerprint {theirs}" if seen else "has no snapshot"
        raise OutputError(
            f"output.reuse_from: {out} {has}, and this job has fingerprint {job.fingerprint[:12]};"
            " vectors are taken over under an equal fingerprint alone. Leave this output out, or"
            " give one that the same recipe and model wrote"
        )


def _newest_first(out: str) -> Iterator[Snapshot]:
    for epoch in reversed(published(out)):
        # A prune may be deleting it.
        with suppress(OutputError, FileNotFoundError):
            yield read_snapshot(out, epoch)


def _snapshots(out: str, plan: JobPlan) -> list[Snapshot]:
    """Return the snapshots that can be read, the newest first."""

    def read(epoch: int) -> Snapshot | None:
        if out == plan.job.out and plan.served is not None and plan.served.epoch == epoch:
            return plan.served
        with suppress(EmbedjobError, OSError):
            return read_snapshot(out, epoch)
        return None

    try:
        epochs = published(out)
    except (AccessError, OSError):
        return []
    with ThreadPoolExecutor(SNAPSHOT_THREADS) as pool:
        return [one for one in pool.map(read, reversed(epochs)) if one is not None]


def _files_of(out: str, snapshot: Snapshot) -> pa.Table:
    files = snapshot.files.table
    counts = files["counts"].combine_chunks()
    nulls = pc.greater(pc.fill_null(counts.field("nulls"), 0), 0)
    columns = {
        "url": pc.binary_join_element_wise(out.rstrip("/"), files["path"], "/"),
        "bytes": files["bytes"],
        "etag": files["etag"],
        "rows": files["rows"],
        "nulls": nulls,
    }
    return pa.table(columns, schema=_FILES).filter(pc.greater(files["rows"], 0))
