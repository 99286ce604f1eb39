"""Spans: which tokens of a view count for pooling, a table of rules over token positions."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedjob.text.arrays import Ints

NEED_TEXT = frozenset({"text", "last_text", "from_text", "tail", "pooled"})


@dataclass(frozen=True)
class Positions:
    """Positions in N views, in tokens without padding.

    `text_start` and `text_stop` bound the tokens that overlap the text (its last copy if there are
    several), `marked_start` and `marked_stop` the tokens of the marked segments. `closing` counts
    the special tokens at the very end that the tokenizer or the EOS policy put there. `prompt`
    counts the tokens that the string before the text has when tokenized alone, opening special
    tokens included.
    """

    length: Ints
    text_start: Ints
    text_stop: Ints
    closing: Ints
    marked_start: Ints
    marked_stop: Ints
    prompt: Ints


def spans(positions: Positions, *, rule: str, offset: int = 0) -> npt.NDArray[np.int32]:
    """Return start and stop [N, 2] of every view's span; start == stop where it is empty.

    The offset moves the start, at most to the ends of the view and of the span.
    """
    start, stop = {**SPANS, **_HEAD_SPANS}[rule](positions)
    start = np.minimum(np.maximum(start + offset, 0), stop)
    return np.stack([start, stop], axis=1).astype(np.int32)


def _all(positions: Positions) -> tuple[Ints, Ints]:
    """Select every token, special tokens included."""
    return np.zeros_like(positions.length), positions.length


def _text(positions: Positions) -> tuple[Ints, Ints]:
    """Select the tokens that overlap the text's characters."""
    return positions.text_start, positions.text_stop


def _last_text(positions: Positions) -> tuple[Ints, Ints]:
    """Select the last token that overlaps the text's characters."""
    return np.maximum(positions.text_start, positions.text_stop - 1), positions.text_stop


def _from_text(positions: Positions) -> tuple[Ints, Ints]:
    """Select from the text's first token to the very end, closing special tokens included."""
    return positions.text_start, positions.length


def _after_prompt(positions: Positions) -> tuple[Ints, Ints]:
    """Skip as many tokens as the prompt has alone: where it meets the text, tokens may merge."""
    return np.minimum(positions.prompt, positions.length), positions.length


def _pooled(positions: Positions) -> tuple[Ints, Ints]:
    """Select the tokens that overlap the segments with `pool: true`, or with the span's tag."""
    return positions.marked_start, positions.marked_stop


def _continuation(positions: Positions) -> tuple[Ints, Ints]:
    """Select a continuation's tokens and the token before them; empty if there is none before."""
    start = np.maximum(positions.marked_start - 1, 0)
    return start, np.where(positions.marked_start > 0, positions.marked_stop, start)


def _last_token(positions: Positions) -> tuple[Ints, Ints]:
    """Select the last token, EOS included."""
    return np.maximum(positions.length - 1, 0), positions.length


def _first_token(positions: Positions) -> tuple[Ints, Ints]:
    """Select the first token, BOS included."""
    return np.zeros_like(positions.length), np.minimum(positions.length, 1)


def _tail(positions: Positions) -> tuple[Ints, Ints]:
    """Select the template's tokens after the text, or the closing special tokens if it has none."""
    open_end = positions.length - positions.closing
    stop = np.where(open_end > positions.text_stop, open_end, positions.length)
    return positions.text_stop, stop


SPANS: dict[str, Callable[[Positions], tuple[Ints, Ints]]] = {
    "all": _all,
    "text": _text,
    "last_text": _last_text,
    "from_text": _from_text,
    "after_prompt": _after_prompt,
    "last_token": _last_token,
    "first_token": _first_token,
    "tail": _tail,
    "pooled": _pooled,
}
# Rules for heads, which no recipe names as its span.
_HEAD_SPANS = {"continuation": _continuation}
