"""Hidden states under a mask to one vector per view.

Shapes: V views, T tokens (padded), D width. The mask is the span; a pooler knows nothing of
prompts or padding side, and what lies outside the mask, even NaN, never counts. A view whose mask
is empty has no vector: it is a bad row before it comes here.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def mean(hidden_VTD: Tensor, mask_VT: Tensor) -> Tensor:
    """The mean of the span's states, in float32 [V, D]."""
    return _weighted(hidden_VTD, mask_VT.float())


def weighted_mean(hidden_VTD: Tensor, mask_VT: Tensor) -> Tensor:
    """The mean weighted 1, 2, ... n along the span, as in SGPT [V, D]."""
    return _weighted(hidden_VTD, mask_VT.cumsum(dim=1).float() * mask_VT)


def maximum(hidden_VTD: Tensor, mask_VT: Tensor) -> Tensor:
    """The largest value of the span in each dimension, in float32 [V, D]."""
    return hidden_VTD.float().masked_fill(~mask_VT[:, :, None], -torch.inf).amax(dim=1)


def _weighted(hidden_VTD: Tensor, weights_VT: Tensor) -> Tensor:
    # Not a product with the mask: padding may hold NaN, and 0 * NaN is NaN.
    masked_VTD = hidden_VTD.float().masked_fill((weights_VT == 0)[:, :, None], 0.0)
    sum_VD = torch.einsum("vtd,vt->vd", masked_VTD, weights_VT)
    return sum_VD / weights_VT.sum(dim=1, keepdim=True)


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": mean,
    "weighted_mean": weighted_mean,
    "max": maximum,
}
