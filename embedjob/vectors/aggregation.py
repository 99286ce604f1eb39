"""The vectors of a row's views to one embedding.

Shapes: R rows, V views per row, D width of a vector. Weights are the templates' own.
"""

from collections.abc import Callable

from torch import Tensor

from embedjob.vectors.finishing import normalize


def mean(vectors_RVD: Tensor, weights_V: Tensor) -> Tensor:
    """The mean over views [R, D]."""
    return vectors_RVD.float().mean(dim=1)


def mean_of_normalized(vectors_RVD: Tensor, weights_V: Tensor) -> Tensor:
    """The mean over views, each scaled to unit length first [R, D]."""
    return normalize(vectors_RVD).mean(dim=1)


def weighted(vectors_RVD: Tensor, weights_V: Tensor) -> Tensor:
    """The mean over views by the weights of their templates [R, D]."""
    weights_VD = weights_V.float()[:, None]
    return (vectors_RVD.float() * weights_VD).sum(dim=1) / weights_VD.sum()


def maximum(vectors_RVD: Tensor, weights_V: Tensor) -> Tensor:
    """The largest value over views in each dimension [R, D]."""
    return vectors_RVD.float().amax(dim=1)


def concat(vectors_RVD: Tensor, weights_V: Tensor) -> Tensor:
    """The views one after another [R, V * D]."""
    return vectors_RVD.float().flatten(start_dim=1)


AGGREGATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": mean,
    "mean_of_normalized": mean_of_normalized,
    "weighted": weighted,
    "max": maximum,
    "concat": concat,
}
