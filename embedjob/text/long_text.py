"""Long texts in parts: cut into texts of their own, or read as one and pooled part by part."""

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


class Borders(NamedTuple):
    """Where a text may be cut: before these tokens, at these characters; best where `clean`.

    Elsewhere a token holds bytes of the characters on both sides. The first token is never one.
    """

    tokens: Ints
    places: Ints
    clean: Flags

    def before(self, limit: int, first: int) -> int:
        """The last border, from number `first` on, that comes at most before token `limit`.

        A clean one if there is any; the first one if none comes so early.
        """
        after = int(np.searchsorted(self.tokens, limit, side="right"))
        clean = np.flatnonzero(self.clean[first:after])
        return first + int(clean[-1]) if len(clean) else max(after - 1, first)

    def near(self, token: int, slack: int) -> int:
        """The first border that does not come before a token; a clean one if it is near."""
        first = int(np.searchsorted(self.tokens, token))
        until = int(np.searchsorted(self.tokens, token + slack, side="right"))
        clean = np.flatnonzero(self.clean[first:until])
        return first + int(clean[0]) if len(clean) else first


def find_borders(chars: Ints) -> Borders:
    """The borders of tokens that hold these characters [T, 2]."""
    if not len(chars):
        return Borders(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.bool_))
    starts = np.maximum.accumulate(np.maximum(chars[:, 0], 0))
    stops = np.maximum.accumulate(np.maximum(chars[:, 1], 0))
    clean = starts[1:] >= stops[:-1]
    tokens = 1 + np.flatnonzero((starts[1:] > starts[:-1]) | (clean & (starts[1:] > 0)))
    places, first = np.unique(starts[tokens], return_index=True)
    return Borders(tokens[first], places, clean[tokens[first] - 1])


# A forward longer than this costs more memory than most devices have; what is beyond it is cut.
MOST_TOKENS = 32_768
# As long texts are cut, they are read a window at a time: their tokens are counted by then.
_WINDOW, _GROWTH = 50_000, 4
# The last tokens of a window may not be those of the text; nothing that ends among them is used.
_DOUBTFUL = 128

Fit = Callable[[Sequence[str]], FittedViews]


