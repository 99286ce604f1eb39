"""Validation errors of pydantic, as sentences for the author of a job or method file."""

import datetime
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from itertools import zip_longest
from typing import Any, cast, get_args

from pydantic import ValidationError

from embedjob.config.types import Section


def unknown_key(key: str, allowed: Iterable[str]) -> str:
    """Say that a key is unknown, and which keys are allowed, where any are given."""
    names = list(allowed)
    near = difflib.get_close_matches(key, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown key {key}" + (f"; allowed are {', '.join(names)}{hint}" if names else "")


def explained(
    error: ValidationError,
    document: Mapping[str, Any],
    model: type[Section],
    *,
    at: str,
    origins: Mapping[str, str],
) -> str:
    """Return a sentence for each key that is wrong: its path, what was got, what is allowed.

    `at` is the path of the document in the job; `origins` say who set each key.
    """
    problems: dict[str, list[str]] = {}
    written: list[str] = []
    for one in error.errors(include_url=False):
        parts, got = _locate(document, one["loc"])
        message = str(one["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
        if one["type"] == "extra_forbidden":
            message = _unwanted(str(one["loc"][-1]), parts, document, model)
        elif one["type"] == "missing":
            parts, message = [*parts, str(one["loc"][-1])], "is required and was not given"
        elif one["type"] != "value_error":
            message = f"got {json.dumps(got, default=as_text)}, allowed is {message}"
        path = ".".join([at, *parts] if at else parts)
        notes = problems.setdefault(path, [])
        if message not in notes:
            notes.append(message)
        if one["type"] != "missing":
            written.append(path)
    # An object with a wrong key fails the other branches of its union as well, as no string and no
    # list: the key alone is reported.
    return "\n".join(
        _line(path, notes, origins)
        for path, notes in problems.items()
        if not any(one.startswith(f"{path}.") for one in written)
    )


def _line(path: str, notes: Sequence[str], origins: Mapping[str, str]) -> str:
    origin = origins.get(".".join(path.split(".")[:2]))
    said = notes[0] + "".join(f", or {n.rpartition('allowed is ')[2]}" for n in notes[1:])
    return f"{path or 'job'}: {said}" + (f" (set by {origin})" if origin else "")


def _locate(document: Mapping[str, Any], loc: Sequence[str | int]) -> tuple[list[str], Any]:
    """Return the path of a key and its value, as written.

    Pydantic's locations also name branches of unions. Inside an item of a list such a name is
    skipped; elsewhere the path ends before it.
    """
    path: list[str] = []
    here: Any = document
    is_item = False
    for part, after in zip_longest(loc, loc[1:]):
        if isinstance(here, Mapping):
            is_branch = here.get("kind") == part or (after is not None and after in here)
            if is_item and is_branch:
                is_item = False
                continue
            if part not in here:
                break
        elif not (isinstance(here, list) and isinstance(part, int)):
            break
        is_item = isinstance(here, list)
        here = here[part]
        path.append(str(part))
    return path, here


def _unwanted(
    key: str, path: Sequence[str], document: Mapping[str, Any], model: type[Section]
) -> str:
    """Say why a key may not stand where it is written."""
    if not path or path[-1] != key:  # the path ends before a branch of a union
        return unknown_key(key, ())
    sections, here = [model], cast("Any", document)
    for part in path[:-1]:
        if isinstance(here, list):
            here = here[int(part)]
            continue
        here, fields = here[part], [one.model_fields.get(part) for one in sections]
        sections = [one for field in fields if field for one in _sections_in(field.annotation)]
    # The author's branch of a union has the same `kind`, or else at least one of the keys here.
    kinds = [one for one in sections if _kind(one) in (None, here.get("kind"))]
    meant = [one for one in kinds if here.keys() & one.model_fields.keys()] or kinds
    if any(key in one.model_fields for one in meant):
        return f"got {' and '.join(here)} together; write each as an entry of its own"
    names = [field.alias or name for one in meant for name, field in one.model_fields.items()]
    return unknown_key(key, names if len(meant) == 1 else ())


def _sections_in(annotation: Any) -> list[type[Section]]:
    """Return the sections in a type: of a list, of a union, of what may be null."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for one in get_args(annotation) for section in _sections_in(one)]


def _kind(section: type[Section]) -> str | None:
    field = section.model_fields.get("kind")
    return None if field is None else next(iter(get_args(field.annotation)), None)


def as_text(value: Any) -> str:
    """Return a value that JSON has not as the text that a job file would have in its place."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return f"{value.total_seconds():f}s"
    if isinstance(value, bytes):
        return value.decode()  # UnicodeDecodeError is a ValueError
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"got {type(value).__name__}, allowed are text, numbers, lists and mappings")
