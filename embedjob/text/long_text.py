"""Long texts: split into texts of their own, or read as one and pooled part by part."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from embedjob.text.arrays import Flags, Ints, offsets_of
from embedjob.text.encoding import PromptEncoder
from embedjob.text.prompts import Prompt
from embedjob.text.truncation import FittedViews
from embedjob.text.views import PooledParts, TextUnits, TokenViews

# A longer forward costs more memory than most devices have; tokens beyond it are cut.
MOST_TOKENS = 32_768
# Long texts are read a window of characters at a time.
_WINDOW, _GROWTH = 50_000, 4
# The last tokens of a window may differ from the text's own; no part ends among them.
_DOUBTFUL = 128

FitTexts = Callable[[Sequence[str]], FittedViews]


class Borders(NamedTuple):
    """Where a text may be split: before these tokens, at these characters; best where `clean`.

    Elsewhere a token holds bytes of the characters on both sides. The first token has no border.
    """

    tokens: Ints
    places: Ints
    clean: Flags

    def before(self, limit: int, first: int) -> int:
        """Return the last border, from number `first` on, that is at most before token `limit`.

        A clean border is preferred; the first border is returned if none comes so early.
        """
        after = int(np.searchsorted(self.tokens, limit, side="right"))
        clean = np.flatnonzero(self.clean[first:after])
        return first + int(clean[-1]) if len(clean) else max(after - 1, first)

    def near(self, token: int, slack: int) -> int:
        """Return the first border at or after a token; prefer a clean one within `slack`."""
        first = int(np.searchsorted(self.tokens, token))
        until = int(np.searchsorted(self.tokens, token + slack, side="right"))
        clean = np.flatnonzero(self.clean[first:until])
        return first + int(clean[0]) if len(clean) else first


def find_borders(chars: Ints) -> Borders:
    """Return the borders of tokens that hold these characters [T, 2]."""
    if not len(chars):
        return Borders(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.bool_))
    starts = np.maximum.accumulate(np.maximum(chars[:, 0], 0))
    stops = np.maximum.accumulate(np.maximum(chars[:, 1], 0))
    clean = starts[1:] >= stops[:-1]
    tokens = 1 + np.flatnonzero((starts[1:] > starts[:-1]) | (clean & (starts[1:] > 0)))
    places, first = np.unique(starts[tokens], return_index=True)
    return Borders(tokens[first], places, clean[tokens[first] - 1])


def divide_span(
    fitted: FittedViews, span: npt.NDArray[np.int32], texts: Sequence[str], most: int
) -> PooledParts:
    """Divide the spans of views into even parts of at most about `most` text tokens each.

    The first part also holds what the span has before the text, the last part what it has after.
    """
    spans, chars = [], []
    for row, text in enumerate(texts):
        first, stop = fitted.text[row]
        # Cut texts end before their own end; blanks before the first token belong to its part.
        ranges = fitted.chars.get(row, np.array([[0, len(text)]]))
        end = int(ranges[:, 1].max(initial=0)) if fitted.truncated[row] else len(text)
        tokens, places = _even(ranges, -(-int(stop - first) // most), end)
        inner = np.maximum(first + tokens, span[row, 0])
        edges = np.array([span[row, 0], *inner, span[row, 1]], np.int32)
        spans.append(np.stack([edges[:-1], edges[1:]], axis=1))
        ends = np.array([0, *places, end], np.int64)
        chars.append(np.stack([ends[:-1], ends[1:]], axis=1))
    nothing = np.zeros((0, 2), np.int32)
    return PooledParts(
        offsets=offsets_of(np.fromiter(map(len, spans), np.int64, len(spans))),
        span=np.concatenate([nothing, *spans]),
        chars=np.concatenate([nothing.astype(np.int64), *chars]),
    )


def _even(ranges: Ints, count: int, end: int) -> tuple[Ints, Ints]:
    """Return where all parts but the first begin, in tokens and in characters."""
    edges = find_borders(ranges)
    total = len(ranges)
    near = [edges.near(total * part // count, total // count // 2) for part in range(1, count)]
    chosen = np.unique(np.array(near, np.int64))
    chosen = chosen[chosen < len(edges.tokens)]
    chosen = chosen[edges.places[chosen] < end]
    return edges.tokens[chosen], edges.places[chosen]


@dataclass
class _Remainder:
    """A text that is being split: how far it is, and how many tokens its parts may have."""

    text: str
    room: int
    start: int = 0
    reach: int = _WINDOW
    step: int = 1

    @property
    def window(self) -> str:
        return self.text[self.start : self.start + self.reach]

    @property
    def ends(self) -> bool:
        return self.start + self.reach >= len(self.text)


class _Part(NamedTuple):
    """A part of a text, and whether it cannot be split: one character or one token."""

    text: str
    atom: bool


@dataclass(frozen=True)
class CutTexts:
    """Texts in parts, each put into all templates; text r starts at part offsets[r]."""

    parts: list[str]
    offsets: Ints
    fitted: FittedViews


class Cutter:
    """Splits texts into parts that fit under every template, each a text of its own."""

    def __init__(self, tokenizer: Tokenizer, fit: FitTexts, *, per_text: int) -> None:
        """Take the tokenizer; `fit` puts texts into all `per_text` templates, text-major."""
        self._encoder = PromptEncoder(tokenizer, (Prompt("", ""),), special_tokens=False)
        self._fit = fit
        self._per_text = per_text

    def cut(self, texts: Sequence[str]) -> CutTexts:
        """Return the parts of each text; a text that fits is its only part.

        In rounds, a batch each: the next parts of every text are counted out in tokens and put into
        the templates; the parts before the first that does not fit are taken.
        """
        whole = self._fit(texts)
        strings, fits = list(texts), [whole]
        over = self._over(whole)
        units_of = [[] if long else [row] for row, long in enumerate(over)]
        long = np.flatnonzero(over).tolist()
        todo = {row: self._begun(texts[row], whole, row) for row in long}
        while todo:
            planned = self._planned(todo)
            round_of = [part.text for parts in planned.values() for part in parts]
            fits.append(self._fit(round_of))
            over, kept = self._over(fits[-1]), self._fewest(fits[-1])
            first = 0
            for row, parts in planned.items():
                mine = slice(first, first + len(parts))
                taken = _take(todo[row], parts, over[mine], kept[mine])
                units_of[row] += range(len(strings) + first, len(strings) + first + taken)
                first += len(parts)
            strings += round_of
            todo = {row: rest for row, rest in todo.items() if rest.start < len(rest.text)}
        units = np.array([unit for row in units_of for unit in row], np.int64)
        views = (units[:, None] * self._per_text + np.arange(self._per_text)).reshape(-1)
        sizes = np.fromiter(map(len, units_of), np.int64, len(units_of))
        return CutTexts([strings[unit] for unit in units], offsets_of(sizes), _chosen(fits, views))

    def _over(self, fitted: FittedViews) -> Flags:
        """Return which texts do not fit under some template."""
        return np.asarray(fitted.truncated.reshape(-1, self._per_text).any(axis=1))

    def _fewest(self, fitted: FittedViews) -> Ints:
        """Return the text tokens of each text under the template that keeps fewest."""
        sizes = np.diff(fitted.text, axis=1).reshape(-1, self._per_text)
        fewest: Ints = sizes.min(axis=1)
        return fewest

    def _begun(self, text: str, whole: FittedViews, row: int) -> _Remainder:
        views = slice(row * self._per_text, (row + 1) * self._per_text)
        sizes = np.diff(whole.text[views], axis=1)[:, 0]
        return _Remainder(text, max(1, int(sizes[whole.truncated[views]].min())))

    def _planned(self, todo: dict[int, _Remainder]) -> dict[int, list[_Part]]:
        """Return the next parts of each text, as many as its window holds."""
        windows = [rest.window for rest in todo.values()]
        encodings = self._encoder.encode([0] * len(windows), windows, offsets=True)
        planned = {}
        for (row, rest), window, encoding in zip(todo.items(), windows, encodings, strict=True):
            chars = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            planned[row] = _counted(window, chars, rest.room, whole=rest.ends)
            if not planned[row]:
                rest.reach *= _GROWTH
        return planned


def _counted(window: str, chars: Ints, room: int, *, whole: bool) -> list[_Part]:
    """Return the window's parts of at most `room` tokens, or of one character that has more."""
    edges = find_borders(chars)
    last = len(chars) if whole else len(chars) - _DOUBTFUL
    parts: list[_Part] = []
    done = start = first = 0
    while done + room < last and first < len(edges.tokens):
        border = edges.before(done + room, first)
        if edges.tokens[border] > last:
            break
        done, stop = int(edges.tokens[border]), int(edges.places[border])
        parts.append(_Part(window[start:stop], border == first))
        start, first = stop, border + 1
    if whole:
        parts.append(_Part(window[start:], first == len(edges.tokens)))
    return parts


