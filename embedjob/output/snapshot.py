"""Snapshots: the published lists of files that readers may trust; the highest number wins."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from embedjob.errors import OutputError
from embedjob.output.schema import FORMAT_VERSION
from embedjob.storage.objects import absolute, create_json, join, list_files, read_bytes

if TYPE_CHECKING:
    import pyarrow.dataset as ds
    import pyarrow.fs as fs


@dataclass(frozen=True)
class SnapshotFile:
    """An embedding file, relative to the output, and the rows of its shard that it holds.

    `rows` is Parquet's count: of lines, where a row of the shard has several.
    """

    path: str
    rows: int
    bytes: int
    etag: str
    shard: str
    shard_etag: str
    start: int
    stop: int
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Snapshot:
    """The state that was published under one epoch."""

    epoch: int
    fingerprint: str
    files: tuple[SnapshotFile, ...]
    shards: tuple[Mapping[str, Any], ...]
    faults: tuple[Mapping[str, str], ...] = ()
    quarantine: tuple[str, ...] = ()
    limit: int | None = None
    created: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat("T", "seconds")
    )
    format_version: int = FORMAT_VERSION

    @property
    def counts(self) -> dict[str, int]:
        """Sum all files' rows by what became of them, and their tokens."""
        keys = dict.fromkeys(key for file in self.files for key in file.counts)
        return {key: sum(file.counts.get(key, 0) for file in self.files) for key in keys}

    @property
    def quarantined_share(self) -> float:
        """Return quarantined rows over all rows; 0 without rows."""
        counts = self.counts
        return counts.get("quarantined", 0) / max(1, counts.get("rows", 0))


def publish(out: str, snapshot: Snapshot) -> Snapshot:
    """Put a snapshot once, never to be changed; return the snapshot that stands under its epoch.

    A run that lost its lease publishes below the newest number, and so never over it.
    """
    url = _url(out, snapshot.epoch)
    return _snapshot(create_json(url, asdict(snapshot) | {"counts": snapshot.counts}), url)


def newest(out: str) -> Snapshot | None:
    """Return the snapshot of the highest number; None where none was published."""
    epochs = published(out)
    return read_snapshot(out, epochs[-1]) if epochs else None


def published(out: str) -> tuple[int, ...]:
    """Return the numbers of all snapshots, ascending."""
    names = [file.name for file in list_files(join(out, "snapshots"))]
    numbers = [name.removesuffix(".json") for name in names if name.endswith(".json")]
    return tuple(sorted(int(number) for number in numbers if number.isdigit()))


def read_snapshot(out: str, epoch: int) -> Snapshot:
    """Read the snapshot of that number."""
    url = _url(out, epoch)
    try:
        return _snapshot(json.loads(read_bytes(url)), url)
    except ValueError as error:
        raise OutputError(f"{url}: is not JSON; was it edited by hand?") from error


def open_snapshot(out: str) -> "ds.Dataset":
    """Open the newest snapshot's files as a pyarrow dataset; OutputError where there is none."""
    # With it comes pandas: most of a second, for readers only.
    import pyarrow.dataset as ds

    snapshot = newest(out)
    if snapshot is None:
        raise OutputError(
            f"{out}: no snapshot was published here; a run publishes a snapshot when it ends"
            " without faults, or with --publish-partial"
        )
    filesystem, root = _filesystem(out)
    paths = [f"{root}/{file.path}" for file in snapshot.files]
    if not paths:
        return ds.dataset(pa.table({}))
    return ds.dataset(paths, filesystem=filesystem, format="parquet")


def _filesystem(out: str) -> "tuple[fs.FileSystem, str]":
    """Return Arrow's view of the place, through the library and settings that wrote it."""
    import pyarrow.fs as fs

    url = absolute(out)
    if "://" not in url:
        return fs.LocalFileSystem(), url
    filesystem, root = fs.FileSystem.from_uri(f"fsspec+{url}")
    return filesystem, root.rstrip("/")


def _url(out: str, epoch: int) -> str:
    return join(out, "snapshots", f"{epoch:08d}.json")


def _snapshot(document: dict[str, Any], url: str) -> Snapshot:
    try:
        lists = {key: tuple(document[key]) for key in ("shards", "faults", "quarantine")}
        files = tuple(SnapshotFile(**file) for file in document["files"])
        own = {key: document[key] for key in document.keys() - {"token", "counts"}}
        return Snapshot(**{**own, **lists, "files": files})
    except (KeyError, TypeError) as error:
        raise OutputError(f"{url}: is not a snapshot of this release ({error})") from error
