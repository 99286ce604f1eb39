"""Config types: the frozen section, number types, and unions discriminated by a key."""

import re
from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Words = Annotated[str, Field(min_length=1)]
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
    """Return the union of sections of which each has the key that it stands under.

    A mistake is then reported for the kind whose key is written, and not once for every kind.
    `also` are second spellings of keys.
    """
    spellings = {**kinds, **(also or {})}
    tags = {section: kind for kind, section in kinds.items()}

    def kind_of(written: Any) -> str | None:
        if not isinstance(written, dict):
            return tags.get(type(written))
        return next((tags[one] for key, one in spellings.items() if key in written), None)

    members = tuple(Annotated[section, Tag(kind)] for kind, section in kinds.items())
    told_apart = Discriminator(
        kind_of,
        custom_error_type=name,
        custom_error_message="an object with one of the keys " + ", ".join(kinds),
    )
    return Annotated[reduce(or_, members), told_apart]
