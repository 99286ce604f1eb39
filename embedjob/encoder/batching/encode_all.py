"""All views of a chunk to their vectors: equal ones once, and what views share once.

Legend: R texts or parts of them, V views, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from embedjob.encoder.batching.forward import Loaded, TreeForward, ViewForward, worthwhile
from embedjob.encoder.batching.padding import distinct
from embedjob.encoder.batching.scheduler import (
    Callbacks,
    Forward,
    ForwardResult,
    run_microbatches,
)
from embedjob.text.arrays import Ints, gather, offsets_of
from embedjob.text.views import TokenViews
from embedjob.vectors.encoded import Vectors
from embedjob.vectors.sparse import Row


def vector_offsets(views: TokenViews, firsts: Ints) -> Ints:
    """Where the vectors of each of these views begin among those of all, and the end [F + 1].

    A view has one, or one of each of its parts.
    """
    if views.parts is None:
        return np.arange(len(firsts) + 1)
    return offsets_of(np.diff(views.parts.offsets)[firsts])


def vectors_of(views: TokenViews, which: Ints, offsets: Ints) -> Ints:
    """The vectors of every unit [U, V], of which view i is different view number which[i].

    Of views in parts, the vector of every part [P, 1].
    """
    if views.parts is None:
        return which.reshape(-1, views.views_per_text)
    return gather(offsets, which)[0][:, None]


def alike(offsets: Ints, chosen: Ints) -> list[Ints]:
    """The chosen ones of different views in runs of as many vectors each, most first."""
    counts = np.diff(offsets)[chosen]
    return [chosen[counts == count] for count in np.unique(counts)[::-1]]


Failures = dict[int, tuple[str, str]]
_COUNTED = ["forward_tokens", "padded_tokens", "microbatches", "attended_pairs", "copy_seconds"]
_EMPTY_SPAN = ("empty_span", "no token of the view counts for pooling")


@dataclass(frozen=True)
class ChunkCallbacks:
    """Asked between micro-batches whether to stop, and told the texts and tokens done so far."""

    stop: Callable[[], bool]
    on_progress: Callable[[int, int], None]


@dataclass
class EncodeResult:
    """The vectors of distinct views, NaN where `failed` says why; `which_RV` is each text's.

    Of views that are pooled part by part they are those of the parts, and `which_RV` is each
    part's. `rows` are the sparse entries of the views, where they are asked for.
    """

    vectors_VD: Vectors
    which_RV: Ints
    budget: int
    failed: Failures = field(default_factory=dict)
    stats: dict[str, float] = field(default_factory=dict)
    rows: dict[int, Row] = field(default_factory=dict)

    def take(self, passage: ForwardResult, units: Ints) -> None:
        """Adds what came of units [N, V], each some of the vectors."""
        self.vectors_VD[units] = passage.vectors_VD.reshape(*units.shape, -1)
        for unit, reason in passage.failed.items():
            self.failed.update(dict.fromkeys(units[unit].tolist(), reason))
        self.budget = passage.budget
        self.stats["forward_tokens"] += passage.tokens
        self.stats["padded_tokens"] += passage.padded_tokens
        self.stats["microbatches"] += passage.microbatches
        self.stats["attended_pairs"] += passage.pairs
        self.stats["copy_seconds"] += passage.copy_seconds


def encode_distinct(
    views: TokenViews, loaded: Loaded, *, budget: int, callbacks: ChunkCallbacks
) -> EncodeResult:
    """The vectors of all views that have a span, and why some have none."""
    firsts, which = distinct(views)
    offsets = vector_offsets(views, firsts)
    which_RV = vectors_of(views, which, offsets)
    full = views.span[firsts, 0] < views.span[firsts, 1]
    texts = _unlike(which_RV, np.flatnonzero(worthwhile(views, loaded)))
    alone = np.setdiff1d(np.flatnonzero(full), which_RV[texts])
    width, run_before = loaded.readout.width, loaded.prefixes.tokens_run
    passed = EncodeResult(np.full((offsets[-1], width), np.nan, np.float32), which_RV, budget)
    empty = np.flatnonzero(np.repeat(~full, np.diff(offsets)))
    passed.failed.update(dict.fromkeys(empty.tolist(), _EMPTY_SPAN))
    passed.stats = dict.fromkeys(_COUNTED, 0)
    lengths = views.lengths[firsts]
    progress = _Progress(np.bincount(which, minlength=len(firsts)), lengths, views.texts)
    singles = [(ViewForward(views, firsts[some], loaded), some) for some in alike(offsets, alone)]
    ways: list[tuple[Forward, Ints]] = [
        (TreeForward(views, texts, loaded), which_RV[texts]),
        *((single, some[:, None]) for single, some in singles),
    ]
    for forward, units in ways:
        per_batch = Callbacks(callbacks.stop, progress.of(units, callbacks.on_progress))
        if len(units):
            passage = run_microbatches(forward, budget=passed.budget, callbacks=per_batch)
            vectors = gather(offsets, units.reshape(-1))[0].reshape(len(units), -1)
            passed.take(passage, vectors)
    for single, some in singles:
        passed.rows.update({int(some[view]): row for view, row in single.rows.items()})
    prefix_tokens = loaded.prefixes.tokens_run - run_before
    passed.stats["forward_tokens"] += prefix_tokens
    passed.stats["padded_tokens"] += prefix_tokens
    saved = int(lengths[full].sum()) - passed.stats["forward_tokens"]
    passed.stats.update(prefix_tokens_saved=saved, distinct_views=int(offsets[-1]) - len(empty))
    return passed


def _unlike(which_RV: Ints, texts: Ints) -> Ints:
    """Of these texts, one of each kind."""
    return texts[np.unique(which_RV[texts], axis=0, return_index=True)[1]]


@dataclass
class _Progress:
    """Texts and tokens done so far; a view that stands for several equal ones counts so."""

    counts: Ints
    lengths: Ints
    texts: int
    views: int = 0
    tokens: int = 0

    def of(self, units: Ints, on_progress: Callable[[int, int], None]) -> Callable[[Ints], None]:
        """What tells the progress when units of views have passed."""

        def on_units(passed: Ints) -> None:
            views = units[passed]
            self.views += int(self.counts[views].sum())
            self.tokens += int((self.counts * self.lengths)[views].sum())
            on_progress(self.views * self.texts // int(self.counts.sum()), self.tokens)

        return on_units
