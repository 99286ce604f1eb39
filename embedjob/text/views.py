"""Token views: the model's input, from TOKENIZE to ENCODE, as flat arrays of integers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from embedjob.text.arrays import Flags, Ids, Ints, flatten, gather, offsets_of


@dataclass(frozen=True)
class Words:
    """The ids of texts' words: text r has `ids[offsets[r]:offsets[r + 1]]`."""

    ids: Ids
    offsets: Ints

    def of(self, text: int) -> Ids:
        """Return the ids of one text."""
        return self.ids[self.offsets[text] : self.offsets[text + 1]]

    def take(self, texts: npt.NDArray[np.integer]) -> "Words":
        """Return the words of these texts, in this order."""
        entries, offsets = gather(self.offsets, np.asarray(texts, np.int64))
        return Words(self.ids[entries], offsets)


@dataclass(frozen=True)
class TextUnits:
    """Texts split into units, which the model reads as texts; text r starts at unit offsets[r].

    `tokens` [N] are the text tokens of every view: the weight of a unit among those of its text.
    """

    offsets: Ints
    tokens: Ints


@dataclass(frozen=True)
class PooledParts:
    """Texts of which several parts are pooled; text r starts at part offsets[r].

    `span` [P, 2] are positions in the text's only view, together the view's span; `chars` [P, 2]
    are the characters of each part in the text as read.
    """

    offsets: Ints
    span: npt.NDArray[np.int32]
    chars: Ints


@dataclass(frozen=True)
class TokenViews:
    """N views of N / views_per_text units, unit-major: view v of unit u is at u * V + v.

    A unit is a text, or with `cuts` a part of one. `prefix[i]` is an index into `prefixes`, or -1
    where view i shares none. After their prefixes all views of unit u begin with the same
    `common[u]` ids, which only its first view keeps in `ids[offsets[i]:offsets[i + 1]]`. Spans are
    positions in the full view, and lie after both; where they are scored, their first token may be
    the last of the common ids. For interventions, `slots[v]` is the position of
    template v's slot, after its prefix, and `auxiliary` holds one more view of each text, which has
    no vector of its own. Where a recipe needs them: `words` of each text, and `stops`, the ids that
    end a decoding.
    """

    views_per_text: int
    prefixes: tuple[Ids, ...]
    prefix: npt.NDArray[np.int32]
    ids: Ids
    offsets: Ints
    common: npt.NDArray[np.int32]
    span: npt.NDArray[np.int32]
    truncated: Flags
    words: Words | None = None
    stops: Ids | None = None
    cuts: TextUnits | None = None
    parts: PooledParts | None = None
    slots: tuple[int, ...] = ()
    auxiliary: "TokenViews | None" = None

    @property
    def units(self) -> int:
        """Return the number of units."""
        return len(self.prefix) // self.views_per_text

    @property
    def texts(self) -> int:
        """Return the number of texts."""
        return len(self.text_units) - 1

    @property
    def text_units(self) -> Ints:
        """Return the first unit of each text, and one past the last of all [R + 1]."""
        return np.arange(self.units + 1) if self.cuts is None else self.cuts.offsets

    @property
    def text_views(self) -> Ints:
        """Return the first view of each text, and one past the last of all [R + 1]."""
        return self.text_units * self.views_per_text

    @property
    def prefix_lengths(self) -> Ints:
        """Return the shared tokens before the ids of each view [N], 0 where none are shared."""
        return np.array([*map(len, self.prefixes), 0], np.int64)[self.prefix]

    @property
    def lengths(self) -> Ints:
        """Return the tokens of each full view [N]."""
        left_out = np.repeat(self.common.astype(np.int64), self.views_per_text)
        left_out[:: self.views_per_text] = 0
        return np.diff(self.offsets) + self.prefix_lengths + left_out

    def per_text(self, values: npt.NDArray[Any]) -> Ints:
        """Sum values of all views [N], numbers or flags, by text [R]."""
        total = offsets_of(values)
        return total[self.text_views[1:]] - total[self.text_views[:-1]]

    def spans(self, view: int) -> npt.NDArray[np.int32]:
        """Return the spans of one view that are pooled separately [P, 2]."""
        if self.parts is None:
            return self.span[view : view + 1]
        return self.parts.span[self.parts.offsets[view] : self.parts.offsets[view + 1]]

    def own_ids(self, view: int) -> Ids:
        """Return the ids of one view after its prefix."""
        ids = self.ids[self.offsets[view] : self.offsets[view + 1]]
        text, number = divmod(view, self.views_per_text)
        if not number or not self.common[text]:
            return ids
        start = self.offsets[view - number]
        return np.concatenate([self.ids[start : start + self.common[text]], ids])

    def full_ids(self, view: int) -> Ids:
        """Return all ids of one view, prefix included."""
        ids = self.own_ids(view)
        which = int(self.prefix[view])
        return ids if which < 0 else np.concatenate([self.prefixes[which], ids])

    def take(self, texts: Sequence[int] | npt.NDArray[np.integer]) -> "TokenViews":
        """Return the views of these texts, in this order; a text may be repeated."""
        chosen = np.asarray(texts, np.int64)
        units, text_units = gather(self.text_units, chosen)
        views = (units[:, None] * self.views_per_text + np.arange(self.views_per_text)).reshape(-1)
        ids, offsets = gather(self.offsets, views)
        return TokenViews(
            views_per_text=self.views_per_text,
            prefixes=self.prefixes,
            prefix=self.prefix[views],
            ids=self.ids[ids],
            offsets=offsets,
            common=self.common[units],
            span=self.span[views],
            truncated=self.truncated[views],
            words=self.words and self.words.take(np.asarray(texts, np.int64)),
            stops=self.stops,
            cuts=None if self.cuts is None else TextUnits(text_units, self.cuts.tokens[views]),
            parts=None if self.parts is None else _take(self.parts, chosen),
            slots=self.slots,
            auxiliary=None if self.auxiliary is None else self.auxiliary.take(texts),
        )


