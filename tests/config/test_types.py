"""Moments and durations as a job file has them."""

import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from embedjob.config.types import moment_of, seconds_of

DAY = 24 * 60
MOMENTS = st.datetimes(datetime(2000, 1, 1), datetime(2037, 1, 1), timezones=st.just(timezone.utc))


@pytest.fixture(scope="module", params=["Europe/Berlin", "Australia/Lord_Howe", "UTC"])
def zone(request: pytest.FixtureRequest) -> Iterator[str]:
    """This machine's clock is set to a zone; Lord Howe's summer is half an hour."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", request.param)
        time.tzset()
        yield request.param
    time.tzset()


@given(now=MOMENTS, hour=st.integers(0, 23), minute=st.integers(0, 59))
def test_a_time_of_day_is_the_next_moment_that_the_clock_shows_it(
    zone: str, now: datetime, hour: int, minute: int
) -> None:
    """Found by looking at the clock every minute, where no jump of it leaves the time out."""
    wanted, step = hour * 60 + minute, now.replace(second=0, microsecond=0)
    shown = _minutes(step)
    while True:
        step, before = step + timedelta(minutes=1), shown
        shown = _minutes(step)
        if shown == wanted:
            break
        jump = (shown - before) % DAY
        assume(not 1 < jump < DAY // 2 or not (wanted - before) % DAY < jump)
    assert moment_of(f"{hour:02}:{minute:02}", now) == step


def _minutes(moment: datetime) -> int:
    shown = time.localtime(moment.timestamp())
    return shown.tm_hour * 60 + shown.tm_min


@pytest.mark.parametrize(
    ("now", "clock", "expected"),
    [
        ("2026-11-29T22:00+00:00", "6:00", "2026-11-30T06:00+01:00"),
        ("2026-11-30T04:59:59+00:00", "06:00", "2026-11-30T06:00+01:00"),
        ("2026-11-30T05:00+00:00", "06:00", "2026-12-01T06:00+01:00"),
        ("2026-11-30T05:00+00:00", "06:00:30", "2026-11-30T06:00:30+01:00"),
        # The clock shows 02:30 twice; it never shows 02:30.
        ("2026-10-25T00:00+00:00", "02:30", "2026-10-25T02:30+02:00"),
        ("2026-10-25T00:40+00:00", "02:30", "2026-10-25T02:30+01:00"),
        ("2026-03-29T00:00+00:00", "02:30", "2026-03-29T03:30+02:00"),
    ],
)
def test_times_of_day_in_berlin(
    now: str, clock: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        assert moment_of(clock, datetime.fromisoformat(now)) == datetime.fromisoformat(expected)
    finally:
        monkeypatch.undo()
        time.tzset()


@given(MOMENTS)
def test_a_moment_with_its_zone_is_itself_and_a_duration_counts_from_now(now: datetime) -> None:
    assert moment_of(now.isoformat(), datetime.now(timezone.utc)) == now
    assert moment_of(now.isoformat().replace("+00:00", "Z"), now) == now
    for duration in ("90s", "1.5m", "2h"):
        assert moment_of(duration, now) - now == timedelta(seconds=seconds_of(duration))


@pytest.mark.parametrize(
    "until", ["", "6", "24:00", "06:60", "6am", "90", "1d", "2026-11-30", "2026-11-30T06:00", "s"]
)
def test_what_is_no_moment_is_refused(until: str) -> None:
    with pytest.raises(ValueError, match="allowed is a time of day"):
        moment_of(until, datetime.now(timezone.utc))
