"""From token views to the padded tensors of one micro-batch.

Legend: R texts, V views, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedjob.text.arrays import Ids
from embedjob.text.views import TokenViews

Side = Literal["left", "right"]
Indices = npt.NDArray[np.int64]
_PADDING = -1
# Tokens that a device computes in the time that one more micro-batch costs it.
_BEARABLE_PADDING = {"cpu": 64}
_ON_OTHER_DEVICES = 4096


@dataclass(frozen=True)
class MicroBatch:
    """Views padded to one length: ids, which of them are real, and which count for pooling.

    Of views in parts, `parts` says it of one part after the other, [V, T] each.
    """

    ids_VT: Tensor
    mask_VT: Tensor
    span_VT: Tensor
    parts: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class PrefixTreeBatch:
    """Trees padded to one length; `branch_RT` is 0 in the trunk, 1 and on in the tails, or -1."""

    ids_RT: Tensor
    branch_RT: Tensor
    position_RT: Tensor

    @property
    def mask_RT(self) -> Tensor:
        """Which tokens are real."""
        return self.branch_RT != _PADDING

    @property
    def sees_RTT(self) -> Tensor:
        """Which token looks at which: back on its own branch and on the trunk."""
        branch_RT = self.branch_RT
        same_RTT = branch_RT[:, :, None] == branch_RT[:, None, :]
        return (same_RTT | (branch_RT == 0)[:, None, :]).tril()


def bearable_padding(device: torch.device) -> int:
    """The tokens of padding that cost a device less than one more micro-batch."""
    return _BEARABLE_PADDING.get(device.type, _ON_OTHER_DEVICES)


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
        own = views.full_ids(int(view)) if whole else views.own_ids(int(view))
        ids_VT[row, first[row] : first[row] + lengths[row]] = own
    position_VT = np.arange(longest) - first[:, None]
    mask_VT = (position_VT >= 0) & (position_VT < lengths[:, None])
    spans = [views.span[which]]
    if views.parts is not None:
        spans += list(np.stack([views.spans(int(view)) for view in which], axis=1))
    span_VT, *parts = (_inside(position_VT, span - skip[:, None]) for span in spans)
    ids, mask = torch.from_numpy(ids_VT), torch.from_numpy(mask_VT)
    return MicroBatch(ids, mask, span_VT, tuple(parts))


def _inside(position_VT: Indices, span: Indices) -> Tensor:
    return torch.from_numpy((position_VT >= span[:, :1]) & (position_VT < span[:, 1:]))


def build_tree_batch(
    views: TokenViews, texts: Indices, *, whole: bool
) -> tuple[PrefixTreeBatch, Tensor]:
    """The texts with their tails, after their prefix if they are not whole, and the views' spans.

    Spans are masks [R, V, T] over the tokens of the trees.
    """
    per_text = views.views_per_text
    skip = 0 if whole else int(views.prefix_lengths[texts[0] * per_text])
    rows = [_branches(views, int(text), whole=whole) for text in texts]
    tree_batch = pad_trees(rows, skip=skip)
    span_RVT = np.zeros((len(rows), per_text, tree_batch.ids_RT.shape[1]), np.bool_)
    for row, branches in enumerate(rows):
        start = len(branches[0])
        for number, ids in enumerate(branches[1:]):
            before = skip + len(branches[0])
            span = views.span[texts[row] * per_text + number] - before + start
            span_RVT[row, number, span[0] : span[1]] = True
            start += len(ids)
    return tree_batch, torch.from_numpy(span_RVT)


def pad_trees(rows: Sequence[Sequence[Ids]], *, skip: int = 0) -> PrefixTreeBatch:
    """Trees, each a trunk and its tails, whose first token is at position `skip`."""
    longest = max(sum(map(len, row)) for row in rows)
    ids_RT = np.zeros((len(rows), longest), np.int64)
    branch_RT = np.full((len(rows), longest), _PADDING)
    position_RT = np.zeros((len(rows), longest), np.int64)
    for row, branches in enumerate(rows):
        start = 0
        for number, ids in enumerate(branches):
            here = slice(start, start + len(ids))
            before = skip + (len(branches[0]) if number else 0)
            ids_RT[row, here] = ids
            branch_RT[row, here] = number
            position_RT[row, here] = before + np.arange(len(ids))
            start += len(ids)
    return PrefixTreeBatch(*map(torch.from_numpy, (ids_RT, branch_RT, position_RT)))


def _branches(views: TokenViews, text: int, *, whole: bool) -> list[Ids]:
    """What the views of a text share, and then the tail of each."""
    first = text * views.views_per_text
    each = range(first, first + views.views_per_text)
    ids = [views.full_ids(view) if whole else views.own_ids(view) for view in each]
    trunk = int(views.common[text]) + (int(views.prefix_lengths[first]) if whole else 0)
    return [ids[0][:trunk], *(one[trunk:] for one in ids)]


def distinct(views: TokenViews) -> tuple[Indices, Indices]:
    """One view of each kind, and for every view which of those it equals: ids, spans and words.

    Where texts have an auxiliary view, equal ones have equal ones of that too.
    """
    beside = np.zeros(views.units, np.int64)
    if views.auxiliary is not None:
        beside = distinct(views.auxiliary)[1]
    seen: dict[tuple[int, bytes, bytes, bytes, int], int] = {}
    firsts: list[int] = []
    which = np.empty(len(views.prefix), np.int64)
    for view in range(len(views.prefix)):
        ids = views.own_ids(view)
        other = int(beside[view // views.views_per_text])
        words = (
            b"" if views.words is None else views.words.of(view // views.views_per_text).tobytes()
        )
        spans = views.spans(view).tobytes()
        key = (int(views.prefix[view]), ids.tobytes(), spans, words, other)
        which[view] = seen.setdefault(key, len(firsts))
        if which[view] == len(firsts):
            firsts.append(view)
    return np.array(firsts, np.int64), which
