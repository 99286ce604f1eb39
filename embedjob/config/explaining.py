"""What pydantic finds wrong in a document, in sentences for who wrote it."""

import datetime
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from itertools import zip_longest
from typing import Any, get_args

from pydantic import ValidationError

from embedjob.config.fits.fit_kinds import FITS
from embedjob.config.job import Job
from embedjob.config.types import Section


def unknown_key(key: str, allowed: Iterable[str]) -> str:
    """Say that a key is unknown, and which are allowed; nothing of these where none are given."""
    names = list(allowed)
    near = difflib.get_close_matches(key, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown key {key}" + (f"; allowed are {', '.join(names)}{hint}" if names else "")


def explained(
    error: ValidationError, document: Mapping[str, Any], at: str, origins: Mapping[str, str]
) -> str:
    """Return a sentence for each key that is wrong: its path, what was got, what is allowed.

    `at` is the path of the document in the job; `origins` say who set each key.
    """
    problems: dict[str, list[str]] = {}
    for one in error.errors(include_url=False):
        path, got = _locate(document, one["loc"], at)
        message = str(one["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
        if one["type"] == "extra_forbidden":
            kind = str(one["loc"][2]) if one["loc"][0] == "fit" and len(one["loc"]) > 2 else None
            message = unknown_key(str(one["loc"][-1]), _siblings(path, kind))
        elif one["type"] == "missing":
            path, message = _missing(path, one["loc"])
        elif one["type"] != "value_error":
            message = f"got {json.dumps(got, default=as_text)}, allowed is {message}"
        notes = problems.setdefault(path, [])
        if message not in notes:
            notes.append(message)
    return "\n".join(_line(path, notes, origins) for path, notes in problems.items())


def _line(path: str, notes: Sequence[str], origins: Mapping[str, str]) -> str:
    origin = origins.get(".".join(path.split(".")[:2]))
    said = notes[0] + "".join(f", or {n.rpartition('allowed is ')[2]}" for n in notes[1:])
    return f"{path or 'job'}: {said}" + (f" (set by {origin})" if origin else "")


def _locate(document: Mapping[str, Any], loc: Sequence[str | int], at: str) -> tuple[str, Any]:
    """Return the path of a key as written: pydantic adds the branches of unions."""
    path = [at] if at else []
    here: Any = document
    in_list = False
    for part, after in zip_longest(loc, loc[1:]):
        if isinstance(here, Mapping):
            by_key = in_list and part in here and after in here
            if by_key or here.get("kind") == part:  # the branch of a union
                continue
            if part not in here:
                break
        elif not (isinstance(here, list) and isinstance(part, int)):
            break
        in_list = isinstance(here, list)
        here = here[part]
        path.append(str(part))
    return ".".join(path), here


def _missing(path: str, loc: Sequence[str | int]) -> tuple[str, str]:
    return ".".join(filter(None, (path, str(loc[-1])))), "is required and was not given"


def _siblings(path: str, kind: str | None = None) -> tuple[str, ...]:
    """Return the keys that may stand beside the one at a path; `kind` is that of its fit."""
    if kind is not None and kind in FITS:
        fields = FITS[kind].section.model_fields
        return tuple(field.alias or name for name, field in fields.items())
    model: Any = Job
    for part in path.split(".")[:-1]:
        field = model.model_fields.get(part)
        kind = field.annotation if field else None
        # Of a section that may be null, the section.
        members = [one for one in (kind, *get_args(kind)) if isinstance(one, type)]
        model = next((one for one in members if issubclass(one, Section)), None)
        if model is None:
            return ()
    return tuple(model.model_fields)


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
