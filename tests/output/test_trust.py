"""Whatever dies, sleeps or is lost: readers see one whole corpus, and exit 0 means it.

Covers: embedjob.pipeline
"""

import tempfile
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

from embedjob.job.options import Options
from embedjob.output.cleanup import prune
from embedjob.output.snapshot import newest
from tests.output.worlds import Operation, World

STOPS = st.none() | st.integers(1, 60)
WAYS = st.sampled_from(["die", "sleep"])
SHARDS = st.sampled_from(["in/a", "in/b", "in/c"])


class Output(RuleBasedStateMachine):
    """One output over nights on which everything happens that may happen to it."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.world = World(Path(self._folder.name))
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
        options=st.builds(
            Options,
            publish_partial=st.booleans(),
            repair=st.booleans(),
            retry_quarantined=st.booleans(),
            allow_shrink=st.booleans(),
        ),
    )
    def run(self, stop_at: int | None, how: str, fails: int | None, options: Options) -> None:
        work = lambda: self.world.run(options, fails=fails)  # noqa: E731 - it is what a process does
        self._ended(self.world.operate(work, stop_at, how))

    @precondition(lambda self: newest(self.world.out) is not None)
    @rule()
    def another_job(self) -> None:
        """The same recipe over another input, by mistake."""
        before = newest(self.world.out)
        ended = self.world.operate(lambda: self.world.run(Options(), name="other"), None, "die")
        assert ended.result == 2, "another input was taken"
        assert newest(self.world.out) == before

    @precondition(lambda self: newest(self.world.out) is not None)
    @rule(stop_at=STOPS, how=WAYS, keep=st.integers(1, 2))
    def prune(self, stop_at: int | None, how: str, keep: int) -> None:
        work = lambda: prune(self.world.out, keep=keep, grace_seconds=0)  # noqa: E731 - as above
        self.world.operate(work, stop_at, how)

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

    @precondition(lambda self: newest(self.world.out) is not None)
    @rule(data=st.data())
    def a_file_is_lost(self, data: st.DataObject) -> None:
        snapshot = newest(self.world.out)
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
                options = Options(allow_shrink=True, new_input=True)
                ended = self.world.operate(lambda: self.world.run(options), None, "die")
                assert ended.result == 0, ended.error
                self.world.look()
                self.world.check_success(ended)
        finally:
            self._running.__exit__(None, None, None)
            self._folder.cleanup()

    def _ended(self, operation: Operation) -> None:
        if operation.result == 0:
            self.world.check_success(operation)


def _settings(**given: Any) -> settings:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(deadline=None, suppress_health_check=checks, **given)


def test_any_history_leaves_readers_a_whole_corpus() -> None:
    run_state_machine_as_test(Output, settings=_settings(max_examples=30, stateful_step_count=15))


@pytest.mark.slow
def test_any_long_history_leaves_readers_a_whole_corpus() -> None:
    run_state_machine_as_test(Output, settings=_settings(max_examples=600, stateful_step_count=30))
