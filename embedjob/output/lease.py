"""Lease: one run at a time holds the output; its epoch orders what runs publish."""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from embedjob.errors import AccessError, FaultError, LeaseHeldError, OutputError
from embedjob.output.documents import Kind, numbered, read_document, require_kinds
from embedjob.storage.objects import absolute, create_json, join, list_files, read_bytes
from embedjob.storage.objects import replace as put_over
from embedjob.storage.retrying import patience

HEARTBEAT_SECONDS = 10.0
WATCH_SECONDS = 30.0
# Less than a contender's watch: whoever was silent for longer may have been followed.
UNRENEWED_SECONDS = 20.0
# A run goes on while storage is away, and gives up after so long.
SILENT_SECONDS = 600.0
_SEEN_PAUSES = (1.0, 2.0, 4.0)
_LOOK_SECONDS = 1.0  # the longest pause between two looks of a contender


_KINDS: Kind = {
    "epoch": int,
    "job": str,
    "token": str,
    "host": str,
    "pid": int,
    "since": str,
    "heartbeat": int,
    "released": bool,
}


@dataclass(frozen=True)
class Lease:
    """The right to publish under `epoch`, until a newer epoch is taken."""

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


def acquire(
    out: str,
    *,
    job: str,
    takeover: bool = False,
    say: Callable[[str], object] = lambda line: None,
    watch_seconds: float = WATCH_SECONDS,
) -> Lease:
    """Take the lease of the next epoch; LeaseHeldError while another run's heartbeat moves.

    `takeover` skips watching the heartbeat, for a restart after a crash of one's own; `say` takes a
    line where it is watched, which may last for `watch_seconds`.
    """
    last = newest_lease(out)
    if last is not None and not last.released and not takeover:
        say(
            f"{out}: the lease of process {last.pid} on {last.host} was not released; waiting up to"
            f" {watch_seconds:g} s to see whether it lives (`run --takeover` does not wait)"
        )
        _watched(last, seconds=watch_seconds)
    # Leases alone may have been tidied up, and an epoch that has a snapshot must not come again. A
    # lease newer than the one that was watched belongs to a live run: then the name is taken.
    others = (*_numbers(out, "snapshots"), *_numbers(out, "runs"))
    epoch = 1 + max((last.epoch if last else 0, *others))
    mine = Lease(out=out, epoch=epoch, job=job)
    standing = _lease(out, create_json(mine.url, _document(mine)), mine.url)
    if standing.token != mine.token:
        raise _held(standing)
    return mine


def newest_lease(out: str) -> Lease | None:
    """Return the lease of the highest epoch."""
    epochs = _epochs(out)
    return _read(out, max(epochs)) if epochs else None


def superseded(lease: Lease) -> bool:
    """Return whether a newer epoch was taken; this run may then not publish the newest state."""
    return max(_epochs(lease.out), default=0) > lease.epoch


def beat(lease: Lease) -> Lease:
    """Advance the heartbeat in storage, and return the lease."""
    return _rewritten(replace(lease, heartbeat=lease.heartbeat + 1))


def release(lease: Lease) -> Lease:
    """Release the lease, so that the next run need not watch it."""
    return _rewritten(replace(lease, heartbeat=lease.heartbeat + 1, released=True))


def is_seen(lease: Lease) -> bool:
    """Return whether this process sees the lease's file; if not, its output is another disk."""
    for pause in (*_SEEN_PAUSES, None):
        # A network disk may show a new file some seconds late.
        with suppress(FileNotFoundError):
            if lease.token.encode() in read_bytes(lease.url):
                return True
        if pause is not None:
            time.sleep(pause)
    return False


def unseen(lease: Lease) -> str:
    """Say why a node that does not see the lease must not write."""
    return (
        f"{lease.out}: this node does not see the file that the driver has put there, so it would"
        " write elsewhere; give output.path on S3, or on a disk that all nodes share"
    )