def divide_span(
    fitted: FittedViews, span: npt.NDArray[np.int32], texts: Sequence[str], most: int
) -> PooledParts:
    """The spans of views, shared out over even parts of at most about `most` text tokens each.

    What a span holds before the text is the first part's, and what it holds after it the last's.
    """
    spans, chars = [], []
    for row, text in enumerate(texts):
        first, stop = fitted.text[row]
        # Cut texts end before their own end, and blanks before the first token are of its part.
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
    """Where so many parts begin but the first, in tokens and in characters."""
    found = find_borders(ranges)
    total = len(ranges)
    near = [found.near(total * part // count, total // count // 2) for part in range(1, count)]
    chosen = np.unique(np.array(near, np.int64))
    chosen = chosen[chosen < len(found.tokens)]
    chosen = chosen[found.places[chosen] < end]
    return found.tokens[chosen], found.places[chosen]


@dataclass
class _Text:
    """One text that is being cut: how far it is, and how many tokens its parts may have."""

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
    """A part of a text, and whether it is one character of several tokens, or a token."""

    text: str
    atom: bool


@dataclass(frozen=True)
class CutTexts:
    """Texts in parts, each put into all templates: those of text r are offsets[r] and on."""

    parts: list[str]
    offsets: Ints
    fitted: FittedViews


class Cutter:
    """Cuts texts into parts that fit under every template, each a text of its own."""

    def __init__(self, tokenizer: Tokenizer, fit: Fit, *, per_text: int) -> None:
        """`fit` puts texts into all `per_text` templates, text-major."""
        self._encoder = PromptEncoder(tokenizer, (Prompt("", ""),), special_tokens=False)
        self._fit = fit
        self._per_text = per_text

    def cut(self, texts: Sequence[str]) -> CutTexts:
        """The parts of each text; a text that fits is its only part.

        In rounds, a batch each: the next parts of every text are counted out in tokens, put into
        the templates, and those are taken that come before the first that does not fit there.
        """
        whole = self._fit(texts)
        strings, fits = list(texts), [whole]
        over = self._over(whole)
        found = [[] if long else [row] for row, long in enumerate(over)]
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
                found[row] += range(len(strings) + first, len(strings) + first + taken)
                first += len(parts)
            strings += round_of
            todo = {row: one for row, one in todo.items() if one.start < len(one.text)}
        units = np.array([unit for row in found for unit in row], np.int64)
        views = (units[:, None] * self._per_text + np.arange(self._per_text)).reshape(-1)
        sizes = np.fromiter(map(len, found), np.int64, len(found))
        return CutTexts([strings[unit] for unit in units], offsets_of(sizes), _chosen(fits, views))

    def _over(self, fitted: FittedViews) -> Flags:
        """The texts that do not fit under some template."""
        return np.asarray(fitted.truncated.reshape(-1, self._per_text).any(axis=1))

    def _fewest(self, fitted: FittedViews) -> Ints:
        """The text tokens of each text in the template where it has fewest."""
        sizes = np.diff(fitted.text, axis=1).reshape(-1, self._per_text)
        fewest: Ints = sizes.min(axis=1)
        return fewest

    def _begun(self, text: str, whole: FittedViews, row: int) -> _Text:
        views = slice(row * self._per_text, (row + 1) * self._per_text)
        sizes = np.diff(whole.text[views], axis=1)[:, 0]
        return _Text(text, max(1, int(sizes[whole.truncated[views]].min())))

    def _planned(self, todo: dict[int, _Text]) -> dict[int, list[_Part]]:
        """The next parts of each text, as many as its window holds."""
        windows = [one.window for one in todo.values()]
        encodings = self._encoder.encode([0] * len(windows), windows, offsets=True)
        planned = {}
        for (row, one), window, encoding in zip(todo.items(), windows, encodings, strict=True):
            chars = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            planned[row] = _counted(window, chars, one.room, whole=one.ends)
            if not planned[row]:
                one.reach *= _GROWTH
        return planned


def _counted(window: str, chars: Ints, room: int, *, whole: bool) -> list[_Part]:
    """The window's parts of at most `room` of these tokens, or of one character that has more."""
    found = find_borders(chars)
    last = len(chars) if whole else len(chars) - _DOUBTFUL
    parts: list[_Part] = []
    done = start = first = 0
    while done + room < last and first < len(found.tokens):
        border = found.before(done + room, first)
        if found.tokens[border] > last:
            break
        done, stop = int(found.tokens[border]), int(found.places[border])
        parts.append(_Part(window[start:stop], border == first))
        start, first = stop, border + 1
    if whole:
        parts.append(_Part(window[start:], first == len(found.tokens)))
    return parts


def _take(one: _Text, parts: list[_Part], over: Flags, kept: Ints) -> int:
    """How many parts come before the first that does not fit; the next ones are to be smaller."""
    for number, (part, too_long, tokens) in enumerate(zip(parts, over, kept, strict=True)):
        if too_long and not part.atom:
            one.room = max(1, min(int(tokens), one.room - one.step))
            one.step *= 2
            return number
        one.start += len(part.text)
    return len(parts)


def _chosen(fits: Sequence[FittedViews], views: Ints) -> FittedViews:
    """These views of all that were fitted, in this order."""
    ids = [row for one in fits for row in one.ids]
    text, marked, truncated, characters = (
        np.concatenate([getattr(one, name) for one in fits])[views]
        for name in ("text", "marked", "truncated", "characters")
    )
    return FittedViews([ids[view] for view in views], text, marked, truncated, characters)


def regroup_units(views: TokenViews, offsets: Ints, tokens: Ints) -> TokenViews:
    """These views with text r in units offsets[r] and on, every view of so many text tokens [N].

    A unit without a text token, or a token that counts, is left out where its text has others.
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
    """The parts of texts of which what was divided begins at these characters [R]."""
    return replace(parts, chars=parts.chars + np.repeat(starts, np.diff(parts.offsets))[:, None])
