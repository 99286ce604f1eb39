"""Storage that is busy or cut off for a while, by a proxy in front of the real S3 server."""

import errno
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from embedjob.errors import AccessError, ChunkError
from embedjob.storage import objects, retrying
from embedjob.storage.retrying import hurry, is_passing, patience, retried
from tests.faulty_s3 import FaultyS3, faulty_s3
from tests.seaweed import S3Server

# More than the client tries by itself: two times three, and each again where a connection broke.
TIMES = {"busy": 8, "reset": 14, "lost": 14, "half": 8}


@pytest.fixture(scope="module")
def proxied(s3: S3Server) -> Iterator[FaultyS3]:
    """The proxy, which every client of this module meets in place of the server."""
    with faulty_s3(s3) as (faulty, endpoint), pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        yield faulty


@pytest.fixture
def faulty(proxied: FaultyS3, bucket: str) -> Iterator[FaultyS3]:
    """The proxy once it has answered this process: only then its trouble may pass."""
    proxied.fail("", times=0)
    assert objects.create(f"{bucket}/seed", b"seed" * 1000)
    yield proxied
    proxied.fail("", times=0)


def listed(bucket: str) -> Any:
    return [file.name for file in objects.list_files(bucket)] == ["seed"]


def stated(bucket: str) -> Any:
    return objects.stat(f"{bucket}/seed").size == 4000


def read(bucket: str) -> Any:
    return objects.read_bytes(f"{bucket}/seed") == b"seed" * 1000


def read_end(bucket: str) -> Any:
    return objects.read_tail(objects.stat(f"{bucket}/seed"), 4) == b"seed"


def created(bucket: str) -> Any:
    tokens = [objects.create_json(f"{bucket}/new", {"token": name})["token"] for name in "ab"]
    return tokens == ["a", "a"]


CALLS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "list": ("GET", listed),
    "stat": ("HEAD", stated),
    "read": ("GET", read),
    "read the end": ("GET", read_end),
    "create": ("PUT", created),
}


# The others take the same way; each waits for some seconds.
ALWAYS = {("list", "busy"), ("stat", "reset"), ("read", "half"), ("create", "lost")}
PAIRS = [
    pytest.param(call, fault, marks=[] if (call, fault) in ALWAYS else pytest.mark.slow)
    for call in CALLS
    for fault in TIMES
    if fault != "half" or CALLS[call][0] == "GET"
]


@pytest.mark.parametrize(("call", "fault"), PAIRS)
def test_trouble_that_passes_is_waited_out(
    call: str, fault: str, faulty: FaultyS3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrying, "FIRST_PAUSE", 0.1)
    method, works = CALLS[call]
    faulty.asked.clear()
    faulty.fail(fault, times=TIMES[fault], method=method)
    assert works(bucket)
    assert [failed for *_, failed in faulty.asked].count(fault) == TIMES[fault]


def test_a_put_whose_answer_was_lost_is_compared_with_what_is_there(
    faulty: FaultyS3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has it, and refuses every repetition: the content says whose file it is."""
    monkeypatch.setattr(retrying, "FIRST_PAUSE", 0.1)
    objects.create(f"{bucket}/theirs", b"theirs")
    for name, mine in (("mine", True), ("theirs", False)):
        # The first put is served unheard; the client's own repetitions of it reach nobody.
        faults = iter(["lost", *["reset"] * (TIMES["reset"] - 1)])
        faulty.choose = lambda method, path, left=faults: (
            next(left, None) if method == "PUT" else None
        )
        assert objects.create(f"{bucket}/{name}", b"mine") is mine


def test_trouble_that_stays_is_one_message_within_the_patience(
    faulty: FaultyS3, bucket: str
) -> None:
    faulty.choose = lambda method, path: "busy"
    started = time.monotonic()
    refused = pytest.raises(AccessError, match="too busy or broken to answer; run again later")
    with refused, patience(4.0):
        objects.list_files(bucket)
    assert 4.0 <= time.monotonic() - started < 20
    started = time.monotonic()
    with pytest.raises(AccessError), patience(0.0):
        objects.read_bytes(f"{bucket}/seed")
    assert time.monotonic() - started < 8


def test_a_process_that_is_to_end_waits_for_nothing(faulty: FaultyS3, bucket: str) -> None:
    faulty.choose = lambda method, path: "busy"
    started = time.monotonic()
    hurry(30.0)
    try:
        with pytest.raises(AccessError):
            objects.list_files(bucket)
    finally:
        hurry(0.0)
    assert time.monotonic() - started < 8


class Flaky:
    """A call that fails so many times."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.left, self.calls = error, times, 0

    def __call__(self) -> int:
        self.calls += 1
        self.left -= 1
        if self.left >= 0:
            raise self.error
        return self.calls


def test_calls_inside_a_call_share_its_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(retrying, "CALL_SECONDS", 1.0)
    inner = Flaky(TimeoutError("no answer"), 10**6)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        retried(lambda: retried(inner, what="inner"), what="outer")
    assert time.monotonic() - started < 3
    assert inner.calls > 2


PASSING = (TimeoutError(), ConnectionResetError(), OSError(errno.ESTALE, "stale handle"))
LASTING = (FileNotFoundError(), PermissionError(), OSError(errno.ENOSPC, "full"), ValueError())


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_may_pass_is_tried_again_where_there_was_an_answer(error: Exception) -> None:
    assert is_passing(error)
    assert not is_passing(error, reached=False)
    for told in (AccessError("the endpoint does not answer"), ChunkError("cannot be read")):
        told.__cause__ = error
        assert is_passing(told)


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_stays_is_raised_at_once(error: Exception) -> None:
    call = Flaky(error, 1)
    with pytest.raises(type(error)):
        retried(call, what="there")
    assert call.calls == 1
