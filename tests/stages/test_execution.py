import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from embedjob.errors import FaultError, InterruptedRunError, RefusedError
from embedjob.job.result import Tally
from embedjob.stages import execution
from embedjob.stages.execution import Watch, supervise
from embedjob.stages.ledger import new_ledger
from embedjob.storage.retrying import hurry

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("joined")]


@pytest.fixture
def ledger() -> Any:
    return new_ledger()


def watch(
    *, superseded: Callable[[], str | None] = lambda: None, stall_seconds: float = 60
) -> Watch:
    return Watch(lambda tally: None, superseded, stall_seconds)


def until_stopped(ledger: Any) -> Callable[[], None]:
    """Work that goes on until the run is asked to stop."""

    def work() -> None:
        while not ray.get(ledger.present.remote()):
            time.sleep(0.05)

    return work


@pytest.fixture(autouse=True)
def _unhurried() -> Iterator[None]:
    """A signal is the end of a process: from then on its storage waits for nothing."""
    yield
    hurry(0.0)


def test_work_runs_to_its_end_and_is_shown(ledger: Any) -> None:
    tallies: list[Tally] = []

    def work() -> None:
        ray.get(ledger.progress.remote("a", 4, 40))
        time.sleep(2 * execution.POLL_SECONDS)

    supervise(work, ledger, Watch(tallies.append, lambda: None, 60))
    assert (tallies[-1].rows, tallies[-1].tokens) == (4, 40)


def test_work_that_breaks_is_a_fault_with_its_cause_and_no_traceback(ledger: Any) -> None:
    @ray.remote(num_cpus=0, max_retries=0)
    def task() -> None:
        raise ValueError("a bad thing")

    with pytest.raises(FaultError) as caught:
        supervise(lambda: ray.get(task.remote()), ledger, watch())
    assert str(caught.value) == "the pipeline failed: ValueError: a bad thing"


def test_a_refusal_of_an_encoder_stops_the_work(ledger: Any) -> None:
    ray.get(ledger.refuse.remote("the encoder did not load: no weights"))
    with pytest.raises(RefusedError, match="no weights"):
        supervise(until_stopped(ledger), ledger, watch())


def test_a_refusal_counts_although_the_work_ended_first(ledger: Any) -> None:
    def work() -> None:
        ray.get(ledger.refuse.remote("not the model of then"))

    with pytest.raises(RefusedError, match="not the model of then"):
        supervise(work, ledger, watch())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_work_end_and_puts_the_handlers_back(
    ledger: Any, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    threading.Timer(1.0, os.kill, (os.getpid(), number)).start()
    with pytest.raises(InterruptedRunError, match=f"stopped by {number.name}"):
        supervise(until_stopped(ledger), ledger, watch())
    assert number.name in ray.get(ledger.stopping.remote())
    assert signal.getsignal(number) is before


def test_chunks_in_hand_are_waited_for(ledger: Any) -> None:
    ray.get(ledger.begin.remote("encode", "a", "node"))
    put: list[str] = []

    def work() -> None:
        until_stopped(ledger)()
        time.sleep(3 * execution.POLL_SECONDS)
        put.append("a")
        ray.get(ledger.abandon.remote("a"))

    with pytest.raises(FaultError):
        supervise(work, ledger, watch(stall_seconds=0.1))
    assert put == ["a"]


def test_nothing_that_moves_is_a_stall(ledger: Any) -> None:
    with pytest.raises(FaultError, match=r"run.stall_seconds: nothing moved for 1 s"):
        supervise(until_stopped(ledger), ledger, watch(stall_seconds=1))


def test_a_run_that_was_taken_over_ends(ledger: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "LEASE_SECONDS", 0.0)
    with pytest.raises(FaultError, match="another run took OUT over"):
        supervise(
            until_stopped(ledger), ledger, watch(superseded=lambda: "another run took OUT over")
        )


def test_a_run_that_is_out_of_time_puts_what_it_has_and_says_why(ledger: Any) -> None:
    until = time.time() + 1.0
    soon = Watch(lambda tally: None, lambda: None, 60, until)
    assert "no encoder was ready in time" in (supervise(until_stopped(ledger), ledger, soon) or "")
    assert ray.get(ledger.stopping.remote())
    assert time.time() - until < 10


def test_work_that_ends_in_time_and_work_that_was_not_begun(ledger: Any) -> None:
    later = Watch(lambda tally: None, lambda: None, 60, time.time() + 60)
    assert supervise(lambda: None, ledger, later) is None
    past = new_ledger(until=time.time() - 1)
    ray.get(past.ready.remote("an actor"))

    def work() -> None:
        assert ray.get(past.begin.remote("encode", "a", "node")) is None

    assert "no chunk could be done in time" in (supervise(work, past, later) or "")


def test_a_signal_after_the_deadline_is_a_signal(ledger: Any) -> None:
    def work() -> None:
        until_stopped(ledger)()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.0)

    over = Watch(lambda tally: None, lambda: None, 60, time.time())
    with pytest.raises(InterruptedRunError, match="stopped by SIGTERM"):
        supervise(work, ledger, over)


def test_a_ledger_that_is_gone_ends_the_run_in_one_sentence(ledger: Any) -> None:
    seen = threading.Event()

    def work() -> None:
        ray.kill(ledger)
        seen.wait(60)

    with pytest.raises(FaultError, match="the Ray cluster no longer answers"):
        supervise(work, ledger, watch())
    # Ray is left running under work that goes on, so that it cannot end the process with its code.
    assert execution.is_unfinished()
    seen.set()
    deadline = time.monotonic() + 30
    while execution.is_unfinished() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not execution.is_unfinished()


@pytest.fixture
def hung_ledger(ledger: Any) -> Iterator[Any]:
    """A ledger whose process is there and answers nothing."""
    pid = ray.get(ledger.__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, signal.SIGSTOP)
    try:
        yield ledger
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_ledger_that_hangs_ends_the_run_in_bounded_time(
    hung_ledger: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "LEDGER_SILENT_SECONDS", 2.0)
    monkeypatch.setattr(execution, "DRAIN_SECONDS", 1.0)
    over, started = threading.Event(), time.monotonic()
    with pytest.raises(FaultError, match="ledger, a process on this node, has not answered"):
        supervise(lambda: over.wait(300) and None, hung_ledger, watch())
    over.set()
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_a_signal_ends_a_run_whose_ledger_and_storage_hang(hung_ledger: Any) -> None:
    """The promise is 30 s, of which the driver needs some for its last puts."""
    over = threading.Event()
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    started = time.monotonic()
    with pytest.raises(InterruptedRunError, match="stopped by SIGTERM"):
        supervise(
            lambda: over.wait(300) and None,
            hung_ledger,
            watch(superseded=lambda: over.wait(300) and None),
        )
    assert time.monotonic() - started < 26
    over.set()
