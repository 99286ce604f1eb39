"""Micro-batches: which views go through the model together."""

import numpy as np
import numpy.typing as npt

from embedjob.text.arrays import Ints

# A CUDA kernel over more than 65,535 views does not start.
_MOST_VIEWS = 1 << 15


def microbatches(
    lengths: npt.NDArray[np.integer],
    *,
    budget: int,
    bearable_padding: int | None = None,
    groups: npt.NDArray[np.integer] | int = 0,
) -> list[Ints]:
    """Return batches of view indices, longest first, each at most `budget` tokens when padded.

    A view longer than the budget goes alone, never more than 32,768 go together, and never views of
    different groups. With `bearable_padding`, a batch also ends before it has more tokens of
    padding. The longest views of a group come first, so that a lack of memory shows early and not
    after hours.
    """
    grouped = np.broadcast_to(groups, lengths.shape)
    order = np.lexsort((-lengths.astype(np.int64), grouped))
    borders = np.flatnonzero(np.diff(grouped[order])) + 1
    batches = []
    for group in np.split(order, borders) if len(order) else ():
        sizes = np.maximum(1, lengths[group].astype(np.int64))
        start = 0
        while start < len(group):
            stop = start + min(_MOST_VIEWS, max(1, budget // int(sizes[start])))
            if bearable_padding is not None:
                padding = np.cumsum(sizes[start] - sizes[start:stop])
                stop = start + int(np.searchsorted(padding, bearable_padding, side="right"))
            batches.append(group[start:stop])
            start = stop
    return batches
