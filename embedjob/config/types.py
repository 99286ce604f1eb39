"""Config types: the frozen section, numbers, durations, moments, and unions that a key decides."""

import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, time, timedelta
from functools import reduce
from operator import or_
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonEmptyStr = Annotated[str, Field(min_length=1)]
# A recipe, in modules that its own module imports.
AnyRecipe = Any
_SECONDS = {"s": 1, "m": 60, "h": 3600}
_ItemT = TypeVar("_ItemT")


class Section(BaseModel):
    """One frozen, strict part of the config; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def seconds_of(duration: str) -> float:
    """Return the seconds of a duration such as 90s, 30m or 2h; ValueError for any other text."""
    if not re.fullmatch(r"\d+(\.\d+)?[smh]", duration):
        raise ValueError("allowed is a number with s, m or h, such as 90s, 30m or 2h")
    return float(duration[:-1]) * _SECONDS[duration[-1]]


def moment_of(until: str, now: datetime) -> datetime:
    """Return the moment, with its zone, that a deadline names.

    Args:
        until: a time of day (06:00), which is the next such moment on this machine's clock; a
            moment with its zone (2026-11-30T06:00+01:00); or a duration from `now` on (90m).
        now: the present moment, with its zone.

    Raises:
        ValueError: `until` is none of these.
    """
    moment: datetime | None = None
    with suppress(ValueError, OverflowError):
        if re.fullmatch(r"\d{1,2}:\d{2}(:\d{2})?", until):
            return _next(time.fromisoformat(until if until[2] == ":" else f"0{until}"), now)
        if re.fullmatch(r"[\d.]+[smh]", until):
            return now + timedelta(seconds=seconds_of(until))
        # Python 3.10 reads no Z.
        moment = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", until))
    if moment is None or moment.tzinfo is None:
        raise ValueError(
            f"got {until}, allowed is a time of day (06:00), a moment with its zone"
            " (2026-11-30T06:00+01:00), or a duration (90m)"
        )
    return moment


def _next(clock: time, now: datetime) -> datetime:
    """Return when this machine's clock shows a time next."""
    today, moments = now.astimezone().date(), []
    for day in (0, 1):
        shown = datetime.combine(today + timedelta(days=day), clock)
        # In autumn a clock shows an hour twice. In spring it leaves an hour out, for which the
        # first of the two is a moment after it, and the second a moment before it.
        for moment in (shown.astimezone(), shown.replace(fold=1).astimezone()):
            if moment > now and moment.replace(tzinfo=None) >= shown:
                moments.append(moment)
    return min(moments)


def _not_empty(given: tuple[_ItemT, ...]) -> tuple[_ItemT, ...]:
    # Not min_length, whose message is repeated for every list with a bad item in it.
    if not given:
        raise ValueError("got [], allowed is a list of at least one")
    return given


NotEmpty = AfterValidator(_not_empty)


def keyed_union(
    kinds: Mapping[str, type[Section]],
    *,
    name: str,
    also: Mapping[str, type[Section]] | None = None,
) -> Any:
    """Return the union of sections, told apart by the key that each is written under.

    A mistake is then reported for the kind whose key is written, and not once for every kind. A
    section may have several keys; `also` are second spellings, which the message does not list.
    """
    spellings = {**kinds, **(also or {})}
    tags = {section: kind for kind, section in kinds.items()}

    def kind_of(written: Any) -> str | None:
        if not isinstance(written, dict):
            return tags.get(type(written))
        return next((tags[one] for key, one in spellings.items() if key in written), None)

    members = tuple(Annotated[section, Tag(kind)] for section, kind in tags.items())
    told_apart = Discriminator(
        kind_of,
        custom_error_type=name,
        custom_error_message="an object with one of the keys " + ", ".join(kinds),
    )
    return Annotated[reduce(or_, members), told_apart]
