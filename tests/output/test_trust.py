"""Readers see one whole corpus when a process dies or sleeps or a file is lost; exit 0 means it.

Covers: embedjob.pipeline
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from embedjob.input import listing
from embedjob.input.decoders import DecodesFooters
from embedjob.input.footers import Footer
from embedjob.job.options import Options
from embedjob.output.snapshot import newest_snapshot
from embedjob.storage.objects import Stored, list_files
from tests.output.worlds import Operation, World

# One moment in three in `slow`, and one in eleven otherwise; all were tried when this was written.
STRIDES = pytest.mark.parametrize("stride", [pytest.param(3, marks=pytest.mark.slow), 11])
STOPS = st.none() | st.integers(1, 60)
WAYS = st.sampled_from(["die", "sleep"])
SHARDS = st.sampled_from(["in/a", "in/b", "in/c"])


class Output(RuleBasedStateMachine):
    """One output over nights on which everything happens that may happen to it."""

    reuses = False

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.world = World(Path(self._folder.name), reuses=self.reuses)
        self._running = self.world.running()
        self._running.__enter__()
        self.versions = 0

    @initialize()
    def begin(self) -> None:
        self.write("in/a", 12)
        self.write("in/b", 7)
        self.write("other/z", 3)

    @rule(name=SHARDS, rows=st.sampled_from([0, 4, 12, 23]))
    def write(self, name: str, rows: int) -> None:
        self.versions += 1
        self.world.write(name, rows, self.versions)

    @rule(name=SHARDS)
    def remove(self, name: str) -> None:
        others = {path.stem for path in (self.world.inputs / "in").iterdir()} - {name[-1]}
        if others:
            (self.world.inputs / f"{name}.parquet").unlink(missing_ok=True)

    @rule(
        stop_at=STOPS,
        how=WAYS,
        fails=st.none() | st.integers(0, 3),
        late=st.none() | st.integers(0, 4),
        options=st.builds(
            Options,
            publish_partial=st.booleans(),
            repair=st.booleans(),
            retry_quarantined=st.booleans(),
            allow_shrink=st.booleans(),
        ),
    )
    def run(
        self,
        stop_at: int | None,
        how: str,
        fails: int | None,
        late: int | None,
        options: Options,
    ) -> None:
        before = newest_snapshot(self.world.out)
        ended = self.world.run(options, stop_at=stop_at, how=how, fails=fails, late=late)
        self._ended(ended)
        if ended.code == 3:
            self.world.check_deadline(ended, before)

    @precondition(lambda self: newest_snapshot(self.world.out) is not None)
    @rule()
    def another_job(self) -> None:
        """The same recipe over another input, by mistake."""
        before = newest_snapshot(self.world.out)
        assert self.world.run(Options(), input="other").code == 2, "another input was taken"
        assert newest_snapshot(self.world.out) == before

    @precondition(lambda self: newest_snapshot(self.world.out) is not None)
    @rule(stop_at=STOPS, how=WAYS, keep=st.integers(1, 2))
    def prune(self, stop_at: int | None, how: str, keep: int) -> None:
        self.world.prune(keep=keep, stop_at=stop_at, how=how)

    @precondition(lambda self: self.world.sleeping)
    @rule(data=st.data())
    def wake(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.world.sleeping) - 1))
        self._ended(self.world.wake(number))

    @precondition(lambda self: not self.world.sleeping)
    @rule()
    def leases_are_tidied_up(self) -> None:
        for path in Path(self.world.out, "leases").glob("*.json"):
            path.unlink()

    @precondition(lambda self: newest_snapshot(self.world.out) is not None)
    @rule(data=st.data())
    def a_file_is_lost(self, data: st.DataObject) -> None:
        snapshot = newest_snapshot(self.world.out)
        assert snapshot is not None
        if len(snapshot.files):
            number = data.draw(st.integers(0, len(snapshot.files) - 1))
            Path(self.world.out, snapshot.files[number].path).unlink(missing_ok=True)
            self.world.spoiled = snapshot.epoch

    @invariant()
    def readers_read_what_was_published(self) -> None:
        self.world.look()

    def teardown(self) -> None:
        """However it went, a plain run with everything allowed puts it right."""
        try:
            if self.versions:
                ended = self.world.run(Options(allow_shrink=True, new_input=True))
                assert ended.code == 0, ended.error
                self.world.look()
                self.world.check_success(ended)
        finally:
            self._running.__exit__(None, None, None)
            self._folder.cleanup()

    def _ended(self, operation: Operation) -> None:
        if operation.code == 0:
            self.world.check_success(operation)


class ReusingOutput(Output):
    """The same where texts come again, and every run takes over the vectors that are there.

    Each row has the vector of its text, and no text is embedded that had one in a snapshot.
    """

    reuses = True


def _settings(**given: Any) -> settings:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(deadline=None, suppress_health_check=checks, **given)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Two shards of three and of one chunk, and an input of another job."""
    with World(tmp_path).running() as made:
        made.write("in/a", 23, 1)
        made.write("in/b", 7, 1)
        made.write("other/z", 3, 1)
        yield made