class Holder:
    """A lease while it is held: its heartbeat is moved by a thread until the end."""

    def __init__(self, lease: Lease, *, every: float, unrenewed: float) -> None:
        """Begin to move the heartbeat."""
        self.lease = lease
        self._every, self._unrenewed = every, unrenewed
        self._accepted = _clock()
        self._renewing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="embedjob-heartbeat", daemon=True)
        self._thread.start()

    @property
    def epoch(self) -> int:
        """Return the number under which this holder publishes."""
        return self.lease.epoch

    def lost(self) -> str | None:
        """Return why a run is to end; None while the output is its own, or nobody can tell."""
        out = self.lease.out
        try:
            # Storage in trouble is not waited for: the other reason is just that.
            with patience(0.0):
                taken = superseded(self.lease)
        except (OSError, AccessError):
            taken = False  # The heartbeat will tell how long storage has not answered.
        if taken:
            return f"another run took {out} over; nothing is published by this one"
        silent = _clock() - self._accepted
        if silent > SILENT_SECONDS:
            return (
                f"the lease on {out} was not renewed for {silent:.0f} s, allowed are"
                f" {SILENT_SECONDS:g}: storage does not answer; run again to resume"
            )
        return None

    def require(self) -> None:
        """Raise FaultError unless the output is this holder's to change, at this moment.

        A holder that was not heard for a while, because it slept or storage was away, renews its
        lease first, and then looks whether another run has taken the output meanwhile.
        """
        out = self.lease.out
        try:
            if _clock() - self._accepted > self._unrenewed:
                self._renew()
            taken = superseded(self.lease)
        except (OSError, AccessError) as error:
            raise FaultError(
                f"the lease on {out} cannot be renewed ({error}); run again"
            ) from error
        if taken:
            raise FaultError(f"another run took {out} over; nothing is published by this one")

    def end(self) -> None:
        """Stop the heartbeat and release the lease, so that the next run need not watch it."""
        self._stop.set()
        self._thread.join(self._every)
        # The next run watches an unreleased lease; that is no reason to fail this run.
        with suppress(OSError, AccessError):
            release(self.lease)

    def _keep(self) -> None:
        while not self._stop.wait(self._every):
            with suppress(OSError, AccessError):
                self._renew()

    def _renew(self) -> None:
        with self._renewing:
            began = _clock()
            self.lease = beat(self.lease)
            self._accepted = began


@contextmanager
def held(
    lease: Lease, *, every: float = HEARTBEAT_SECONDS, unrenewed: float = UNRENEWED_SECONDS
) -> Iterator[Holder]:
    """Hold the lease until the block ends, then release it.

    A heartbeat that storage refuses is tried again at the next; a holder that was not heard for
    `unrenewed` seconds changes nothing before it has renewed its lease.
    """
    holder = Holder(lease, every=every, unrenewed=unrenewed)
    try:
        yield holder
    finally:
        holder.end()


def _clock() -> float:
    """Return seconds that go on while the machine sleeps, where the platform has such a clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _watched(last: Lease, *, seconds: float) -> None:
    """Return once the newest lease was released or did not move for `seconds` of our clock."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        time.sleep(min(_LOOK_SECONDS, seconds / 10))
        now = newest_lease(last.out) or last
        if now.released:
            return
        if now != last:
            raise _held(now)


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
    return _numbers(out, "leases")


def _numbers(out: str, folder: str) -> list[int]:
    """Return the numbers of what lies in a folder of the output: files, or folders of parts."""
    place = join(absolute(out), folder)
    tops = {file.url[len(place) + 1 :].partition("/")[0] for file in list_files(place)}
    return numbered(tops)


def _read(out: str, epoch: int) -> Lease:
    url = join(out, "leases", f"{epoch:08d}.json")
    return _lease(out, read_document(url), url)


def _lease(out: str, document: dict[str, Any], url: str) -> Lease:
    require_kinds(document, _KINDS, url=url, what="a lease")
    try:
        lease = Lease(**{**document, "out": out})
    except TypeError as error:
        raise OutputError(f"{url}: is not a lease of embedjob ({error})") from error
    if lease.url != url:
        raise OutputError(f"{url}: has the epoch {lease.epoch} of another lease; was it copied?")
    return lease
