"""Supervision: watch a run from the driver for progress, signals, stalls and its end."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from embedjob.errors import FaultError, InterruptedRunError, RefusedError
from embedjob.job.result import Tally
from embedjob.stages.chunk_state import describe
from embedjob.storage.retrying import hurry

POLL_SECONDS = 0.5
LEASE_SECONDS = 10.0
# A run ends so soon after a signal: the longest wait for one answer of the ledger, the drain, and
# the time in which Ray Data may come to its end, with some seconds left for the last puts.
END_SECONDS = 30.0
TALLY_SECONDS = 3.0
DRAIN_SECONDS = 15.0
SETTLE_SECONDS = 4.0
# A ledger that is silent for so long is lost; on a busy node, answers take seconds.
LEDGER_SILENT_SECONDS = 60.0
# Without any encoder a run waits for machines, or for a model to be fetched, and not for ever.
ABSENT_STALLS = 8
_THREAD = "embedjob-pipeline"


@dataclass(frozen=True)
class Watch:
    """What the driver checks while the pipeline runs; `until` is in seconds since 1970."""

    show: Callable[[Tally], None]
    superseded: Callable[[], str | None]
    stall_seconds: float
    until: float = math.inf


def supervise(work: Callable[[], None], ledger: Any, watch: Watch) -> str | None:
    """Run `work` to its end, or to the deadline; return why chunks may be left, if it was that.

    Raises:
        RefusedError: no encoder could be loaded, or it is not the encoder that wrote this output.
        InterruptedRunError: SIGINT or SIGTERM came; what was in hand is committed.
        FaultError: the pipeline failed, stalled, lost its cluster, or another run took over.
    """
    try:
        return _supervise(work, ledger, watch)
    except _OutOfTime as late:
        return str(late)
    except RayError as error:
        raise cluster_lost(error) from error


def cluster_lost(error: RayError) -> FaultError:
    """Return the fault of a run whose Ray cluster went away."""
    return FaultError(
        f"the Ray cluster no longer answers ({type(error).__name__}); finished chunks are"
        " committed; run again to resume"
    )


def _supervise(work: Callable[[], None], ledger: Any, watch: Watch) -> str | None:
    worker, counts, lease = _Worker(work), _Counts(ledger), _LeaseLook(watch.superseded)
    with _signals() as interrupted, lease:
        worker.start()
        while worker.is_alive():
            worker.join(POLL_SECONDS)
            tally = counts.tally()
            if tally is not None:
                watch.show(tally)
            ending = _ending(tally, watch, interrupted)
            ending = ending or counts.lost or lease.lost
            if ending is not None:
                _drain(ledger, worker, counts, str(ending))
                raise _settled(ending, interrupted, counts.last)
        while (tally := counts.tally()) is None:
            if (lost := counts.lost) or interrupted:
                raise lost or _interruption(interrupted)
    if tally.refusal:
        raise _refused(tally)
    if worker.error is not None:
        # Ray's message is the worker's whole traceback; its cause is the error itself.
        cause = getattr(worker.error, "cause", None) or worker.error
        raise FaultError(f"the pipeline failed: {describe(cause)}") from worker.error
    return why_late(tally) if tally.late else None


class _OutOfTime(Exception):
    """The deadline has come, and chunks are left."""


def _settled(ending: Exception, interrupted: list[str], last: Tally | None) -> Exception:
    """Return how a run ends that has put what it had: by a signal that came meanwhile, if late."""
    if not isinstance(ending, _OutOfTime):
        return ending
    return _interruption(interrupted) if interrupted else _OutOfTime(why_late(last))


def why_late(tally: Tally | None) -> str:
    """Return what kept chunks from being done before the deadline."""
    if tally is None or not tally.actors:
        return "no encoder was ready in time (give the run more time than its start takes)"
    if not tally.chunks:
        return "no chunk could be done in time (give the run more time, or its chunks fewer rows)"
    return "there was no time for more"


class _Counts:
    """The ledger's tally, waited for no longer than a run may take to end: its process may hang."""

    def __init__(self, ledger: Any) -> None:
        self._ledger = ledger
        self._asked: Any = None
        self._answered = time.monotonic()
        self.last: Tally | None = None

    def tally(self, seconds: float = TALLY_SECONDS) -> Tally | None:
        """Return the state of the run; None where the ledger does not answer in time."""
        self._asked = self._asked or self._ledger.tally.remote()
        try:
            tally: Tally = ray.get(self._asked, timeout=seconds)
        except GetTimeoutError:
            return None
        self._asked, self._answered, self.last = None, time.monotonic(), tally
        return tally

    @property
    def lost(self) -> FaultError | None:
        """The fault of a run whose ledger has been silent for too long."""
        if time.monotonic() - self._answered < LEDGER_SILENT_SECONDS:
            return None
        return FaultError(
            "the run's ledger, a process on this node, has not answered for"
            f" {LEDGER_SILENT_SECONDS:g} s; finished chunks are committed; run again to resume"
        )