def _run(world: World, **options: bool) -> None:
    """A run to its end, which readers see."""
    ended = world.run(Options(**options))
    assert ended.code == 0, ended.error or ended.result
    world.look()
    world.check_success(ended)


@STRIDES
@pytest.mark.parametrize("how", ["die", "sleep"])
def test_a_run_that_stops_at_any_moment_is_followed_by_one_that_ends_well(
    how: str, stride: int, world: World
) -> None:
    """It sleeps until the next run is over: what it does then harms nobody."""
    for moment in range(1, 600, stride):
        world.write("in/a", 23, moment)
        first = world.run(Options(), stop_at=moment, how=how)
        world.look()
        if first.calls < moment:
            break
        _run(world)
        if how == "sleep":
            assert world.wake(0).code in (0, 1)
            world.look()
    else:
        pytest.fail("a run has more moments than this")


@STRIDES
@pytest.mark.parametrize("how", ["die", "sleep"])
def test_a_prune_that_stops_at_any_moment_takes_nothing_that_readers_see(
    how: str, stride: int, world: World
) -> None:
    """A run whose files no snapshot names yet went before it; the next run may count on some."""
    for moment in range(1, 600, stride):
        _run(world)
        world.write("in/b", 7, moment)
        world.write("in/a", 23, moment)
        world.run(Options(), stop_at=60, how="die")
        first = world.prune(stop_at=moment, how=how)
        world.look()
        _run(world)
        if how == "sleep" and first.asleep:
            world.wake(0)
            world.look()
        if first.calls < moment:
            break
        # Or the next prune would have more to read, and so more moments.
        world.prune()
        world.look()
    else:
        pytest.fail("a prune has more moments than this")


def test_a_run_that_published_late_is_never_what_readers_see(world: World) -> None:
    """Asleep just before its head is put; a prune meanwhile takes the files that it lists."""
    _run(world)
    world.write("in/b", 9, 2)
    moments = world.run(Options(), stop_at=10**6).calls
    for moment in range(moments - 12, moments):
        world.write("in/b", 9, moment)
        late = world.run(Options(), stop_at=moment)
        if not late.asleep:
            continue
        world.prune()
        world.look()
        woken = world.wake(0)
        world.look()
        # It may have published before the prune, which then keeps its list.
        if woken.code == 0:
            world.check_success(woken)
        _run(world)


def test_another_job_does_not_replace_the_corpus(world: World) -> None:
    _run(world)
    before = newest_snapshot(world.out)
    ended = world.run(Options(), input="other")
    assert ended.code == 2
    assert "--new-input" in str(ended.error)
    assert newest_snapshot(world.out) == before
    assert world.run(Options(new_input=True), input="other").code == 0
    assert world.run(Options()).code == 2


