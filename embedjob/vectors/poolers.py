"""Pooling: hidden states under a mask to one vector per view.

Shapes: V views, T tokens (padded), D width. The mask is the span. A pooling knows
neither prompts nor padding side, and values outside the mask, even NaN, never count. A view with an
empty mask has no vector: it is a bad row, and is not passed in.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from embedjob.config.pooling import POOLINGS, WeightedFrom

PoolingFunction = Callable[[Tensor, Tensor], Tensor]


def pooler(pooling: str | WeightedFrom | tuple[str | WeightedFrom, ...]) -> PoolingFunction:
    """Return the function of a pooling; the vectors of several poolings are concatenated."""
    if isinstance(pooling, tuple):
        return partial(_concatenated, [pooler(one) for one in pooling])
    if isinstance(pooling, WeightedFrom):
        return partial(weighted_mean, before=pooling.weighted_mean)
    return POOLERS[pooling]


def mean(hidden_VTD: Tensor, mask_VT: Tensor) -> Tensor:
    """Return the mean of the span's states, in float32 [V, D]."""
    return _weighted(hidden_VTD, mask_VT.float())


def weighted_mean(hidden_VTD: Tensor, mask_VT: Tensor, before: int = 0) -> Tensor:
    """Return the mean weighted 1, 2, ... n along the span (SGPT), `before` added to each [V, D]."""
    return _weighted(hidden_VTD, (mask_VT.cumsum(dim=1) + before).float() * mask_VT)


def maximum(hidden_VTD: Tensor, mask_VT: Tensor) -> Tensor:
    """Return the largest value of the span in each dimension, in float32 [V, D]."""
    return hidden_VTD.float().masked_fill(~mask_VT[:, :, None], -torch.inf).amax(dim=1)


def mean_sqrt_len(hidden_VTD: Tensor, mask_VT: Tensor) -> Tensor:
    """Return the sum of the span's states over the root of their number, in float32 [V, D]."""
    return mean(hidden_VTD, mask_VT) * mask_VT.sum(dim=1, keepdim=True).sqrt()


def first(hidden_VTD: Tensor, mask_VT: Tensor) -> Tensor:
    """Return the state of the span's first token, in float32 [V, D]."""
    return _at(hidden_VTD, mask_VT.int().argmax(dim=1))


def last(hidden_VTD: Tensor, mask_VT: Tensor) -> Tensor:
    """Return the state of the span's last token, in float32 [V, D]."""
    return _at(hidden_VTD, mask_VT.shape[1] - 1 - mask_VT.flip(1).int().argmax(dim=1))


def _concatenated(pools: Sequence[PoolingFunction], hidden_VTD: Tensor, mask_VT: Tensor) -> Tensor:
    return torch.cat([pool(hidden_VTD, mask_VT) for pool in pools], dim=1)


def _at(hidden_VTD: Tensor, token_V: Tensor) -> Tensor:
    return hidden_VTD[torch.arange(len(token_V), device=token_V.device), token_V].float()


def _weighted(hidden_VTD: Tensor, weights_VT: Tensor) -> Tensor:
    # Not a product with the mask: padding may hold NaN, and 0 * NaN is NaN.
    masked_VTD = hidden_VTD.float().masked_fill((weights_VT == 0)[:, :, None], 0.0)
    sum_VD = torch.einsum("vtd,vt->vd", masked_VTD, weights_VT)
    return sum_VD / weights_VT.sum(dim=1, keepdim=True)


# The functions of all poolings without weights, by the names that a recipe gives them.
POOLERS: Mapping[str, PoolingFunction] = {
    name: globals()[kind.function or name] for name, kind in POOLINGS.items() if not kind.weights
}
