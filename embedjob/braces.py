"""Strings with slots in braces: what is written in them, and what fills the slots."""

import string
from collections.abc import Callable, Mapping

from embedjob.errors import ConfigError

BRACES = "a literal brace is written '{{' or '}}'"


def runs(template: str, *, key: str) -> list[tuple[str, str | None]]:
    """Each literal with the slot after it, None where the template ends or a brace is literal.

    ConfigError under this key of the config if the template cannot be read.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"{key}: {template!r} cannot be read ({error}); {BRACES}") from error
    found: list[tuple[str, str | None]] = []
    for literal, name, spec, conversion in parsed:
        dressed = f"!{conversion}" if conversion else f":{spec}" if spec else ""
        found.append((literal, None if name is None else name + dressed))
    return found


def slots(template: str, *, key: str) -> set[str]:
    """The names of the slots in a template."""
    return {slot for _, slot in runs(template, key=key) if slot is not None}


def filled(
    template: str, values: Mapping[str, Callable[[], str]], *, key: str
) -> list[tuple[str, str | None]]:
    """Each run of characters with the slot after it that no value fills, None at the end."""
    found: list[tuple[str, str | None]] = []
    literal = ""
    for before, slot in runs(template, key=key):
        literal += before
        if slot is None:
            continue
        if slot not in values:
            found.append((literal, slot))
            literal = ""
        else:
            literal += values[slot]()
    return [*found, (literal, None)]
