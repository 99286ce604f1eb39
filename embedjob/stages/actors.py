"""Actors that host a model: how one loads, and what it does where the model or its device fails."""

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import ray

from embedjob.errors import AccessError, DeviceLostError, RefusedError
from embedjob.stages.chunk_state import describe

LOAD_PAUSE = 5.0
_Model = TypeVar("_Model")


def load_or_stop(load: Callable[[], _Model], ledger: Any, *, what: str) -> _Model | None:
    """Return the model that `load` gives; None where it does not load and the run stops for it.

    On a node that may be bad while another is good, this process ends, and another one is started.
    `what` is the model for people.
    """
    # A constructor that raises would end the run with a traceback: a model that does not load is
    # reported to the driver, and the run stops by itself.
    try:
        return load()
    except Exception as error:
        reason = f"the {what} did not load: {describe(error)}"
        # The nodes that were there at first have access: a node that joined late may lack it.
        if isinstance(error, RefusedError) and not isinstance(error, AccessError):
            ray.get(ledger.refuse.remote(reason))
        else:
            _failed_to_load(reason, ledger)
        return None


def _failed_to_load(reason: str, ledger: Any) -> None:
    """Return if this stops the run; else end this process, for another one to be started."""
    node = ray.get_runtime_context().get_node_id()
    alone = sum(known["Alive"] for known in ray.nodes()) == 1
    if ray.get(ledger.failed_to_load.remote(reason, node, alone=alone)):
        return
    # A bad node would fail again and again while a good one still loads.
    time.sleep(LOAD_PAUSE)
    exit_process(reason)


def end_lost_device(ledger: Any, key: str, error: DeviceLostError) -> NoReturn:
    """Note that a device was lost with a chunk, and end this process.

    This actor would take chunk after chunk and fail them all. The attempt is counted, and Ray runs
    it again in a new process.
    """
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
    ray.get(ledger.lost.remote(key, f"GPU {gpu} of node {socket.gethostname()}"))
    exit_process(f"{key}: {error}")


def exit_process(reason: str) -> NoReturn:
    """End this process; Ray starts another, perhaps on a better node."""
    sys.stderr.write(f"{reason}\n")
    sys.stderr.flush()
    os._exit(1)


def watch(stopping: threading.Event, why: Callable[[], str | None]) -> None:
    """Set the event once `why` gives a reason to stop; asked every second, in a thread."""

    def look() -> None:
        while not stopping.is_set():
            if why():
                stopping.set()
            time.sleep(1.0)

    threading.Thread(target=look, daemon=True).start()


@contextmanager
def logged_warnings() -> Iterator[list[str]]:
    """Collect embedjob's logged warnings, such as that a model is encoded in a slower way."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("embedjob")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
