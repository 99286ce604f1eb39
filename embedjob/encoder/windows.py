"""What a model's config tells of how far its attention reaches, and what its positions hang on."""

from collections.abc import Iterator, Mapping
from typing import Any

_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window", "window_size")
# Their angles depend on how long the whole input is, so a prefix alone is not what it is in a view.
_LENGTH_BOUND_ROPES = frozenset({"dynamic", "longrope"})


def windows_of(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Over how many tokens parts of the model's attention reach, where that is limited."""
    return tuple(one for one in _found(config, _WINDOWS) if isinstance(one, int) and one)


def length_bound_ropes(config: Mapping[str, Any]) -> list[str]:
    """The kinds of positions that depend on how long the whole input is."""
    return sorted(_LENGTH_BOUND_ROPES.intersection(map(str, _found(config, ("rope_type", "type")))))


def _found(config: Mapping[str, Any], keys: tuple[str, ...]) -> Iterator[Any]:
    """The values of these keys, however deep in a config."""
    for key, value in config.items():
        if key in keys and not isinstance(value, Mapping):
            yield value
        if isinstance(value, Mapping):
            yield from _found(value, keys)
