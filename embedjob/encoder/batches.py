"""From token views to the padded tensors of one micro-batch.

Legend: R texts, V views, T tokens.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedjob.text.views import Ids, TokenViews

Side = Literal["left", "right"]
Indices = npt.NDArray[np.int64]
_PADDING = -1


@dataclass(frozen=True)
class MicroBatch:
    """Views padded to one length: ids, which of them are real, and which count for pooling."""

    ids_VT: Tensor
    mask_VT: Tensor
    span_VT: Tensor


@dataclass(frozen=True)
class Grove:
    """Trees padded to one length; `sees_RTT` is which token looks at which."""

    ids_RT: Tensor
    mask_RT: Tensor
    position_RT: Tensor
    sees_RTT: Tensor
    span_RVT: Tensor


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


def plant(views: TokenViews, texts: Indices, *, whole: bool) -> Grove:
    """The texts with their tails, after their prefix if they are not whole, padded on the right."""
    per_text = views.views_per_text
    skip = 0 if whole else int(views.prefix_lengths[texts[0] * per_text])
    rows = [_branches(views, int(text), whole=whole) for text in texts]
    longest = max(sum(map(len, row)) for row in rows)
    ids_RT = np.zeros((len(rows), longest), np.int64)
    branch_RT = np.full((len(rows), longest), _PADDING)
    position_RT = np.zeros((len(rows), longest), np.int64)
    span_RVT = np.zeros((len(rows), per_text, longest), np.bool_)
    for row, branches in enumerate(rows):
        trunk, start = len(branches[0]), 0
        for number, ids in enumerate(branches):
            stop = start + len(ids)
            before = skip + (trunk if number else 0)
            ids_RT[row, start:stop] = ids
            branch_RT[row, start:stop] = number
            position_RT[row, start:stop] = before + np.arange(len(ids))
            if number:
                span = views.span[texts[row] * per_text + number - 1] - before + start
                span_RVT[row, number - 1, span[0] : span[1]] = True
            start = stop
    same_RTT = branch_RT[:, :, None] == branch_RT[:, None, :]
    sees_RTT = np.tril(same_RTT | (branch_RT == 0)[:, None, :])
    arrays = (ids_RT, branch_RT != _PADDING, position_RT, sees_RTT, span_RVT)
    return Grove(*map(torch.from_numpy, arrays))


def _branches(views: TokenViews, text: int, *, whole: bool) -> list[Ids]:
    """What the views of a text share, and then the tail of each."""
    first = text * views.views_per_text
    each = range(first, first + views.views_per_text)
    ids = [views.full_ids(view) if whole else views.own_ids(view) for view in each]
    trunk = int(views.common[text]) + (int(views.prefix_lengths[first]) if whole else 0)
    return [ids[0][:trunk], *(one[trunk:] for one in ids)]


def distinct(views: TokenViews) -> tuple[Indices, Indices]:
    """One view of each kind, and for every view which of those it equals in ids, span and words."""
    seen: dict[tuple[int, bytes, bytes, bytes], int] = {}
    firsts: list[int] = []
    which = np.empty(len(views.prefix), np.int64)
    for view in range(len(views.prefix)):
        ids = views.own_ids(view)
        words = (
            b"" if views.words is None else views.words.of(view // views.views_per_text).tobytes()
        )
        key = (int(views.prefix[view]), ids.tobytes(), views.span[view].tobytes(), words)
        which[view] = seen.setdefault(key, len(firsts))
        if which[view] == len(firsts):
            firsts.append(view)
    return np.array(firsts, np.int64), which
