"""Documents of an output: JSON whose values have the kinds that embedjob gives them.

Whoever may write to an output may edit them. No edit may end a reader in a traceback, or lead it
to other files than the output's.
"""

import json
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from embedjob.errors import OutputError
from embedjob.storage.objects import read_bytes

# A type, a pattern of whole strings, a tuple of alternatives, [kind of every item], or a mapping of
# some keys to kinds, where EVERY stands for all keys.
Kind = Any
EVERY = "*"
NONE = type(None)
# Larger numbers fit no column of Parquet and no file name.
_LARGEST = 2**63
_NUMBER = re.compile("[0-9]{8,}")


def read_document(url: str) -> Any:
    """Read a JSON file; FileNotFoundError where there is none, OutputError where it is not JSON."""
    try:
        return json.loads(read_bytes(url))
    except (ValueError, RecursionError) as error:
        raise OutputError(f"{url}: is not JSON; was it edited by hand?") from error


def require_kinds(document: Any, kinds: Kind, *, url: str, what: str) -> None:
    """Raise OutputError for the first value of another kind; keys may be missing."""
    if problem := _misfit(document, kinds, ""):
        raise OutputError(f"{url}: is not {what} of embedjob: {problem}; was it edited by hand?")


def numbered(names: Iterable[str]) -> list[int]:
    """Return the numbers of the names that embedjob gives to what it counts; others are left out.

    Such a name is `00000001.json`, or that of a folder without `.json`.
    """
    stems = (name.removesuffix(".json") for name in names)
    return [int(stem) for stem in stems if _NUMBER.fullmatch(stem) and f"{int(stem):08d}" == stem]


def is_moment(value: Any) -> bool:
    """Tell whether a value is a time with its zone, as text."""
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def _misfit(value: Any, kind: Kind, path: str) -> str | None:
    """Return where a value, or one inside it, has another kind, and what is there."""
    if isinstance(kind, tuple):
        misfits = [_misfit(value, one, path) for one in kind]
        return None if None in misfits else misfits[0]
    if isinstance(kind, list) and isinstance(value, list | tuple):
        inner = (_misfit(item, kind[0], f"{path}[{at}]") for at, item in enumerate(value))
        return next((one for one in inner if one), None)
    if isinstance(kind, Mapping) and isinstance(value, Mapping):
        pairs = ((key, kind.get(key, kind.get(EVERY, object))) for key in value)
        inner = (_misfit(value[key], one, f"{path}.{key}".strip(".")) for key, one in pairs)
        return next((one for one in inner if one), None)
    fits = not isinstance(kind, list | Mapping) and _is_plain(value, kind)
    return None if fits else f"{path or 'it'} is {json.dumps(value)[:60]}"


def _is_plain(value: Any, kind: Kind) -> bool:
    if isinstance(kind, re.Pattern):
        return isinstance(value, str) and kind.fullmatch(value) is not None
    if not isinstance(kind, type):
        return bool(kind(value))
    if kind in (int, float):
        number = isinstance(value, int | float if kind is float else int)
        return number and not isinstance(value, bool) and not abs(value) >= _LARGEST
    return isinstance(value, kind)
