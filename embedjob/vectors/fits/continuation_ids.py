"""Continuations as tensors: what a fit has sampled, token ids in order, one run for each.

Shapes: N continuations, T tokens of all of them.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from embedjob.config.heads import TokenIds
from embedjob.vectors.fits.fitted import Fitted


def fitted_continuations(continuations: Sequence[Sequence[int]], *, texts: int) -> Fitted:
    """Return continuations that were sampled after so many texts as what a fit left."""
    flat = [token for one in continuations for token in one]
    tensors: dict[str, Any] = {
        "ids": np.array(flat, np.int64),
        "offsets": np.cumsum([0, *map(len, continuations)], dtype=np.int64),
    }
    return Fitted("continuations", texts, len(continuations), tensors, {"tokens": len(flat)})


def continuation_ids(fitted: Fitted) -> tuple[TokenIds, ...]:
    """Return the ids of each continuation that a fit left [N]."""
    flat = fitted.tensors["ids"].tolist()
    edges = fitted.tensors["offsets"].tolist()
    return tuple(tuple(flat[start:stop]) for start, stop in pairwise(edges))


def continuations_problem(fitted: Fitted) -> str | None:
    """Return why tensors are no continuations; None where they are."""
    if set(fitted.tensors) != {"ids", "offsets"}:
        return f"it holds {', '.join(sorted(fitted.tensors)) or 'nothing'}"
    ids_T, offsets = fitted.tensors["ids"], fitted.tensors["offsets"]
    if ids_T.dtype != np.int64 or offsets.dtype != np.int64 or ids_T.ndim != 1:
        return "its ids are no whole numbers in a row"
    if offsets.shape != (fitted.width + 1,) or offsets[0] != 0 or offsets[-1] != len(ids_T):
        return f"it has no ids for each of {fitted.width} continuations"
    if (np.diff(offsets) < 1).any() or (ids_T < 0).any():
        return "a continuation has no token, or an id below 0"
    return None
