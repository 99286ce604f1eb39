"""Snapshots: the published lists of files that readers may trust; the highest number wins.

A snapshot is a small JSON head, and its file entries in Parquet parts beside it.
"""

import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import chain
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from embedjob.errors import FaultError, OutputError
from embedjob.output.documents import (
    EVERY,
    NONE,
    Kind,
    is_moment,
    numbered,
    read_document,
    require_kinds,
)
from embedjob.output.manifest import FileList, Footers, SnapshotFile, inside, put_parts, read_parts
from embedjob.storage.objects import absolute, create_json, join, list_files

if TYPE_CHECKING:
    import pyarrow.dataset as ds
    import pyarrow.fs as fs

# Version 1 held the file entries in the head itself.
HEAD_VERSION = 2
_HEAD = (
    *("epoch", "fingerprint", "limit", "input", "input_version", "projection", "pruned"),
    *("original", "created"),
)


_KINDS: Kind = {
    "epoch": int,
    "fingerprint": re.compile("[0-9a-f]{64}"),
    "limit": (NONE, int),
    "input": (NONE, [str]),
    "input_version": (NONE, str),
    "projection": (NONE, str),
    "pruned": (NONE, int),
    "original": (NONE, int),
    "created": is_moment,
    "footers": (
        NONE,
        {
            "wanted": {EVERY: [str]},
            "schemas": [str],
            "fine_schemas": [(NONE, str)],
            "exact": bool,
        },
    ),
    "faults": [{EVERY: str}],
    "left": [{"shard": str, "rows": int, "files": [str]}],
    "parts": [{"name": re.compile(r"(files-\d+|shards)\.parquet"), "rows": int, "bytes": int}],
    # In version 1 these lists are in the head; a later head has their lengths.
    "files": (int, [{"counts": {EVERY: int}, EVERY: (str, int)}]),
    "shards": (int, [{"url": str, "etag": str, "rows": int, "complete": bool}]),
}


@dataclass(frozen=True)
class LeftShard:
    """A shard that a run with a deadline has not published: `rows` of it were not embedded.

    `files` are those of its chunks that are committed, relative to the output. Readers do not see
    them yet, and no prune deletes them: the next run goes on from them.
    """

    shard: str
    rows: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class Snapshot:
    """The state that was published under one epoch.

    `input` are the paths of the corpus as its job has them, `input_version` is that of a table,
    `projection` is the canonical text of what decided the files' rows; all are None in snapshots of
    earlier releases. `pruned` is the
    epoch of the last prune: what was made before it and is in no snapshot since counts for nothing.
    `original` is the epoch of the snapshot that a prune, or a run that left shards, published once
    more.
    """

    epoch: int
    fingerprint: str
    files: FileList
    shards: tuple[Mapping[str, Any], ...]
    faults: tuple[Mapping[str, str], ...] = ()
    limit: int | None = None
    input: tuple[str, ...] | None = None
    input_version: str | None = None
    projection: str | None = None
    footers: Footers | None = None
    pruned: int | None = None
    original: int | None = None
    left: tuple[LeftShard, ...] = ()
    created: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat("T", "seconds")
    )

    @property
    def counts(self) -> dict[str, int]:
        """Sum all files' rows by what became of them, and their tokens."""
        return self.files.counts

    @property
    def names(self) -> frozenset[str]:
        """Return the names of the files that it lists for readers, or for the run that goes on."""
        return self.files.names | {path.rsplit("/", 1)[-1] for path in self._of_left()}

    @property
    def paths(self) -> Iterator[str]:
        """Yield the paths of all files that belong to it, also those of bad rows."""
        yield from self.files.table["path"].to_pylist()
        yield from self.quarantine
        for path in self._of_left():
            yield path
            yield path.replace("data/", "quarantine/", 1)

    def _of_left(self) -> Iterator[str]:
        return (path for one in self.left for path in one.files)

    @property
    def quarantine(self) -> tuple[str, ...]:
        """Return the paths of the files of bad rows, relative to the output."""
        bad = self.files.with_bad_rows()
        return tuple(file.path.replace("data/", "quarantine/", 1) for file in bad)

    @property
    def quarantined_share(self) -> float:
        """Return quarantined rows over all rows; 0 without rows."""
        counts = self.counts
        return counts.get("quarantined", 0) / max(1, counts.get("rows", 0))


