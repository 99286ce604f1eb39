"""Lease: one run at a time holds the output; its epoch orders what runs publish."""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from embedjob.errors import AccessError, LeaseHeldError, OutputError
from embedjob.storage.objects import create_json, join, list_files, read_bytes
from embedjob.storage.objects import replace as put_over

HEARTBEAT_SECONDS = 10.0
WATCH_SECONDS = 30.0
_LOOK_SECONDS = 1.0  # the longest pause between two looks of a contender


@dataclass(frozen=True)
class Lease:
    """The right to publish under `epoch`, until a newer epoch is claimed."""

    out: str
    epoch: int
    job: str
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    since: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat("T", "seconds"))
    heartbeat: int = 0
    released: bool = False

    @property
    def url(self) -> str:
        """Return the URL of the lease's file."""
        return join(self.out, "leases", f"{self.epoch:08d}.json")


def claim(
    out: str, *, job: str, takeover: bool = False, watch_seconds: float = WATCH_SECONDS
) -> Lease:
    """Claim the next epoch; LeaseHeldError while another run's heartbeat moves.

    `takeover` skips watching the heartbeat, for a restart after a crash of one's own.
    """
    last = newest(out)
    if last is not None and not last.released and not takeover:
        last = _watched(last, seconds=watch_seconds)
    mine = Lease(out=out, epoch=last.epoch + 1 if last else 1, job=job)
    standing = _lease(out, create_json(mine.url, _document(mine)), mine.url)
    if standing.token != mine.token:
        raise _held(standing)
    return mine


def newest(out: str) -> Lease | None:
    """Return the lease of the highest epoch."""
    epochs = _epochs(out)
    return _read(out, max(epochs)) if epochs else None


def superseded(lease: Lease) -> bool:
    """Return whether a newer epoch was claimed; this run may then not publish the newest state."""
    return max(_epochs(lease.out), default=0) > lease.epoch


def takeover_of(lease: Lease) -> str | None:
    """Return the message that another run took this one's output over; None while none did."""
    try:
        lost = superseded(lease)
    except (OSError, AccessError):
        return None  # The next look may succeed; create-only puts keep the output right meanwhile.
    return f"another run took {lease.out} over; nothing is published by this one" if lost else None


def beat(lease: Lease) -> Lease:
    """Advance the heartbeat in storage, and return the lease."""
    return _rewritten(replace(lease, heartbeat=lease.heartbeat + 1))


def release(lease: Lease) -> Lease:
    """Release the lease, so that the next run need not watch it."""
    return _rewritten(replace(lease, heartbeat=lease.heartbeat + 1, released=True))


@contextmanager
def held(lease: Lease, *, every: float = HEARTBEAT_SECONDS) -> Iterator[Lease]:
    """Hold the lease, its heartbeat moved by a thread until the block ends, then release it.

    A heartbeat that storage refuses is tried again at the next: create-only puts keep the output
    right even if another run takes over meanwhile.
    """
    stop = threading.Event()
    last = [lease]

    def keep() -> None:
        while not stop.wait(every):
            try:
                last[0] = beat(last[0])
            except (OSError, AccessError):
                continue

    thread = threading.Thread(target=keep, name="embedjob-heartbeat", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        stop.set()
        thread.join(every)
        # The next run watches an unreleased lease; that is no reason to fail this run.
        with suppress(OSError, AccessError):
            release(last[0])


def _watched(last: Lease, *, seconds: float) -> Lease:
    """Return the newest lease, once it was released or did not move for `seconds` of our clock."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        time.sleep(min(_LOOK_SECONDS, seconds / 10))
        now = newest(last.out) or last
        if now.released:
            return now
        if now != last:
            raise _held(now)
    return last


def _held(lease: Lease) -> LeaseHeldError:
    return LeaseHeldError(
        f"{lease.out}: is held by another run: {lease.job}, process {lease.pid} on {lease.host},"
        f" since {lease.since} (epoch {lease.epoch}). Wait until it ends, or stop it; after a crash"
        " of your own run, use `run --takeover`"
    )


def _rewritten(lease: Lease) -> Lease:
    put_over(lease.url, json.dumps(_document(lease), sort_keys=True).encode())
    return lease


def _document(lease: Lease) -> dict[str, Any]:
    return {key: value for key, value in asdict(lease).items() if key != "out"}


def _epochs(out: str) -> list[int]:
    names = [file.name for file in list_files(join(out, "leases"))]
    return [int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit()]


def _read(out: str, epoch: int) -> Lease:
    url = join(out, "leases", f"{epoch:08d}.json")
    try:
        document = json.loads(read_bytes(url))
    except ValueError as error:
        raise OutputError(f"{url}: is not JSON; was it edited by hand?") from error
    return _lease(out, document, url)


def _lease(out: str, document: dict[str, Any], url: str) -> Lease:
    try:
        return Lease(**{**document, "out": out})
    except TypeError as error:
        raise OutputError(f"{url}: is not a lease of embedjob ({error})") from error
