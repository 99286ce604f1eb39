"""From token views to the padded tensors of one micro-batch.

Legend: R texts, V views, T tokens.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from embedjob.text.arrays import Ints
from embedjob.text.views import TokenViews

Side = Literal["left", "right"]
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


def bearable_padding(device: torch.device) -> int:
    """The tokens of padding that cost a device less than one more micro-batch."""
    return _BEARABLE_PADDING.get(device.type, _ON_OTHER_DEVICES)


def assemble(
    views: TokenViews, which: Ints, *, side: Side = "right", whole: bool = True
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


def _inside(position_VT: Ints, span: Ints) -> Tensor:
    return torch.from_numpy((position_VT >= span[:, :1]) & (position_VT < span[:, 1:]))


def distinct(views: TokenViews) -> tuple[Ints, Ints]:
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
