"""What a model's config tells of how far its attention reaches, and what its positions hang on."""

from collections.abc import Iterator, Mapping
from typing import Any

_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window", "window_size")
# Their angles depend on how long the whole input is, so a prefix alone is not what it is in a view.
_LENGTH_BOUND_ROPES = frozenset({"dynamic", "longrope"})
_OLD_NAMES = {"su": "longrope"}
_ORIGINAL = "original_max_position_embeddings"


def windows_of(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Over how many tokens parts of the model's attention reach, where that is limited."""
    return tuple(one for one in _found(config, _WINDOWS) if isinstance(one, int) and one)


def length_bound_ropes(config: Mapping[str, Any]) -> list[str]:
    """The kinds of positions that depend on how long the whole input is."""
    kinds = map(str, _found(config, ("rope_type", "type")))
    return sorted(_LENGTH_BOUND_ROPES.intersection(_OLD_NAMES.get(one, one) for one in kinds))


def steady_positions(config: Mapping[str, Any]) -> int | None:
    """The longest that views may be before all positions of a micro-batch become others, if any is.

    `dynamic` positions become others where the model's own end, which nothing may pass anyway; and
    so do `longrope` ones where the config tells nothing else.
    """
    if "longrope" not in length_bound_ropes(config):
        return None
    own = config.get(_ORIGINAL)
    told = [one for one in ([own] if own else _found(config, (_ORIGINAL,))) if one]
    return min(map(int, told), default=None)


def _found(config: Mapping[str, Any], keys: tuple[str, ...]) -> Iterator[Any]:
    """The values of these keys, however deep in a config."""
    for key, value in config.items():
        if key in keys and not isinstance(value, Mapping):
            yield value
        if isinstance(value, Mapping):
            yield from _found(value, keys)
