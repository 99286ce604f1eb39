import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from embedjob.errors import AccessError, FaultError, LeaseHeldError, OutputError
from embedjob.output import lease
from embedjob.output.lease import (
    Lease,
    acquire,
    beat,
    held,
    is_seen,
    newest_lease,
    release,
    superseded,
)
from embedjob.storage import objects

WATCH = 0.6
BEAT = 0.1


def _acquired(out: str, *, takeover: bool = False) -> Lease:
    return acquire(out, job="job.yaml", takeover=takeover, watch_seconds=WATCH)


def _seconds(began: float) -> float:
    return time.monotonic() - began


def test_the_first_run_takes_epoch_one(out: str) -> None:
    assert newest_lease(out) is None
    mine = _acquired(out)
    assert (mine.epoch, mine.host, mine.pid) == (1, socket.gethostname(), os.getpid())
    assert newest_lease(out) == mine
    assert not superseded(mine)


def test_a_released_lease_is_followed_at_once(any_out: str) -> None:
    with held(_acquired(any_out), every=BEAT):
        pass
    began = time.monotonic()
    assert _acquired(any_out).epoch == 2
    assert _seconds(began) < WATCH


def test_a_lease_whose_holder_died_expires(any_out: str) -> None:
    dead = beat(_acquired(any_out))
    began = time.monotonic()
    mine = _acquired(any_out)
    assert _seconds(began) >= WATCH
    assert mine.epoch == 2
    assert superseded(dead)


def test_who_has_to_watch_says_so(out: str) -> None:
    said: list[str] = []
    release(_acquired(out))
    dead = acquire(out, job="job.yaml", say=said.append)
    acquire(out, job="job.yaml", takeover=True, say=said.append)
    assert said == []
    acquire(out, job="job.yaml", say=said.append, watch_seconds=0.1)
    [line] = said
    assert f"process {dead.pid} on {dead.host} was not released; waiting up to 0.1 s" in line


def test_a_takeover_does_not_watch(out: str) -> None:
    _acquired(out)
    began = time.monotonic()
    assert _acquired(out, takeover=True).epoch == 2
    assert _seconds(began) < WATCH


def test_a_lease_that_lives_is_named(any_out: str) -> None:
    with held(_acquired(any_out), every=BEAT):
        with pytest.raises(LeaseHeldError) as refused:
            _acquired(any_out)
        assert f"job.yaml, process {os.getpid()} on {socket.gethostname()}" in str(refused.value)
        assert "--takeover" in str(refused.value)
    newest = newest_lease(any_out)
    assert newest is not None
    assert newest.released


def test_a_holder_that_ends_while_it_is_watched_lets_the_contender_in(out: str) -> None:
    mine = _acquired(out)
    threading.Timer(WATCH / 4, release, [mine]).start()
    assert _acquired(out).epoch == 2


def test_of_many_contenders_for_an_expired_lease_one_wins(any_out: str) -> None:
    _acquired(any_out)

    def contend() -> Lease | None:
        try:
            return _acquired(any_out)
        except LeaseHeldError:
            return None

    with ThreadPoolExecutor(6) as pool:
        ends = [end.result() for end in [pool.submit(contend) for _ in range(6)]]
    winners = [end for end in ends if end]
    assert winners == [newest_lease(any_out)]
    assert winners[0].epoch == 2


def test_a_run_that_lost_the_race_for_the_epoch_is_told_who_won(any_out: str) -> None:
    first = _acquired(any_out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "newest_lease", lambda _: None)
        with pytest.raises(LeaseHeldError, match=rf"epoch {first.epoch}"):
            _acquired(any_out)


def test_a_lost_answer_to_the_put_is_no_loss(any_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create = objects.create

    def put_and_hear_nothing(url: str, data: bytes) -> bool:
        create(url, data)
        return create(url, data)

    monkeypatch.setattr(objects, "create", put_and_hear_nothing)
    mine = _acquired(any_out)
    assert newest_lease(any_out) == mine


def test_a_heartbeat_that_storage_refuses_is_tried_again(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_over = objects.replace
    refusals = iter([AccessError("no"), OSError("disk"), None])

    def refuse_twice(url: str, data: bytes) -> None:
        error = next(refusals, None)
        if error:
            raise error
        put_over(url, data)

    monkeypatch.setattr(lease, "put_over", refuse_twice)
    with held(_acquired(out), every=BEAT / 4):
        time.sleep(BEAT * 3)
        now = newest_lease(out)
    assert now is not None
    assert now.heartbeat > 0


def test_a_lease_is_given_back_when_the_run_fails(out: str) -> None:
    with pytest.raises(ZeroDivisionError), held(_acquired(out), every=BEAT):
        raise ZeroDivisionError
    found = newest_lease(out)
    assert found is not None
    assert found.released


def test_epochs_count_beyond_nine(out: str) -> None:
    for _ in range(11):
        release(_acquired(out))
    assert _acquired(out).epoch == 12


def test_what_is_no_lease_is_refused(out: str) -> None:
    objects.create(f"{out}/leases/00000001.json", b'{"host": "h"}')
    with pytest.raises(OutputError, match="not a lease"):
        _acquired(out)


def test_an_epoch_that_was_published_does_not_come_again(any_out: str) -> None:
    """Leases may be tidied up, or an output be copied without them."""
    for name in (
        "snapshots/00000003.json",
        "snapshots/00000004/files.parquet",
        "runs/00000006.json",
    ):
        objects.create(f"{any_out}/{name}", b"{}")
    assert _acquired(any_out).epoch == 7


def test_a_holder_that_was_suspended_renews_before_it_changes_anything(out: str) -> None:
    with held(_acquired(out), every=60.0, unrenewed=BEAT) as holder:
        time.sleep(2 * BEAT)
        before = newest_lease(out)
        holder.require()
        after = newest_lease(out)
        assert before is not None
        assert after is not None
        assert after.heartbeat == before.heartbeat + 1


def test_a_holder_that_cannot_renew_changes_nothing(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(url: str, data: bytes) -> None:
        raise AccessError("no")

    with held(_acquired(out), every=60.0, unrenewed=BEAT) as holder:
        monkeypatch.setattr(lease, "put_over", refuse)
        holder.require()
        time.sleep(2 * BEAT)
        # The run may go on: storage may come back.
        assert holder.lost() is None
        with pytest.raises(FaultError, match="cannot be renewed"):
            holder.require()
        monkeypatch.setattr(lease, "SILENT_SECONDS", BEAT)
        assert "storage does not answer" in str(holder.lost())


def test_a_holder_that_was_taken_over_says_so(any_out: str) -> None:
    with held(_acquired(any_out), every=BEAT) as holder:
        assert holder.lost() is None
        _acquired(any_out, takeover=True)
        assert "another run took" in str(holder.lost())
        with pytest.raises(FaultError):
            holder.require()


def test_a_lease_is_seen_where_its_own_file_is(
    any_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_SEEN_PAUSES", (0.0, 0.0))
    mine = beat(_acquired(any_out))
    assert is_seen(mine)
    assert not is_seen(replace(mine, token="that of another disk"))
    assert not is_seen(replace(mine, out=f"{any_out}-on-another-disk"))