class _LeaseLook(threading.Thread):
    """Looks at the lease beside the main thread: storage may take minutes to answer."""

    def __init__(self, superseded: Callable[[], str | None]) -> None:
        super().__init__(name="embedjob-lease-look", daemon=True)
        self._superseded = superseded
        self._over = threading.Event()
        self.lost: FaultError | None = None

    def run(self) -> None:
        """Look until the run is over, or another run has taken its output."""
        while self.lost is None and not self._over.wait(LEASE_SECONDS):
            taken = self._superseded()
            self.lost = FaultError(taken) if taken else None

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()


class _Worker(threading.Thread):
    """Runs Ray Data's blocking call beside the main thread, which alone can receive signals."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(name=_THREAD, daemon=True)
        self._work = work
        self.error: Exception | None = None

    def run(self) -> None:
        """Run the pipeline and keep the error that it raises."""
        try:
            self._work()
        except Exception as error:
            self.error = error


def _ending(tally: Tally | None, watch: Watch, interrupted: list[str]) -> Exception | None:
    """Return what ends the run now; a ledger that does not answer hides no signal."""
    if tally is not None and tally.refusal:
        return _refused(tally)
    if interrupted:
        return _interruption(interrupted)
    if tally is not None and tally.idle_seconds > watch.stall_seconds:
        return FaultError(
            f"run.stall_seconds: nothing moved for {watch.stall_seconds:g} s; run again to resume"
        )
    if tally is not None and tally.absent_seconds > ABSENT_STALLS * watch.stall_seconds:
        return FaultError(
            f"pool: no encoder was there for {tally.absent_seconds:.0f} s, {ABSENT_STALLS} times"
            " run.stall_seconds; run again to resume once the cluster has machines for them"
        )
    return _OutOfTime("run.until") if time.time() >= watch.until else None


def _interruption(signals: list[str]) -> InterruptedRunError:
    # The last puts of this process wait for no storage that is in trouble.
    hurry(END_SECONDS)
    return InterruptedRunError(
        f"stopped by {signals[0]}; finished chunks are committed; run again to resume"
    )


def _refused(tally: Tally) -> Exception:
    """Return a refusal, or a fault if another encoder has written: only this one failed."""
    return (FaultError if tally.chunks else RefusedError)(tally.refusal)


def _drain(ledger: Any, worker: threading.Thread, counts: _Counts, reason: str) -> None:
    """Let finished chunks reach storage; encoders abandon what they hold within seconds."""
    ledger.stop.remote(reason)
    deadline = time.monotonic() + DRAIN_SECONDS
    while worker.is_alive() and (left := deadline - time.monotonic()) > 0:
        tally = counts.tally(min(TALLY_SECONDS, left))
        if tally is not None and not tally.in_hand:
            break
        time.sleep(POLL_SECONDS)
    # Ray Data now only waits for each task to report that nothing is left to do.
    worker.join(SETTLE_SECONDS)


def is_unfinished() -> bool:
    """Return whether Ray Data still works in this process although the run has ended."""
    return any(thread.name == _THREAD for thread in threading.enumerate())


@contextmanager
def _signals() -> Iterator[list[str]]:
    """Yield the names of the signals as they arrive; a third signal ends the wait at once."""
    received: list[str] = []

    def note(number: int, _frame: object) -> None:
        received.append(signal.Signals(number).name)
        if len(received) > 2:
            raise KeyboardInterrupt

    wanted = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in wanted}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
