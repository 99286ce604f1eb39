"""Supervision: watch a run from the driver for progress, signals, stalls and its end."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from embedjob.errors import FaultError, InterruptedRunError, RefusedError
from embedjob.job.result import Tally
from embedjob.stages.chunk_state import describe

POLL_SECONDS = 0.5
LEASE_SECONDS = 10.0
DRAIN_SECONDS = 20.0
SETTLE_SECONDS = 5.0
_THREAD = "embedjob-pipeline"


@dataclass(frozen=True)
class Watch:
    """What the driver checks while the pipeline runs."""

    show: Callable[[Tally], None]
    superseded: Callable[[], str | None]
    stall_seconds: float


def supervise(work: Callable[[], None], ledger: Any, watch: Watch) -> None:
    """Run `work` to its end.

    Raises:
        RefusedError: no encoder could be loaded, or it is not the encoder that wrote this output.
        InterruptedRunError: SIGINT or SIGTERM came; what was in hand is committed.
        FaultError: the pipeline failed, stalled, lost its cluster, or another run took over.
    """
    try:
        _supervise(work, ledger, watch)
    except RayError as error:
        raise cluster_lost(error) from error


def cluster_lost(error: RayError) -> FaultError:
    """Return the fault of a run whose Ray cluster went away."""
    return FaultError(
        f"the Ray cluster no longer answers ({type(error).__name__}); finished chunks are"
        " committed; run again to resume"
    )


def _supervise(work: Callable[[], None], ledger: Any, watch: Watch) -> None:
    worker = _Worker(work)
    checked = time.monotonic()
    with _signals() as interrupted:
        worker.start()
        while worker.is_alive():
            worker.join(POLL_SECONDS)
            tally = ray.get(ledger.tally.remote())
            watch.show(tally)
            ending = _ending(tally, watch, interrupted)
            if ending is None and time.monotonic() - checked >= LEASE_SECONDS:
                checked = time.monotonic()
                taken = watch.superseded()
                ending = FaultError(taken) if taken else None
            if ending is not None:
                _drain(ledger, worker, str(ending))
                raise ending
    tally = ray.get(ledger.tally.remote())
    if tally.refusal:
        raise _refused(tally)
    if worker.error is not None:
        # Ray's message is the worker's whole traceback; its cause is the error itself.
        cause = getattr(worker.error, "cause", None) or worker.error
        raise FaultError(f"the pipeline failed: {describe(cause)}") from worker.error


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


def _ending(tally: Tally, watch: Watch, interrupted: list[str]) -> Exception | None:
    if tally.refusal:
        return _refused(tally)
    if interrupted:
        return InterruptedRunError(
            f"stopped by {interrupted[0]}; finished chunks are committed; run again to resume"
        )
    if tally.idle_seconds > watch.stall_seconds:
        return FaultError(
            f"run.stall_seconds: nothing moved for {watch.stall_seconds:g} s; run again to resume"
        )
    return None


def _refused(tally: Tally) -> Exception:
    """Return a refusal, or a fault if another encoder has written: only this one failed."""
    return (FaultError if tally.chunks else RefusedError)(tally.refusal)


def _drain(ledger: Any, worker: threading.Thread, reason: str) -> None:
    """Let finished chunks reach storage; encoders abandon what they hold within seconds."""
    ray.get(ledger.stop.remote(reason))
    deadline = time.monotonic() + DRAIN_SECONDS
    while worker.is_alive() and time.monotonic() < deadline:
        if not ray.get(ledger.tally.remote()).in_hand:
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