def _take(rest: _Remainder, parts: list[_Part], over: Flags, kept: Ints) -> int:
    """Count the parts before the first that does not fit, and plan smaller ones from there on."""
    for number, (part, too_long, tokens) in enumerate(zip(parts, over, kept, strict=True)):
        if too_long and not part.atom:
            rest.room = max(1, min(int(tokens), rest.room - rest.step))
            rest.step *= 2
            return number
        rest.start += len(part.text)
    return len(parts)


def _chosen(fits: Sequence[FittedViews], views: Ints) -> FittedViews:
    """Return these views of all that were fitted, in this order."""
    ids = [row for fitted in fits for row in fitted.ids]
    text, marked, truncated, characters = (
        np.concatenate([getattr(fitted, name) for fitted in fits])[views]
        for name in ("text", "marked", "truncated", "characters")
    )
    return FittedViews([ids[view] for view in views], text, marked, truncated, characters)


def regroup_units(views: TokenViews, offsets: Ints, tokens: Ints) -> TokenViews:
    """Return the views with text r in units offsets[r] to offsets[r + 1]; `tokens` is [N].

    `tokens` are the text tokens of each view. A unit without a text token, or without a token in
    its span, is left out where its text has others.
    """
    full = (views.span[:, 0] < views.span[:, 1]) & (tokens > 0)
    counts = np.asarray(full.reshape(-1, views.views_per_text).all(axis=1))
    texts = len(offsets) - 1
    owner = np.repeat(np.arange(texts), np.diff(offsets))
    hollow = np.bincount(owner[counts], minlength=texts) == 0
    counts[offsets[:-1][hollow]] = True
    sizes = np.bincount(owner[counts], minlength=texts)
    kept = np.repeat(counts, views.views_per_text)
    cuts = TextUnits(offsets_of(sizes), np.maximum(tokens[kept], 1))
    return replace(views.take(np.flatnonzero(counts)), cuts=cuts)


def shift_parts(parts: PooledParts, starts: Ints) -> PooledParts:
    """Shift the parts' characters by where each divided text begins in the text as read [R]."""
    return replace(parts, chars=parts.chars + np.repeat(starts, np.diff(parts.offsets))[:, None])
