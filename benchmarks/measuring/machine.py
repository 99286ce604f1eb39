"""The machine while a program runs: versions, date, and what else had its cores."""

import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import psutil


@contextmanager
def watched(packages: Sequence[str], *, threads: int) -> Iterator[dict[str, Any]]:
    """A record of the machine, whole when the context is left: load, and cores that others took."""
    record: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "cores": psutil.cpu_count(),
        "threads": threads,
        "load average before": round(os.getloadavg()[0], 2),
    }
    started, busy, own = time.monotonic(), _busy_seconds(), _own_seconds()
    yield record
    record["seconds of the whole program"] = round(time.monotonic() - started, 1)
    taken = (_busy_seconds() - busy) - (_own_seconds() - own)
    # On a quiet machine about 0: above 0.1, the ratios are not to be published.
    record["cores taken by others"] = round(taken / (time.monotonic() - started), 2)
    record["load average after"] = round(os.getloadavg()[0], 2)


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + getattr(times, "steal", 0.0))


def _own_seconds() -> float:
    """CPU seconds of this process and of all that it has started, those that ended included."""
    me = psutil.Process()
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total
