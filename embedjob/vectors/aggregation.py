"""Aggregation: the vectors of a row's views to one embedding, or to several.

Shapes: R rows, U units (rows, or the parts of rows), V views per row, D width of a vector. Weights
are the templates' own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from embedjob.vectors.finishing import normalize


def mean_over_views(vectors_RVD: Tensor, weights_V: Tensor) -> Tensor:
    """Return the mean over views [R, D]."""
    return vectors_RVD.float().mean(dim=1)


def mean_of_normalized(vectors_RVD: Tensor, weights_V: Tensor) -> Tensor:
    """Return the mean over views, each scaled to unit length first [R, D]."""
    return normalize(vectors_RVD).mean(dim=1)


def weighted(vectors_RVD: Tensor, weights_V: Tensor) -> Tensor:
    """Return the mean over views by the weights of their templates [R, D]."""
    weights_V1 = weights_V.float()[:, None]
    return (vectors_RVD.float() * weights_V1).sum(dim=1) / weights_V1.sum()


def maximum_over_views(vectors_RVD: Tensor, weights_V: Tensor) -> Tensor:
    """Return the largest value over views in each dimension [R, D]."""
    return vectors_RVD.float().amax(dim=1)


def concat(vectors_RVD: Tensor, weights_V: Tensor) -> Tensor:
    """Concatenate the views [R, V * D]."""
    return vectors_RVD.float().flatten(start_dim=1)


def keep(vectors_RVD: Tensor, weights_V: Tensor) -> Tensor:
    """Keep the views, one row after the other [R * V, D]."""
    return vectors_RVD.float().flatten(end_dim=1)


def joined_parts(vectors_UVD: Tensor, tokens_UV: Tensor, counts_R: Tensor) -> Tensor:
    """Return the mean over the parts of each row, weighted by their tokens [R, V, D]."""
    owner_U = torch.repeat_interleave(torch.arange(len(counts_R)), counts_R)
    total_RV = torch.zeros(len(counts_R), tokens_UV.shape[1])
    total_RV.index_add_(0, owner_U, tokens_UV.float())
    # Shares and not sums divided at the end: a row of one part is exactly that part.
    share_UV = tokens_UV.float() / total_RV[owner_U]
    mean_RVD = torch.zeros(len(counts_R), *vectors_UVD.shape[1:])
    return mean_RVD.index_add_(0, owner_U, vectors_UVD.float() * share_UV[:, :, None])


AGGREGATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": mean_over_views,
    "mean_of_normalized": mean_of_normalized,
    "weighted": weighted,
    "max": maximum_over_views,
    "concat": concat,
    "keep": keep,
}
