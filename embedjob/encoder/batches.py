"""From token views to the padded tensors of one micro-batch.

Legend: V views, T tokens.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedjob.text.views import TokenViews

Side = Literal["left", "right"]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MicroBatch:
    """Views padded to one length: ids, which of them are real, and which count for pooling."""

    ids_VT: Tensor
    mask_VT: Tensor
    span_VT: Tensor


def assemble(
    views: TokenViews, which: Indices, *, side: Side = "right", whole: bool = True
) -> MicroBatch:
    """The chosen views, or what comes after their prefixes, padded to the longest of them."""
    skip = np.zeros(len(which), np.int64) if whole else views.prefix_lengths[which]
    lengths = views.lengths[which] - skip
    longest = int(lengths.max())
    first = longest - lengths if side == "left" else np.zeros_like(lengths)
    ids_VT = np.zeros((len(which), longest), np.int64)
    for row, view in enumerate(which):
        ids = views.full_ids(int(view)) if whole else views.own_ids(int(view))
        ids_VT[row, first[row] : first[row] + lengths[row]] = ids
    position_VT = np.arange(longest) - first[:, None]
    span = views.span[which] - skip[:, None]
    mask_VT = (position_VT >= 0) & (position_VT < lengths[:, None])
    span_VT = (position_VT >= span[:, :1]) & (position_VT < span[:, 1:])
    return MicroBatch(*map(torch.from_numpy, (ids_VT, mask_VT, span_VT)))


def distinct(views: TokenViews) -> tuple[Indices, Indices]:
    """One view of each kind, and for every view which of those it equals in ids and span."""
    seen: dict[tuple[int, bytes, bytes], int] = {}
    firsts: list[int] = []
    which = np.empty(len(views.prefix), np.int64)
    for view in range(len(views.prefix)):
        ids = views.own_ids(view)
        key = (int(views.prefix[view]), ids.tobytes(), views.span[view].tobytes())
        which[view] = seen.setdefault(key, len(firsts))
        if which[view] == len(firsts):
            firsts.append(view)
    return np.array(firsts, np.int64), which