def test_an_input_that_lists_short_is_not_published(world: World) -> None:
    _run(world)
    before = newest_snapshot(world.out)
    (world.inputs / "in" / "a.parquet").unlink()
    ended = world.run(Options(publish_partial=True))
    assert ended.code == 1
    [fault] = ended.result.faults
    assert (
        "run.max_shrink: 7 rows would replace 30, allowed is a loss of at most 10%; gone from the"
        " input: 1 shard. "
    ) in fault
    summary = ended.result.summary
    assert (summary.rows_before, summary.shards_removed, summary.snapshot) == (30, 1, None)
    assert newest_snapshot(world.out) == before
    _run(world, allow_shrink=True)


def test_leases_that_were_tidied_up_do_not_hide_a_run(world: World) -> None:
    _run(world)
    for path in Path(world.out, "leases").glob("*.json"):
        path.unlink()
    world.write("in/b", 9, 2)
    _run(world)


@STRIDES
@pytest.mark.parametrize("option", ["repair", "retry_quarantined"])
def test_a_crash_at_any_moment_of_making_again_is_healed_by_a_plain_run(
    option: str, stride: int, world: World
) -> None:
    _run(world)
    for moment in range(1, 600, stride):
        first = world.run(Options(**{option: True}), stop_at=moment, how="die")
        world.look()
        _run(world)
        if first.calls < moment:
            break
    else:
        pytest.fail("a run has more moments than this")


def test_a_partial_snapshot_lists_nothing_that_is_gone(world: World) -> None:
    """An unfinished shard keeps the served files that are still there."""
    _run(world)
    served = newest_snapshot(world.out)
    assert served is not None
    lost = next(file for file in served.files if file.shard.endswith("a.parquet"))
    Path(world.out, lost.path).unlink()
    ended = world.run(Options(publish_partial=True, allow_shrink=True), fails=0)
    assert (ended.code, ended.result.summary.snapshot is not None) == (1, True)
    world.look()
    _run(world)


def test_what_is_made_again_takes_nothing_from_older_snapshots(world: World) -> None:
    """Chunks with quarantined rows of shards that are no longer there are left alone."""
    _run(world)
    first = newest_snapshot(world.out)
    assert first is not None
    world.write("in/a", 23, 2)
    _run(world, retry_quarantined=True)
    files = {file.url: file.etag for file in list_files(f"{world.out}/data")}
    assert {f"{world.out}/{file.path}": file.etag for file in first.files}.items() <= files.items()


def test_an_unchanged_input_is_not_opened_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(world)
    world.write("in/b", 9, 2)
    opened: list[str] = []
    read = listing.read_batch

    def read_batch(files: Sequence[Stored], decode: DecodesFooters) -> dict[str, Footer | str]:
        opened.extend(file.name for file in files)
        return read(files, decode)

    monkeypatch.setattr(listing, "read_batch", read_batch)
    _run(world)
    assert opened == ["b.parquet"]
    _run(world)
    assert opened == ["b.parquet"]


def test_any_history_leaves_readers_a_whole_corpus() -> None:
    run_state_machine_as_test(Output, settings=_settings(max_examples=15, stateful_step_count=12))


@pytest.mark.slow
def test_any_long_history_leaves_readers_a_whole_corpus() -> None:
    run_state_machine_as_test(Output, settings=_settings(max_examples=100, stateful_step_count=25))


def test_any_history_gives_each_row_the_vector_of_its_text_and_embeds_none_twice() -> None:
    given = _settings(max_examples=8, stateful_step_count=12)
    run_state_machine_as_test(ReusingOutput, settings=given)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_any_long_history_embeds_no_text_twice() -> None:
    given = _settings(max_examples=60, stateful_step_count=25)
    run_state_machine_as_test(ReusingOutput, settings=given)