@dataclass(frozen=True)
class Passages:
    """Texts of their own [P], text r has those from offsets[r] to offsets[r + 1].

    `chars` [P, 2] are the characters of each in the text as read, all of them together; the blanks
    at both ends are no part of the passage's text. With `cut`, what stands before it was too long.
    """

    texts: list[str]
    offsets: Ints
    chars: Ints
    cut: Flags

    @property
    def owners(self) -> Ints:
        """Return the text of each passage [P]."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


# What stands before the passages of each text.
Headings = Sequence[str | None] | None


class Splits(Protocol):
    """What cuts texts into passages."""

    def __call__(self, texts: Sequence[str], headings: Headings = None) -> Passages:
        """Return the passages of texts; `headings` stand before those of each text."""
        ...


class TokenizesTexts(Protocol):
    """What the stages ask of a tokenizer; `splitter` is None where texts are not split."""

    @property
    def splitter(self) -> Splits | None:
        """Return what cuts texts into the passages whose views are asked for."""
        ...

    def views(self, texts: Sequence[str]) -> TokenViews:
        """Return the views of texts."""
        ...

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the ids as the tokenizer spells them, for people."""
        ...


def _take(parts: PooledParts, texts: Ints) -> PooledParts:
    which, offsets = gather(parts.offsets, texts)
    return PooledParts(offsets, parts.span[which], parts.chars[which])


def assemble(
    rows: Sequence[Sequence[int]],
    *,
    span: npt.NDArray[np.int32],
    truncated: Flags,
    prefixes: Sequence[Sequence[int]],
    text_first: bool = False,
    scored: bool = False,
) -> TokenViews:
    """Build the rows' views, one template per prefix; a prefix is taken off where it can be shared.

    With `text_first`, the views of a text also share what comes after the prefixes. Where spans are
    `scored` they share the first token of their spans too, which is read for what follows it.
    """
    flat, offsets = flatten(rows)
    per_text = len(prefixes)
    shared = np.full(len(rows), -1, np.int32)
    skip = np.zeros(len(rows), np.int64)
    for template, prefix in enumerate(prefixes):
        mine = slice(template, None, per_text)
        fits = _begins_with(flat, offsets, prefix, mine) & (span[mine, 0] >= len(prefix))
        shared[mine] = np.where(fits, template, -1)
        skip[mine] = np.where(fits, len(prefix), 0)
    common = np.zeros(len(rows) // per_text, np.int32)
    if text_first and per_text > 1 and len(set(map(tuple, prefixes))) == 1:
        most = np.minimum(np.diff(offsets) - 1, span[:, 0] + scored) - skip
        common = _shared_beginnings(flat, offsets[:-1] + skip, most, per_text=per_text)
        common[np.ptp(skip.reshape(-1, per_text), axis=1) > 0] = 0
        skip.reshape(-1, per_text)[:, 1:] += common[:, None]
    sizes = np.diff(offsets)
    position = np.arange(len(flat)) - np.repeat(offsets[:-1], sizes)
    return TokenViews(
        views_per_text=per_text,
        prefixes=tuple(np.asarray(prefix, np.uint32) for prefix in prefixes),
        prefix=shared,
        ids=flat[position >= np.repeat(skip, sizes)],
        offsets=offsets_of(sizes - skip),
        common=common,
        span=span,
        truncated=truncated,
    )


def _shared_beginnings(
    flat: Ids, starts: Ints, most: Ints, *, per_text: int
) -> npt.NDArray[np.int32]:
    """Count, per text, the ids with which its rows of `flat` begin alike, each at most `most`."""
    begin = starts.reshape(-1, per_text)
    alike = np.maximum(most.reshape(-1, per_text).min(axis=1), 0)
    for view in range(1, per_text):
        step = np.arange(int(alike.sum())) - np.repeat(offsets_of(alike)[:-1], alike)
        first, second = (np.repeat(begin[:, column], alike) + step for column in (0, view))
        differ = np.flatnonzero(flat[first] != flat[second])
        text = np.repeat(np.arange(len(alike)), alike)[differ]
        np.minimum.at(alike, text, step[differ])
    shared: npt.NDArray[np.int32] = alike.astype(np.int32)
    return shared


def _begins_with(flat: Ids, offsets: Ints, prefix: Sequence[int], mine: slice) -> Flags:
    """Return which of a template's views hold its prefix, if not empty, and more ids after it."""
    starts, sizes = offsets[:-1][mine], np.diff(offsets)[mine]
    fits = (sizes > len(prefix)) & (len(prefix) > 0)
    for position, token in enumerate(prefix if fits.any() else ()):
        # Rows that no longer fit, perhaps too short, compare an arbitrary token.
        fits &= flat[np.where(fits, starts + position, 0)] == token
    return fits
