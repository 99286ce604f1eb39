"""Files that no snapshot names, deleted under the lease.

Covers: embedjob.output.cleanup
"""

from pathlib import Path
from typing import Any

import pytest

from embedjob.errors import AccessError, LeaseHeldError, OutputError
from embedjob.output import lease
from embedjob.output.cleanup import Pruned, prune
from embedjob.output.file_names import with_generation
from embedjob.output.snapshot import (
    newest_snapshot,
    open_snapshot,
    publish,
    published,
    read_snapshot,
)
from embedjob.storage.objects import create, list_files
from tests.output.epochs import commit_left, small_corpus
from tests.shards import FINGERPRINT


def newest_names(out: str) -> list[str]:
    snapshot = newest_snapshot(out)
    assert snapshot is not None
    return sorted(snapshot.files.names)


def test_only_what_no_kept_snapshot_names_is_deleted(tmp_path: Path, any_out: str) -> None:
    for rows in (25, 15, 5):
        job_input = small_corpus(tmp_path, rows=rows)
        with lease.held(lease.acquire(any_out, job="job")) as mine:
            _, snapshot = commit_left(job_input, any_out, epoch=mine.epoch)
            publish(any_out, snapshot)
    orphan = with_generation(newest_names(any_out)[0], 9)
    create(f"{any_out}/data/{FINGERPRINT[:12]}/{orphan}", b"x")
    # The first version: two shards of three chunks and one quarantine file each.
    assert prune(any_out, keep=2, grace_seconds=0) == Pruned(files=9, snapshots=1)
    # The newest list, once more under the number of the prune.
    assert published(any_out) == (2, 3, 4)
    assert prune(any_out, keep=2, grace_seconds=0) == Pruned(files=0, snapshots=0)
    assert published(any_out) == (2, 3, 4)
    assert prune(any_out, keep=1, grace_seconds=0) == Pruned(files=6, snapshots=1)
    assert open_snapshot(any_out).count_rows() == 8
    assert len(list_files(f"{any_out}/data")) == 2


@pytest.mark.parametrize("folder", ["data", "data/" + "f" * 12, "quarantine", ".embedjob-tmp"])
def test_nothing_is_deleted_through_a_link(tmp_path: Path, folder: str) -> None:
    """Whoever may write to an output may put links there; prune runs with another's rights."""
    out, home = tmp_path / "out", tmp_path / "home"
    _, snapshot = commit_left(small_corpus(tmp_path), str(out), epoch=1)
    publish(str(out), snapshot)
    (home / folder).mkdir(parents=True)
    names = ["thesis.parquet", f"a-{'0' * 16}-{'0' * 16}-{0:010d}-{9:010d}.parquet"]
    for name in names:
        (home / folder / name).write_text("mine")
        (home / name).write_text("mine")
    (out / folder).mkdir(parents=True, exist_ok=True)
    (out / folder / "link").symlink_to(home)
    for name in names:
        (out / folder / name).symlink_to(home / name)
    prune(str(out), keep=1)
    (out / folder).rename(tmp_path / "before")
    (out / folder).symlink_to(home / folder)
    if "/" in folder:  # only links inside a folder that is listed are passed over
        prune(str(out), keep=1)
    else:
        with pytest.raises(AccessError, match=f"{folder}: is a link"):
            prune(str(out), keep=1)
    for kept in (home, home / folder):
        assert {name: (kept / name).read_text() for name in names} == dict.fromkeys(names, "mine")


def test_nothing_is_deleted_while_a_run_holds_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    _, snapshot = commit_left(small_corpus(tmp_path), out, epoch=1)
    publish(out, snapshot)
    orphan = with_generation(newest_names(out)[0], 9)
    create(f"{out}/data/{FINGERPRINT[:12]}/{orphan}", b"x")
    with lease.held(lease.acquire(out, job="job"), every=0.5), pytest.raises(LeaseHeldError):
        prune(out, keep=1)
    assert prune(out, keep=1).files == 1


def test_what_was_published_while_it_waited_for_the_lease_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    _, snapshot = commit_left(small_corpus(tmp_path, rows=5), out, epoch=1)
    publish(out, snapshot)
    acquire = lease.acquire

    def waited_for(out: str, *, job: str, **options: Any) -> lease.Lease:
        job_input = small_corpus(tmp_path, rows=15)
        with lease.held(acquire(out, job="job")) as holder:
            _, later = commit_left(job_input, out, epoch=holder.epoch)
            publish(out, later)
        return acquire(out, job=job, **options)

    monkeypatch.setattr(lease, "acquire", waited_for)
    assert prune(out, keep=1, grace_seconds=0).snapshots == 1
    assert open_snapshot(out).count_rows() == 28


def test_without_a_snapshot_nothing_is_deleted(tmp_path: Path) -> None:
    create(f"{tmp_path}/data/a.parquet", b"x")
    with pytest.raises(OutputError, match="every file would be deleted; run its job"):
        prune(str(tmp_path), keep=2)


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    _, snapshot = commit_left(small_corpus(tmp_path), out, epoch=1)
    publish(out, snapshot)
    left_over = tmp_path / "out" / ".embedjob-tmp" / "half-written"
    left_over.parent.mkdir(exist_ok=True)
    left_over.write_bytes(b"half")
    assert prune(out, keep=1) == Pruned(files=0, snapshots=0)
    assert not left_over.exists()


def test_what_was_replaced_a_moment_ago_stays_readable(tmp_path: Path, any_out: str) -> None:
    """Its readers hold a list of files, and may be at it for as long as the grace."""
    for rows in (25, 15):
        job_input = small_corpus(tmp_path, rows=rows)
        with lease.held(lease.acquire(any_out, job="job")) as mine:
            _, snapshot = commit_left(job_input, any_out, epoch=mine.epoch)
            publish(any_out, snapshot)
    first = read_snapshot(any_out, 1)
    assert prune(any_out, keep=1, grace_seconds=3600) == Pruned(files=0, snapshots=0)
    etags = {file.url: file.etag for file in list_files(f"{any_out}/data")}
    assert all(etags[f"{any_out}/{file.path}"] == file.etag for file in first.files)
    assert prune(any_out, keep=1, grace_seconds=0).files == 8


def test_only_names_of_embedding_files_are_deleted_and_never_behind_a_link(
    tmp_path: Path, out: str
) -> None:
    _, snapshot = commit_left(small_corpus(tmp_path), out, epoch=1)
    publish(out, snapshot)
    home = tmp_path / "home"
    home.mkdir()
    kept = [home / "thesis.txt", home / newest_names(out)[0], Path(out, "data", "README.md")]
    for path in kept:
        path.write_text("mine")
    Path(out, "data", "link").symlink_to(home)
    prune(out, keep=1, grace_seconds=0)
    assert [path.read_text() for path in kept] == ["mine"] * 3
