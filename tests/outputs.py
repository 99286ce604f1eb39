"""What a run left on the local disk or in a bucket: listed, read, copied, and changed."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedjob.output.manifest import FileList, SnapshotFile, put_parts
from embedjob.output.snapshot import newest_snapshot, read_snapshot
from embedjob.storage.objects import absolute, list_files


def written(out: str | Path) -> dict[str, str]:
    """The etag of every file under `data/`, by its name."""
    return {
        file.url.rsplit("/", 1)[-1]: file.etag for file in list_files(f"{absolute(str(out))}/data")
    }


def published(out: str | Path) -> pa.Table:
    """All rows of the newest snapshot, its files one after the other as it lists them."""
    snapshot = newest_snapshot(str(out))
    assert snapshot is not None, f"no snapshot in {out}"
    tables = [pq.read_table(f"{out}/{file.path}") for file in snapshot.files]
    return pa.concat_tables(tables)


def clone(out: Path, to: Path) -> Path:
    """A copy of a local output whose snapshots name the copies: a local etag holds the inode."""
    shutil.copytree(out, to)
    for path in (to / "snapshots").glob("*.json"):
        reissue(to, path)
    return to


def reissue(
    out: Path, snapshot: Path, edit: Callable[[dict[str, Any]], None] = lambda _: None
) -> None:
    """Rewrites a snapshot of a local output so that it names the files as they are now.

    `edit` changes the head, with the file entries as `files` in it.
    """
    standing = read_snapshot(str(out), int(snapshot.stem))
    document = json.loads(snapshot.read_text())
    etags = {file.url: file for file in list_files(str(out / "data"))}
    document["files"] = [asdict(file) for file in standing.files]
    for file in document["files"]:
        stored = etags.get(str(out / file["path"]))
        if stored is not None:
            file |= {"etag": stored.etag, "bytes": stored.size}
    edit(document)
    folder = snapshot.with_suffix("")
    shutil.rmtree(folder)
    files = FileList.of(SnapshotFile(**file) for file in document["files"])
    del document["files"]
    document["parts"] = put_parts(str(folder), files, standing.shards)
    snapshot.write_text(json.dumps(document))


@contextlib.contextmanager
def instead(path: Path, replacement: Callable[[Path], object]) -> Iterator[None]:
    """Within it another file lies at `path`; afterwards the very same one as before."""
    aside = path.with_name(f".{path.name}.aside")
    path.rename(aside)
    try:
        replacement(path)
        yield
    finally:
        aside.replace(path)
