"""This process's connection to a Ray cluster, kept from one run to the next.

Runs that share it share workers, which import Ray Data and embedjob once.
"""

import time
from contextlib import ExitStack

import ray

from embedjob.stages.connection import connected
from embedjob.stages.execution import is_unfinished

# Nobody listens there: a run that starts there has failed to see that it has nothing to do.
NOWHERE = "127.0.0.1:1"
SECONDS_TO_END = 60.0
_joined = ExitStack()
_kept: set[str] = set()


def keep(address: str) -> None:
    """Stay joined to this cluster after a run there."""
    _kept.add(address)


def join_for(address: str | None) -> None:
    """Join a cluster that is kept, or leave what is joined unless nobody is to be asked at all."""
    _end_what_was_cut_off()
    if address != NOWHERE and not (ray.is_initialized() and address == _address()):
        leave()
    if address in _kept and not ray.is_initialized():
        _joined.enter_context(connected(address))


def leave() -> None:
    """Leave the cluster that this process has joined, whoever joined it."""
    _end_what_was_cut_off()
    _joined.close()
    if ray.is_initialized() and not is_unfinished():
        ray.shutdown()


def _address() -> str:
    address: str = ray.get_runtime_context().gcs_address
    return address


def _end_what_was_cut_off() -> None:
    """Let the pipeline of a test that ran out of time end, or every later run would fail for it."""
    deadline = time.monotonic() + SECONDS_TO_END
    while is_unfinished() and time.monotonic() < deadline:
        time.sleep(0.1)
