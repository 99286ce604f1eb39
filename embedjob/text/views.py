"""Token views: what TOKENIZE hands to ENCODE, as flat arrays of integers."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Words:
    """The ids of texts' words: those of text r are `ids[offsets[r]:offsets[r + 1]]`."""

    ids: Ids
    offsets: npt.NDArray[np.int64]

    def of(self, text: int) -> Ids:
        """The ids of one text."""
        return self.ids[self.offsets[text] : self.offsets[text + 1]]

    def take(self, texts: npt.NDArray[np.integer]) -> "Words":
        """The words of these texts, in this order."""
        sizes = np.diff(self.offsets)[texts]
        offsets = offsets_of(sizes)
        source = np.repeat(self.offsets[texts] - offsets[:-1], sizes)
        return Words(self.ids[source + np.arange(offsets[-1])], offsets)


@dataclass(frozen=True)
class TokenViews:
    """N views of N / views_per_text texts, text-major: view v of text t is at t * V + v.

    `prefix[i]` is an index into `prefixes`, or -1 where view i shares none. After their prefixes
    all views of text r begin with the same `common[r]` ids, which only its first view keeps in
    `ids[offsets[i]:offsets[i + 1]]`. Spans are positions in the full view, and lie after both.
    Only where a recipe asks: `words` of each text, and `stops`, the ids that end a decoding.
    """

    views_per_text: int
    prefixes: tuple[Ids, ...]
    prefix: npt.NDArray[np.int32]
    ids: Ids
    offsets: npt.NDArray[np.int64]
    common: npt.NDArray[np.int32]
    span: npt.NDArray[np.int32]
    truncated: npt.NDArray[np.bool_]
    words: Words | None = None
    stops: Ids | None = None

    @property
    def texts(self) -> int:
        """How many texts these are the views of."""
        return len(self.prefix) // self.views_per_text

    @property
    def prefix_lengths(self) -> npt.NDArray[np.int64]:
        """Shared tokens before the ids of each view [N], 0 where none are shared."""
        return np.array([*map(len, self.prefixes), 0], np.int64)[self.prefix]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each full view [N]."""
        left_out = np.repeat(self.common.astype(np.int64), self.views_per_text)
        left_out[:: self.views_per_text] = 0
        return np.diff(self.offsets) + self.prefix_lengths + left_out

    def own_ids(self, view: int) -> Ids:
        """The ids of one view after its prefix."""
        ids = self.ids[self.offsets[view] : self.offsets[view + 1]]
        text, number = divmod(view, self.views_per_text)
        if not number or not self.common[text]:
            return ids
        start = self.offsets[view - number]
        return np.concatenate([self.ids[start : start + self.common[text]], ids])

    def full_ids(self, view: int) -> Ids:
        """All ids of one view, prefix included."""
        ids = self.own_ids(view)
        which = int(self.prefix[view])
        return ids if which < 0 else np.concatenate([self.prefixes[which], ids])

    def take(self, texts: Sequence[int] | npt.NDArray[np.integer]) -> "TokenViews":
        """The views of these texts, in this order; a text may be asked for twice."""
        chosen = np.asarray(texts, np.int64)[:, None] * self.views_per_text
        views = (chosen + np.arange(self.views_per_text)).reshape(-1)
        sizes = np.diff(self.offsets)[views]
        offsets = offsets_of(sizes)
        source = np.repeat(self.offsets[views] - offsets[:-1], sizes)
        return TokenViews(
            views_per_text=self.views_per_text,
            prefixes=self.prefixes,
            prefix=self.prefix[views],
            ids=self.ids[source + np.arange(offsets[-1])],
            offsets=offsets,
            common=self.common[np.asarray(texts, np.int64)],
            span=self.span[views],
            truncated=self.truncated[views],
            words=self.words and self.words.take(np.asarray(texts, np.int64)),
            stops=self.stops,
        )


def offsets_of(sizes: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Where each of N runs begins, and where the last ends [N + 1]."""
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def flatten(rows: Sequence[Sequence[int]]) -> tuple[Ids, npt.NDArray[np.int64]]:
    """All ids in one array, and the offsets of the rows in it."""
    sizes = np.fromiter(map(len, rows), np.int64, len(rows))
    offsets = offsets_of(sizes)
    return np.fromiter(chain.from_iterable(rows), np.uint32, int(offsets[-1])), offsets


def assemble(
    rows: Sequence[Sequence[int]],
    *,
    span: npt.NDArray[np.int32],
    truncated: npt.NDArray[np.bool_],
    prefixes: Sequence[Sequence[int]],
    text_first: bool = False,
) -> TokenViews:
    """The rows' views, one template per prefix, each prefix taken off wherever it can be shared.

    With `text_first`, what comes after the prefixes is shared by the views of a text as well.
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
        most = np.minimum(np.diff(offsets) - 1, span[:, 0]) - skip
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
    flat: Ids, starts: npt.NDArray[np.int64], most: npt.NDArray[np.int64], *, per_text: int
) -> npt.NDArray[np.int32]:
    """Per text, how many ids its runs of `flat` begin with alike: of each at most `most`."""
    begin = starts.reshape(-1, per_text)
    alike = np.maximum(most.reshape(-1, per_text).min(axis=1), 0)
    for view in range(1, per_text):
        step = np.arange(int(alike.sum())) - np.repeat(offsets_of(alike)[:-1], alike)
        first, other = (np.repeat(begin[:, column], alike) + step for column in (0, view))
        differ = np.flatnonzero(flat[first] != flat[other])
        text = np.repeat(np.arange(len(alike)), alike)[differ]
        np.minimum.at(alike, text, step[differ])
    shared: npt.NDArray[np.int32] = alike.astype(np.int32)
    return shared


def _begins_with(
    flat: Ids, offsets: npt.NDArray[np.int64], prefix: Sequence[int], mine: slice
) -> npt.NDArray[np.bool_]:
    """Which of a template's views are a non-empty prefix followed by at least one id more."""
    starts, sizes = offsets[:-1][mine], np.diff(offsets)[mine]
    fits = (sizes > len(prefix)) & (len(prefix) > 0)
    for position, token in enumerate(prefix if fits.any() else ()):
        # Rows that are out already, some of them too short, look at any token at all.
        fits &= flat[np.where(fits, starts + position, 0)] == token
    return fits
