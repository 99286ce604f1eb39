"""Which views go through the model together."""

import numpy as np
import numpy.typing as npt


def microbatches(
    lengths: npt.NDArray[np.integer], *, budget: int, groups: npt.NDArray[np.integer] | int = 0
) -> list[npt.NDArray[np.int64]]:
    """View indices, longest first, so that padded each batch holds at most `budget` tokens.

    A view longer than the budget goes alone, and views of different groups never go together. The
    longest of a group come first: what does not fit into memory fails early and not after hours.
    """
    grouped = np.broadcast_to(groups, lengths.shape)
    order = np.lexsort((-lengths.astype(np.int64), grouped))
    borders = np.flatnonzero(np.diff(grouped[order])) + 1
    batches = []
    for group in np.split(order, borders) if len(order) else ():
        start = 0
        while start < len(group):
            longest = max(1, int(lengths[group[start]]))
            stop = start + max(1, budget // longest)
            batches.append(group[start:stop])
            start = stop
    return batches
