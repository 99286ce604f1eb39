"""Deduplication: all views of a chunk to their vectors, equal views and shared tokens once.

Legend: R texts or parts of them, U units (texts, or views of them), V views, P parts, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from embedjob.encoder.batching.forward import Loaded, TreeForward, ViewForward, worth_as_trees
from embedjob.encoder.batching.padding import distinct_views
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

_COUNTED = ["forward_tokens", "padded_tokens", "microbatches", "attended_pairs", "copy_seconds"]
_EMPTY_SPAN = ("empty_span", "no token of the view counts for pooling")


@dataclass(frozen=True)
class ChunkCallbacks:
    """Called between micro-batches: whether to stop, and with the texts and tokens done so far."""

    stop: Callable[[], bool]
    on_progress: Callable[[int, int], None]


@dataclass
class EncodeResult:
    """The vectors of distinct views, NaN where `failed` holds a reason.

    `which_RV` gives the vector of each view of each text. If views are pooled part by part, the
    vectors are those of the parts, and `which_RV` gives the vector of each part [P, 1]. `rows` are
    the sparse entries by distinct view, if there is a sparse head.
    """

    vectors_VD: Vectors
    which_RV: Ints
    budget: int
    failed: dict[int, tuple[str, str]] = field(default_factory=dict)
    stats: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_COUNTED, 0))
    rows: dict[int, Row] = field(default_factory=dict)

    def add(self, result: ForwardResult, vectors: Ints) -> None:
        """Add the result of units that have these vectors [U, V]."""
        self.vectors_VD[vectors] = result.vectors_VD.reshape(*vectors.shape, -1)
        for unit, reason in result.failed.items():
            self.failed.update(dict.fromkeys(vectors[unit].tolist(), reason))
        self.budget = result.budget
        self.stats["forward_tokens"] += result.tokens
        self.stats["padded_tokens"] += result.padded_tokens
        self.stats["microbatches"] += result.microbatches
        self.stats["attended_pairs"] += result.pairs
        self.stats["copy_seconds"] += result.copy_seconds


def encode_distinct(
    views: TokenViews, loaded: Loaded, *, budget: int, callbacks: ChunkCallbacks
) -> EncodeResult:
    """Return the vectors of all views that have a span, and why other views have none.

    Raises:
        InterruptedRunError: `callbacks.stop` returned true.
        DeviceLostError: the device failed, and its process must end.
    """
    firsts, which = distinct_views(views)
    offsets = vector_offsets(views, firsts)
    which_RV = vector_numbers(views, which, offsets)
    full = views.span[firsts, 0] < views.span[firsts, 1]
    texts = _distinct_texts(which_RV, np.flatnonzero(worth_as_trees(views, loaded)))
    outside_trees = np.setdiff1d(np.flatnonzero(full), which_RV[texts])
    width, run_before = loaded.readout.width, loaded.prefixes.tokens_run
    result = EncodeResult(np.full((offsets[-1], width), np.nan, np.float32), which_RV, budget)
    empty = np.flatnonzero(np.repeat(~full, np.diff(offsets)))
    result.failed.update(dict.fromkeys(empty.tolist(), _EMPTY_SPAN))
    lengths = views.lengths[firsts]
    progress = _Progress(np.bincount(which, minlength=len(firsts)), lengths, views.texts)
    by_view = [
        (ViewForward(views, firsts[group], loaded), group)
        for group in by_vector_count(offsets, outside_trees)
    ]
    forwards: list[tuple[Forward, Ints]] = [
        (TreeForward(views, texts, loaded), which_RV[texts]),
        *((forward, group[:, None]) for forward, group in by_view),
    ]
    for forward, units in forwards:
        per_batch = Callbacks(callbacks.stop, progress.counter(units, callbacks.on_progress))
        if len(units):
            vectors = gather(offsets, units.reshape(-1))[0].reshape(len(units), -1)
            result.add(
                run_microbatches(forward, budget=result.budget, callbacks=per_batch), vectors
            )
    for view_forward, group in by_view:
        result.rows.update({int(group[view]): row for view, row in view_forward.rows.items()})
    prefix_tokens = loaded.prefixes.tokens_run - run_before
    result.stats["forward_tokens"] += prefix_tokens
    result.stats["padded_tokens"] += prefix_tokens
    saved = int(lengths[full].sum()) - result.stats["forward_tokens"]
    result.stats.update(prefix_tokens_saved=saved, distinct_views=int(offsets[-1]) - len(empty))
    return result


def vector_offsets(views: TokenViews, firsts: Ints) -> Ints:
    """Return where the vectors of each of F distinct views begin and the last end [F + 1].

    A view has a single vector, or a vector for each of its parts.
    """
    if views.parts is None:
        return np.arange(len(firsts) + 1)
    return offsets_of(np.diff(views.parts.offsets)[firsts])


def vector_numbers(views: TokenViews, which: Ints, offsets: Ints) -> Ints:
    """Return the vectors of every unit [U, V]; view i equals distinct view which[i].

    If views have parts, return the vector of every part [P, 1].
    """
    if views.parts is None:
        return which.reshape(-1, views.views_per_text)
    return gather(offsets, which)[0][:, None]


def by_vector_count(offsets: Ints, chosen: Ints) -> list[Ints]:
    """Split the chosen distinct views into groups of equally many vectors, most vectors first."""
    counts = np.diff(offsets)[chosen]
    return [chosen[counts == count] for count in np.unique(counts)[::-1]]


def _distinct_texts(which_RV: Ints, texts: Ints) -> Ints:
    """Return these texts without repetitions."""
    return texts[np.unique(which_RV[texts], axis=0, return_index=True)[1]]


@dataclass
class _Progress:
    """Texts and tokens done so far; a distinct view counts for all views that equal it."""

    counts: Ints
    lengths: Ints
    texts: int
    views: int = 0
    tokens: int = 0

    def counter(
        self, units: Ints, on_progress: Callable[[int, int], None]
    ) -> Callable[[Ints], None]:
        """Return the callback that counts units as done and reports the progress."""

        def on_views(done: Ints) -> None:
            views = units[done]
            self.views += int(self.counts[views].sum())
            self.tokens += int((self.counts * self.lengths)[views].sum())
            on_progress(self.views * self.texts // int(self.counts.sum()), self.tokens)

        return on_views