def publish(out: str, snapshot: Snapshot) -> None:
    """Put a snapshot once, never to be changed; its parts come first and its head last.

    FaultError where it is not what readers see then: its number was taken, or a later run has
    published. A run that lost its lease publishes below the newest number, and so never over it.
    """
    folder = join(out, "snapshots", f"{snapshot.epoch:08d}")
    parts = put_parts(folder, snapshot.files, snapshot.shards)
    head = {name: getattr(snapshot, name) for name in _HEAD}
    left = {"left": [asdict(one) for one in snapshot.left]} if snapshot.left else {}
    document = {
        "token": secrets.token_hex(16),
        "format_version": HEAD_VERSION,
        **head,
        "footers": snapshot.footers and snapshot.footers.as_dict(),
        "counts": snapshot.counts,
        "faults": [*snapshot.faults],
        **left,
        "parts": parts,
    }
    url = _url(out, snapshot.epoch)
    standing = create_json(url, document)
    if standing.get("token") != document["token"]:
        raise FaultError(f"{url}: was published by another run; nothing of this run is published")
    if (last := published(out)[-1]) != snapshot.epoch:
        raise FaultError(
            f"{out}: snapshot {last} of a later run is what readers see, not {snapshot.epoch} of"
            " this one"
        )


def newest_snapshot(out: str) -> Snapshot | None:
    """Return the snapshot of the highest number; None where none was published."""
    epochs = published(out)
    return read_snapshot(out, epochs[-1]) if epochs else None


def published(out: str) -> tuple[int, ...]:
    """Return the numbers of all snapshots, ascending."""
    folder = join(absolute(out), "snapshots")
    names = [file.url[len(folder) + 1 :] for file in list_files(folder)]
    return tuple(sorted(numbered(name for name in names if name.endswith(".json"))))


def snapshot_files(out: str, epoch: int) -> list[str]:
    """Return the URLs of a snapshot's head and, after it, of its parts."""
    url = _url(out, epoch)
    return [url, *(file.url for file in list_files(url.removesuffix(".json")))]


def read_snapshot(out: str, epoch: int) -> Snapshot:
    """Read the snapshot of that number, with all its file entries.

    OutputError where it is damaged, or names a file outside the output's folders of embeddings.
    """
    url = _url(out, epoch)
    document = read_document(url)
    require_kinds(document, _KINDS, url=url, what="a snapshot")
    try:
        if document.get("format_version") == HEAD_VERSION:
            files, shards = read_parts(url.removesuffix(".json"), document["parts"])
        else:
            files = FileList.of(SnapshotFile(**file) for file in document["files"])
            shards = tuple(document["shards"])
        given = {name: document[name] for name in _HEAD if name in document}
        if given.get("input") is not None:
            given["input"] = tuple(given["input"])
        if document.get("footers"):
            given["footers"] = Footers.from_dict(document["footers"])
        given["left"] = tuple(
            LeftShard(one["shard"], one["rows"], tuple(one["files"]))
            for one in document.get("left", ())
        )
        snapshot = Snapshot(**given, files=files, shards=shards, faults=tuple(document["faults"]))
        for path in chain(files.table["path"].to_pylist(), *(one.files for one in snapshot.left)):
            inside(path)
    except (
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
        ArithmeticError,
        pa.ArrowException,
    ) as error:
        raise OutputError(f"{url}: is not a snapshot of this release ({error})") from error
    if snapshot.epoch != epoch:
        raise OutputError(f"{url}: has the epoch {snapshot.epoch} of another one; was it copied?")
    return snapshot


def open_snapshot(out: str) -> "ds.Dataset":
    """Open the newest snapshot's files as a pyarrow dataset; OutputError where there is none."""
    # With it comes pandas: most of a second, for readers only.
    import pyarrow.dataset as ds

    snapshot = newest_snapshot(out)
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

    from embedjob.storage.fsspec_backend import fresh_filesystem

    url = absolute(out)
    if "://" not in url:
        return fs.LocalFileSystem(), url
    filesystem, root = fresh_filesystem(url)
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), root.rstrip("/")


def _url(out: str, epoch: int) -> str:
    return join(out, "snapshots", f"{epoch:08d}.json")
