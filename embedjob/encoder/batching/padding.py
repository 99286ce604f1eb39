"""Padding: token views as the tensors of one micro-batch; and which views are equal.

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
# Tokens that a device computes in the time that a further micro-batch costs.
_BEARABLE_PADDING = {"cpu": 64}
_ON_OTHER_DEVICES = 4096


@dataclass(frozen=True)
class MicroBatch:
    """Views padded to one length: ids, which tokens are real, and which are pooled.

    For views pooled in parts, `parts` holds the tokens of the first parts, of the second, and so
    on, [V, T] each.
    """

    ids_VT: Tensor
    mask_VT: Tensor
    span_VT: Tensor
    parts: tuple[Tensor, ...] = ()


def bearable_padding(device: torch.device) -> int:
    """Return the padding tokens that cost a device less than a further micro-batch."""
    return _BEARABLE_PADDING.get(device.type, _ON_OTHER_DEVICES)


def pad_views(
    views: TokenViews, which: Ints, *, side: Side = "right", whole: bool = True
) -> MicroBatch:
    """Return the chosen views padded to the longest, without their prefixes unless `whole`."""
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


def distinct_views(views: TokenViews) -> tuple[Ints, Ints]:
    """Return one view of each kind, and for every view the number of its kind.

    Views of one kind have equal ids, spans, words and, if texts have them, auxiliary views.
    """
    auxiliary = np.zeros(views.units, np.int64)
    if views.auxiliary is not None:
        auxiliary = distinct_views(views.auxiliary)[1]
    seen: dict[tuple[int, bytes, bytes, bytes, int], int] = {}
    firsts: list[int] = []
    which = np.empty(len(views.prefix), np.int64)
    for view in range(len(views.prefix)):
        ids = views.own_ids(view)
        text = view // views.views_per_text
        words = b"" if views.words is None else views.words.of(text).tobytes()
        spans = views.spans(view).tobytes()
        key = (int(views.prefix[view]), ids.tobytes(), spans, words, int(auxiliary[text]))
        which[view] = seen.setdefault(key, len(firsts))
        if which[view] == len(firsts):
            firsts.append(view)
    return np.array(firsts, np.int64), which
