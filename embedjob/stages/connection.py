"""The driver's connection to Ray: one that the process has already, or its own for one run."""

import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray._private import auto_init_hook, worker
from ray._private.services import canonicalize_bootstrap_address, find_bootstrap_address
from ray.data import DataContext

from embedjob.errors import ResourceError, in_one_line
from embedjob.stages.execution import is_unfinished

CONNECT_SECONDS = 10.0


@contextmanager
def connected(address: str | None) -> Iterator[bool]:
    """Give Ray to a run, set up for its chunks; yield whether it was started here, for the run.

    A Ray that this process has joined before serves the run and stays joined. Otherwise Ray is
    joined at `address`, or where RAY_ADDRESS says, or started here, and left at the end.

    Raises:
        ResourceError: no cluster answers there, or this process has joined another one.
    """
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # An actor of its own, two seconds of a core, only to report to Ray's makers what was run.
    os.environ.setdefault("RAY_DATA_USAGE_DISABLED", "1")
    if ray.is_initialized():
        _require_joined(address)
        with _chunk_context():
            yield False
        return
    # `local` in place of None: with None, Ray joins the last Ray of this machine, even a dead one.
    place = address or os.environ.get("RAY_ADDRESS") or "local"
    _join(place)
    try:
        with _chunk_context():
            yield place == "local"
    finally:
        # Under a thread that still talks to it, Ray's core ends the process with a code of its own;
        # the end of the process ends what Ray runs for it, too.
        if not is_unfinished():
            _leave()


@contextmanager
def _chunk_context() -> Iterator[None]:
    """Set up Ray Data for chunks: the datasets that are made inside keep these settings."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    # A parcel is one block of one row. Ray never splits a row, and at this size it joins no two
    # blocks that one task yields: each parcel travels on as soon as it is read.
    context.target_max_block_size = 1
    with DataContext.current(context):
        yield


def _join(place: str) -> None:
    _require_answer(place)
    # Every actor pool of Ray Data makes the driver's core print a warning about itself as an error.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Once this Ray is left, what still runs of an interrupted pipeline would start another one.
    auto_init_hook.enable_auto_connect = False
    on_terminate = signal.getsignal(signal.SIGTERM)
    # A Ray that lives for one run needs no dashboard, which takes seconds to start.
    mine: dict[str, Any] = {"include_dashboard": False} if place == "local" else {}
    try:
        ray.init(address=place, logging_level=logging.ERROR, log_to_driver=False, **mine)
    except ConnectionError as error:
        raise _unanswered(place, error) from error
    except Exception as error:  # of no class of its own where a node takes Ray too long to start
        raise ResourceError(
            f"Ray did not start ({in_one_line(error)}). Run again once this machine is less busy,"
            " or give --address of a cluster that runs"
        ) from error
    # Ray's own handler would end the process at once, with finished chunks in hand.
    signal.signal(signal.SIGTERM, on_terminate)


def _leave() -> None:
    # A Ray that was started here has a process that would add nodes. It does not end when it is
    # asked to, and Ray gives it a second. Elsewhere, and perhaps in a later Ray, there is none.
    node: Any = worker._global_node
    with suppress(AttributeError):
        node.kill_monitor(check_alive=False)
    ray.shutdown()


def _require_joined(address: str | None) -> None:
    """Raise ResourceError where the run is to have another Ray than the process has."""
    joined = ray.get_runtime_context().gcs_address
    if address is None or address == "auto" or _resolved(address) == _resolved(joined):
        return
    raise ResourceError(
        f"--address {address}: this process has joined the Ray at {joined}; give no address to run"
        " there, or call ray.shutdown() first"
    )


def _resolved(address: str) -> str | None:
    """Return host and port; None for what has none."""
    with suppress(ValueError):
        resolved: str | None = canonicalize_bootstrap_address(address)
        return resolved
    return None


def _require_answer(address: str) -> None:
    """Raise ResourceError where nobody listens; Ray itself would try for more than five minutes."""
    # With auto, Ray joins the one that was started here last: by then it may be dead.
    latest = (find_bootstrap_address(None) or "") if address == "auto" else address
    host, _, port = latest.rpartition(":")
    if "/" in host or not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise _unanswered(address, error) from error


def _unanswered(address: str, error: OSError) -> ResourceError:
    return ResourceError(
        f"--address {address}: no Ray cluster answers there ({error}); give the host and port of"
        " its head (ray start names them), auto on one of its nodes, or none for a local Ray"
    )
