from pathlib import Path

import pytest

from embedjob.errors import FaultError, OutputError
from embedjob.output import lease
from embedjob.output.manifest import FileList
from embedjob.output.snapshot import Snapshot, newest_snapshot, open_snapshot, publish, published
from embedjob.storage.objects import create
from tests.output.epochs import commit_left, small_corpus
from tests.shards import FINGERPRINT


def _empty(epoch: int) -> Snapshot:
    return Snapshot(epoch=epoch, fingerprint=FINGERPRINT, files=FileList.of(()), shards=())


def test_a_snapshot_lists_every_file_and_opens_as_one_dataset(tmp_path: Path, any_out: str) -> None:
    job_input = small_corpus(tmp_path)
    plan, snapshot = commit_left(job_input, any_out, epoch=1)
    publish(any_out, snapshot)
    assert newest_snapshot(any_out) == snapshot
    assert [file.path.rsplit("/", 1)[-1] for file in snapshot.files] == [
        c.name for c in plan.chunks
    ]
    assert [(shard["rows"], shard["complete"]) for shard in snapshot.shards] == [(25, True)] * 2
    assert len(snapshot.quarantine) == 2
    assert (snapshot.counts["rows"], snapshot.counts["quarantined"]) == (50, 2)
    found = open_snapshot(any_out).to_table(columns=["row", "id", "shard"])
    expected = [row for row in range(25) if row != 3] * 2
    assert found.column("row").to_pylist() == found.column("id").to_pylist() == expected
    assert found.column("shard").to_pylist()[0].endswith("/in/0.parquet")


def test_files_of_earlier_runs_are_described_without_this_runs_memory(
    tmp_path: Path, out: str
) -> None:
    job_input = small_corpus(tmp_path)
    _, whole = commit_left(job_input, out, epoch=1)
    plan, resumed = commit_left(job_input, out, epoch=1)
    assert plan.left == ()
    assert resumed.files == whole.files


def test_a_late_zombie_publishes_below_and_never_over(tmp_path: Path, any_out: str) -> None:
    job_input = small_corpus(tmp_path)
    zombie = lease.acquire(any_out, job="zombie")
    _, late = commit_left(job_input, any_out, epoch=zombie.epoch)
    heir = lease.acquire(any_out, job="heir", takeover=True)
    _, current = commit_left(job_input, any_out, epoch=heir.epoch)
    publish(any_out, current)
    assert lease.superseded(zombie)
    with pytest.raises(FaultError, match="snapshot 2 of a later run"):
        publish(any_out, late)
    assert published(any_out) == (1, 2)
    assert newest_snapshot(any_out) == current


def test_a_snapshot_is_never_changed(tmp_path: Path, any_out: str) -> None:
    _, snapshot = commit_left(small_corpus(tmp_path), any_out, epoch=7)
    publish(any_out, snapshot)
    with pytest.raises(FaultError, match="published by another run"):
        publish(any_out, _empty(7))
    assert newest_snapshot(any_out) == snapshot


def test_a_shard_that_is_not_finished_keeps_the_files_published_before(
    tmp_path: Path, out: str
) -> None:
    job_input = small_corpus(tmp_path)
    _, first = commit_left(job_input, out, epoch=1)
    small_corpus(tmp_path, rows=15)
    _, second = commit_left(job_input, out, epoch=2, skip="/1.parquet", previous=first)
    assert [(shard["rows"], shard["complete"]) for shard in second.shards] == [
        (15, True),
        (15, False),
    ]
    rows = {
        number: [file.stop for file in second.files if f"/{number}.p" in file.shard]
        for number in (0, 1)
    }
    assert rows == {0: [10, 15], 1: [10, 20, 25]}
    publish(out, second)
    assert open_snapshot(out).count_rows() == 14 + 24


def test_a_broken_shard_keeps_its_files_and_is_named(tmp_path: Path, out: str) -> None:
    job_input = small_corpus(tmp_path)
    _, first = commit_left(job_input, out, epoch=1)
    (tmp_path / "in" / "1.parquet").write_bytes(b"PAR1")
    _, second = commit_left(job_input, out, epoch=2, previous=first)
    assert list(second.files) == list(first.files)
    assert [fault["shard"].rsplit("/", 1)[-1] for fault in second.faults] == ["1.parquet"]


def test_without_a_snapshot_there_is_nothing_to_trust(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no snapshot was published"):
        open_snapshot(str(tmp_path))


def test_a_snapshot_without_files_opens_empty(tmp_path: Path) -> None:
    publish(str(tmp_path), _empty(1))
    assert open_snapshot(str(tmp_path)).count_rows() == 0


@pytest.mark.parametrize("content", [b"{", b"{}"])
def test_what_is_no_snapshot_is_refused(tmp_path: Path, content: bytes) -> None:
    create(f"{tmp_path}/snapshots/00000001.json", content)
    with pytest.raises(OutputError, match=r"not JSON|not a snapshot"):
        newest_snapshot(str(tmp_path))
