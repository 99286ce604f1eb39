"""Glob patterns, matched part by part; hidden and `_` names only where the pattern asks for it."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

ANY_DEPTH = "**"


def is_magic(text: str) -> bool:
    """Return whether the text holds a wildcard."""
    return any(character in text for character in "*?[")


def stem(part: str) -> str:
    """Return the characters that every name matching this part begins with."""
    return next((part[:i] for i, character in enumerate(part) if character in "*?["), part)


def matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether the path, or a folder above it, matches `pattern`, a glob's parts.

    An empty pattern takes all but hidden names.
    """
    if not pattern:
        return not any(map(is_hidden, parts))
    if not parts:
        return False
    if pattern[0] == ANY_DEPTH:
        deeper = not is_hidden(parts[0]) and matches(parts[1:], pattern)
        return deeper or matches(parts, pattern[1:])
    return _fits(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


def may_lead(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether a match can be this folder or lie below it."""
    if not parts or not pattern or pattern[0] == ANY_DEPTH:
        return True
    return _fits(parts[0], pattern[0]) and may_lead(parts[1:], pattern[1:])


def is_hidden(part: str) -> bool:
    """Return whether tools keep their own files under such a name."""
    return part.startswith((".", "_"))


def _fits(part: str, pattern: str) -> bool:
    return fnmatchcase(part, pattern) and (is_hidden(pattern) or not is_hidden(part))
