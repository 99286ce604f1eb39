"""Which views go through the model together."""

import numpy as np
import numpy.typing as npt


def microbatches(lengths: npt.NDArray[np.integer], *, budget: int) -> list[npt.NDArray[np.int64]]:
    """View indices, longest first, so that padded each batch holds at most `budget` tokens.

    A view longer than the budget goes alone. The longest come first: what does not fit into
    memory fails at the start and not after hours.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    batches = []
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        stop = start + max(1, budget // longest)
        batches.append(order[start:stop])
        start = stop
    return batches
