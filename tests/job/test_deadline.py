"""What a run with a deadline publishes: whole shards, and nothing less than readers have.

Everything is real but the stages, which commit so many chunks of the newest shards.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from embedjob.config.job_file import JobSource, Layer
from embedjob.errors import ConfigError, OutputError
from embedjob.job.options import Options
from embedjob.job.planning import plan_job
from embedjob.output import lease
from embedjob.output.cleanup import prune
from embedjob.output.snapshot import LeftShard, Snapshot, newest_snapshot, publish, read_snapshot
from embedjob.reports.verify import verify
from embedjob.storage.objects import find, list_files, read_bytes
from tests.output.epochs import commit_chunks, commit_left, small_corpus
from tests.output.worlds import Operation, World
from tests.shards import plan_of

# Newest first: two shards of one chunk of seven rows, and one of three chunks of 23 rows.
SHARDS = {"in/new": 7, "in/next": 7, "in/old": 23}


class Dated(World):
    """A world whose shards were written in the order of SHARDS, and of their versions."""

    def write(self, name: str, rows: int, version: int) -> None:
        super().write(name, rows, version)
        path = self.inputs / f"{name}.parquet"
        age = list(SHARDS).index(name) if version == 1 else -version
        os.utime(path, (10**9 - age, 10**9 - age))
        # The etag of a local file holds its time.
        [stored] = find(str(path))
        self.good[stored.url, stored.etag] = [*self.good.values()][-1]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Dated]:
    with Dated(tmp_path).running() as made:
        assert isinstance(made, Dated)
        for name, rows in SHARDS.items():
            made.write(name, rows, 1)
        yield made


def run(world: World, *, late: int | None = None, code: int = 3, **options: bool) -> Operation:
    before = newest_snapshot(world.out)
    ended = world.run(Options(**options), late=late)
    assert ended.code == code, ended.error or ended.result
    world.look()
    if code == 3:
        world.check_deadline(ended, before)
    if code == 0:
        world.check_success(ended)
    return ended


def stems(ids: dict[str, list[str]]) -> dict[str, int]:
    return {Path(url).stem: len(found) for url, found in ids.items()}


def visible(world: World) -> dict[str, int]:
    """How many good rows readers see of each shard; one row in each shard is bad."""
    return stems(world.by_shard(newest_snapshot(world.out)))


def test_whole_shards_are_published_and_the_next_night_goes_on(world: Dated) -> None:
    first = run(world, late=3)
    assert visible(world) == {"new": 6, "next": 6}
    assert [(Path(one.shard).stem, one.rows) for one in first.result.left] == [("old", 13)]
    lines = first.result.verdict.splitlines()
    assert lines[0] == f"published {world.out}/snapshots/00000001.json"
    assert "run.until: there was no time; left: 1 shard with 13 rows (" in lines[1]
    summary = json.loads(Path(world.out, "runs", "00000001.json").read_text())
    assert (summary["chunks_written"], summary["chunks_left"], summary["shards_left"]) == (3, 2, 1)
    # What is committed of the third shard is no orphan, and no prune takes it.
    assert verify(world.out).problems == ()
    assert world.prune().result.files == 0
    world.look()
    second = run(world, code=0)
    assert second.result.summary.chunks_written == 2
    assert visible(world) == {"new": 6, "next": 6, "old": 22}
    snapshot = newest_snapshot(world.out)
    assert snapshot is not None
    assert snapshot.left == ()
    assert world.prune().result.files == 0
    assert verify(world.out).problems == ()
    # Now there is nothing to do, deadline or not.
    assert run(world, late=0, code=0).result.summary.chunks_written == 0


def test_shards_that_changed_keep_their_rows_until_they_are_whole(world: Dated) -> None:
    run(world, code=0)
    for name, rows in SHARDS.items():
        world.write(name, rows + 2, 2)
    world.write("in/new", 11, 3)
    # Two chunks and one make the newer shards whole; of the oldest, one of three is there.
    run(world, late=4)
    assert visible(world) == {"new": 10, "next": 8, "old": 22}
    snapshot = newest_snapshot(world.out)
    assert snapshot is not None
    ids = world.by_shard(snapshot)
    versions = {Path(url).stem: {one.split("-")[0] for one in found} for url, found in ids.items()}
    assert versions == {"new": {"3"}, "next": {"2"}, "old": {"1"}}
    assert [shard["complete"] for shard in snapshot.shards] == [True, True, False]
    assert verify(world.out).problems == ()
    world.prune()
    world.look()
    run(world, code=0)
    assert visible(world) == {"new": 10, "next": 8, "old": 24}


def test_nothing_is_published_before_a_shard_is_whole(world: Dated) -> None:
    (world.inputs / "in" / "new.parquet").unlink()
    (world.inputs / "in" / "next.parquet").unlink()
    ended = run(world, late=1)
    assert ended.result.summary.snapshot is None
    assert "nothing new was published: no shard is whole yet" in ended.result.verdict
    assert newest_snapshot(world.out) is None
    assert run(world, code=0).result.summary.chunks_written == 2


def test_a_run_that_had_no_time_at_all_leaves_everything(world: Dated) -> None:
    ended = run(world, late=0)
    assert (ended.result.summary.chunks_left, ended.result.summary.shards_left) == (5, 3)
    assert newest_snapshot(world.out) is None


def test_readers_of_another_recipe_keep_it_until_no_shard_is_left(world: Dated) -> None:
    run(world, code=0)
    before = world.rows(read_snapshot(world.out, 1))
    world.fingerprint = "e" * 64
    for night in (2, 3):
        ended = run(world, late=2, new_fingerprint=True)
        assert "readers stay with the recipe of snapshot" in ended.result.verdict
        shown = newest_snapshot(world.out)
        assert shown is not None
        assert (shown.epoch, shown.fingerprint, shown.original) == (2 * night - 2, "f" * 64, 1)
        assert world.rows(shown) == before
        # The new recipe's files are kept for the next night.
        assert world.prune().result.files == 0
        assert verify(world.out).problems == ()
    assert run(world, code=0, new_fingerprint=True).result.summary.chunks_written == 1
    shown = newest_snapshot(world.out)
    assert shown is not None
    assert (shown.fingerprint, shown.left) == ("e" * 64, ())


def test_publish_partial_switches_readers_all_the_same(world: Dated) -> None:
    run(world, code=0)
    world.fingerprint = "e" * 64
    options = {"new_fingerprint": True, "publish_partial": True}
    ended = run(world, late=2, **options)
    assert "run.max_shrink: 14 rows would replace 37" in ended.result.verdict
    ended = world.run(Options(**options, allow_shrink=True), late=1)
    assert (ended.code, ended.result.summary.snapshot is not None) == (3, True)
    assert visible(world) == {"new": 6, "next": 6}


def test_fewer_rows_than_max_shrink_allows_are_not_published(world: Dated) -> None:
    """A shard is gone, and a larger one that is left would make up for it."""
    run(world, code=0)
    world.write("in/new", 7, 2)
    (world.inputs / "in" / "next.parquet").unlink()
    world.write("in/old", 40, 2)
    ended = run(world, late=1)
    said = "run.max_shrink: 30 rows would replace 37, allowed is a loss of at most 10% ("
    assert said in ended.result.verdict
    assert visible(world) == {"new": 6, "next": 6, "old": 22}
    run(world, code=0)
    assert visible(world) == {"new": 6, "old": 39}


def test_an_input_that_lists_short_is_a_fault_deadline_or_not(world: Dated) -> None:
    run(world, code=0)
    world.write("in/new", 7, 2)
    (world.inputs / "in" / "old.parquet").unlink()
    ended = run(world, late=0, code=1)
    [fault] = ended.result.faults
    assert "run.max_shrink: 14 rows would replace 37" in fault
    assert visible(world) == {"new": 6, "next": 6, "old": 22}
    ended = world.run(Options(allow_shrink=True), late=0)
    assert (ended.code, visible(world)) == (3, {"new": 6, "next": 6})


def test_faults_keep_a_snapshot_back_and_count_more(world: Dated) -> None:
    ended = world.run(Options(), late=2, fails=0)
    assert (ended.code, ended.result.summary.snapshot) == (1, None)
    assert [Path(one.shard).stem for one in ended.result.left] == ["old"]
    said = ended.result.verdict.splitlines()
    assert said[-1].startswith("run.until: there was no time; left: 1 shard with 23 rows (")
    ended = world.run(Options(publish_partial=True), late=1, fails=0)
    assert (ended.code, ended.result.summary.snapshot is not None) == (1, True)
    assert visible(world) == {"next": 6}


def test_what_is_made_again_keeps_its_file_until_it_is(world: Dated) -> None:
    run(world, code=0)
    ended = run(world, late=1, retry_quarantined=True)
    assert visible(world) == {"new": 6, "next": 6, "old": 22}
    assert {Path(one.shard).stem for one in ended.result.left} == {"next", "old"}
    assert verify(world.out).problems == ()
    run(world, code=0)


@pytest.mark.parametrize("how", ["die", "sleep"])
@pytest.mark.parametrize(
    "stride",
    [pytest.param(3, marks=pytest.mark.chaos), pytest.param(13, marks=pytest.mark.slow), 29],
)
def test_a_run_with_a_deadline_that_stops_at_any_moment_harms_nobody(
    how: str, stride: int, world: Dated
) -> None:
    run(world, code=0)
    for moment in range(2, 600, stride):
        world.write("in/new", 7, moment)
        world.write("in/old", 23, moment)
        first = world.run(Options(), late=2, stop_at=moment, how=how)
        world.look()
        world.prune()
        world.look()
        run(world, code=0)
        if how == "sleep" and first.asleep:
            assert world.wake(0).code in (0, 1, 3)
            world.look()
        if first.calls < moment:
            break
    else:
        pytest.fail("a run has more moments than this")


def test_a_snapshot_remembers_what_was_left(tmp_path: Path, any_out: str) -> None:
    """On the local disk and on S3: the files of a shard that was left count after a prune."""
    job_input = small_corpus(tmp_path)
    plan, snapshot = commit_left(job_input, any_out, epoch=1, skip="1.parquet")
    assert "left" not in _published(any_out, snapshot)
    part = replace(plan, left=plan.left[-3:-1])
    commit_chunks(part, job_input, any_out, epoch=1)
    folder = f"data/{'f' * 12}/"
    files = tuple(f"{folder}{chunk.name}" for chunk in part.left)
    left = (LeftShard(plan.left[-1].shard.url, 5, files),)
    with lease.held(lease.acquire(any_out, job="job")) as mine:
        document = _published(any_out, replace(snapshot, epoch=mine.epoch, left=left))
    assert document["left"][0]["files"] == [*files]
    found = newest_snapshot(any_out)
    assert found is not None
    assert found.left == left
    prune(any_out, keep=1, grace_seconds=0)
    # Of the shard that was left, the last of three chunks is to be done.
    listed = list_files(f"{any_out}/data")
    again = plan_of(job_input, listed=listed, served=newest_snapshot(any_out))
    assert [(chunk.shard.url, chunk.start) for chunk in again.left] == [(left[0].shard, 20)]


def test_a_list_of_what_was_left_leads_nowhere_else(tmp_path: Path, out: str) -> None:
    """Whoever may write to an output may edit it; prune keeps no file of another folder by it."""
    _, snapshot = commit_left(small_corpus(tmp_path), out, epoch=1)
    _published(out, replace(snapshot, left=(LeftShard("s", 5, ("../../home/thesis.parquet",)),)))
    with pytest.raises(OutputError, match="is not a place of embeddings in an output"):
        newest_snapshot(out)


def _published(out: str, snapshot: Snapshot) -> dict[str, Any]:
    publish(out, snapshot)
    document: dict[str, Any] = json.loads(read_bytes(f"{out}/snapshots/{snapshot.epoch:08d}.json"))
    return document


def test_a_deadline_that_is_past_is_refused_before_anything_is_looked_at(tmp_path: Path) -> None:
    sections = {
        "input": {"path": str(tmp_path / "nowhere"), "text": "t"},
        "encoder": {"model": str(tmp_path / "no model"), "templates": ["{text}"]},
        "output": {"path": str(tmp_path / "out")},
        "run": {"until": "2026-01-01T06:00+01:00"},
    }
    with pytest.raises(ConfigError, match=r"run\.until: got 2026-.*, which is past: it is 20"):
        plan_job(JobSource((Layer("job.yaml", sections),)))
