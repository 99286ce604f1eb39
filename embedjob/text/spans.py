"""Spans: which tokens of a view count for pooling, a table of rules over token positions."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedjob.text.arrays import Ints

NEED_TEXT = frozenset({"text", "last_text", "from_text", "tail", "pooled"})


@dataclass(frozen=True)
class Layout:
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


def spans(layout: Layout, *, rule: str, offset: int = 0) -> npt.NDArray[np.int32]:
    """Return start and stop [N, 2] of every view's span; start == stop where it is empty.

    The offset moves the start, at most to the ends of the view and of the span.
    """
    start, stop = {**SPANS, **_HEAD_SPANS}[rule](layout)
    start = np.minimum(np.maximum(start + offset, 0), stop)
    return np.stack([start, stop], axis=1).astype(np.int32)


def _all(layout: Layout) -> tuple[Ints, Ints]:
    """Select every token, special tokens included."""
    return np.zeros_like(layout.length), layout.length


def _text(layout: Layout) -> tuple[Ints, Ints]:
    """Select the tokens that overlap the text's characters."""
    return layout.text_start, layout.text_stop


def _last_text(layout: Layout) -> tuple[Ints, Ints]:
    """Select the last token that overlaps the text's characters."""
    return np.maximum(layout.text_start, layout.text_stop - 1), layout.text_stop


def _from_text(layout: Layout) -> tuple[Ints, Ints]:
    """Select from the text's first token to the very end, closing special tokens included."""
    return layout.text_start, layout.length


def _after_prompt(layout: Layout) -> tuple[Ints, Ints]:
    """Skip as many tokens as the prompt has alone: where it meets the text, tokens may merge."""
    return np.minimum(layout.prompt, layout.length), layout.length


def _pooled(layout: Layout) -> tuple[Ints, Ints]:
    """Select the tokens that overlap the segments with `pool: true`, or with the span's tag."""
    return layout.marked_start, layout.marked_stop


def _continuation(layout: Layout) -> tuple[Ints, Ints]:
    """A continuation's tokens and the token before them; empty where there is none before."""
    start = np.maximum(layout.marked_start - 1, 0)
    return start, np.where(layout.marked_start > 0, layout.marked_stop, start)


def _last_token(layout: Layout) -> tuple[Ints, Ints]:
    """Select the last token, EOS included."""
    return np.maximum(layout.length - 1, 0), layout.length


def _first_token(layout: Layout) -> tuple[Ints, Ints]:
    """Select the first token, BOS included."""
    return np.zeros_like(layout.length), np.minimum(layout.length, 1)


def _tail(layout: Layout) -> tuple[Ints, Ints]:
    """Select the template's tokens after the text, or the closing special tokens if it has none."""
    open_end = layout.length - layout.closing
    stop = np.where(open_end > layout.text_stop, open_end, layout.length)
    return layout.text_stop, stop


SPANS: dict[str, Callable[[Layout], tuple[Ints, Ints]]] = {
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
