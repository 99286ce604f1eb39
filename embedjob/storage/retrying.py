"""Retries: storage that is busy, or cannot be reached for a while, is asked again with backoff."""

import errno
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from embedjob.errors import AccessError, ChunkError
from embedjob.storage.access import BUSY, error_code

_T = TypeVar("_T")

# How long one call is repeated where its caller does not say.
CALL_SECONDS = 120.0
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0
_LOGGED_PAUSE = 4.0  # a pause from here on is logged: a few short ones concern nobody
# Connections that broke, by the class of a client's error. Before the first answer from a place
# they, and codes that are no words of S3, mean that the endpoint in the environment is wrong.
_CUT_OFF = frozenset(
    {
        "ClientConnectionError",
        "ClientConnectorError",
        "ClientOSError",
        "ClientPayloadError",
        "ConnectTimeoutError",
        "ConnectionClosedError",
        "EndpointConnectionError",
        "HTTPClientError",
        "IncompleteRead",
        "IncompleteReadError",
        "ProxyConnectionError",
        "ReadTimeoutError",
        "ResponseParserError",
        "ResponseStreamingError",
        "ServerDisconnectedError",
    }
)
_CUT_OFF_NUMBERS = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EREMOTEIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)

_deadline: ContextVar[float | None] = ContextVar("deadline of storage calls", default=None)
_hurry_until = [0.0]
_log = logging.getLogger(__name__)


def is_passing(error: BaseException, *, reached: bool = True) -> bool:
    """Return whether storage raised this for a reason that may pass by itself.

    `reached` says whether this process has had an answer from there before.
    """
    while isinstance(error, AccessError | ChunkError) and error.__cause__ is not None:
        error = error.__cause__
    code = error_code(error)
    if code in BUSY and not code.isdigit():
        return True
    cut = isinstance(error, ConnectionError | TimeoutError) or code in BUSY | _CUT_OFF
    cut = cut or (isinstance(error, OSError) and error.errno in _CUT_OFF_NUMBERS)
    return cut and reached


def retried(call: Callable[[], _T], *, what: str, reached: bool = True) -> _T:
    """Return what `call` returns, repeated while its errors may pass and patience lasts.

    Calls inside `call` share its patience.

    Raises:
        Exception: the last error, unchanged. `what` names the place in the log.
    """
    deadline, pause = _deadline.get(), FIRST_PAUSE
    if deadline is None:
        deadline = time.monotonic() + CALL_SECONDS
    while True:
        token = _deadline.set(deadline)
        try:
            return call()
        except Exception as error:
            left = deadline - time.monotonic()
            if left <= 0 or not is_passing(error, reached=reached):
                raise
            if pause >= _LOGGED_PAUSE:
                _log.warning("%s: %s; asked again for %.0f s", what, error_code(error), left)
            # Jitter: all workers of a cluster meet the same trouble at the same moment.
            if not _waited(min(left, pause * random.uniform(0.5, 1.5))):
                raise
            pause = min(2 * pause, LONGEST_PAUSE)
        finally:
            _deadline.reset(token)


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Within the block, in this thread, repeat calls for `seconds` in all; 0 tries each once."""
    token = _deadline.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


def hurry(seconds: float) -> None:
    """For `seconds`, repeat no call of this process: it was asked to end."""
    _hurry_until[0] = time.monotonic() + seconds


def _waited(seconds: float) -> bool:
    """Wait; return False as soon as this process is in a hurry."""
    end = time.monotonic() + seconds
    while time.monotonic() >= _hurry_until[0]:
        left = end - time.monotonic()
        if left <= 0:
            return True
        time.sleep(min(left, 0.5))
    return False
