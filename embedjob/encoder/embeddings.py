"""From the vectors of views to the finished embeddings of texts.

Legend: R texts, V views, D width.
"""

from collections.abc import Mapping

import numpy as np
import torch

from embedjob.beside import router_in
from embedjob.encoder.batches import Indices
from embedjob.encoder.recovery import Vectors
from embedjob.recipe import Recipe, WeightedTemplate
from embedjob.vectors.aggregation import AGGREGATIONS
from embedjob.vectors.finishing import finish, width
from embedjob.vectors.sparse import NOTHING, Row, Sparse, sparse

_ROWS_AT_ONCE = 1024
_UNIT_TOLERANCE = 1e-3
Failures = dict[int, tuple[str, str]]


def embeddings(vectors_VD: Vectors, which_RV: Indices, recipe: Recipe) -> tuple[Vectors, Failures]:
    """The embeddings [R, D] of texts whose views have these vectors, and the texts without one.

    Made a block of rows at a time: the vectors of equal views are stored once, and laid out per
    text they may be many times that.
    """
    weights_V = torch.tensor([_weight(template) for template in recipe.templates])
    join = AGGREGATIONS[recipe.aggregation]
    blocks = []
    for start in range(0, len(which_RV), _ROWS_AT_ONCE):
        rows_RVD = torch.from_numpy(vectors_VD[which_RV[start : start + _ROWS_AT_ONCE]])
        blocks.append(finish(join(rows_RVD, weights_V), recipe.finish).float().numpy())
    wide = width(vectors_VD.shape[1], views=which_RV.shape[1], recipe=recipe)
    finished = np.concatenate([np.empty((0, wide), np.float32), *blocks])
    return finished, _unfinished(finished, recipe)


def split(
    readings_VD: Vectors, router_width: int, recipe: Recipe
) -> tuple[Vectors, Vectors | None]:
    """The vectors of views, and the router scores [V, E] where they are a column of their own."""
    asked = router_in(recipe.heads)
    if asked is None or asked.join == "concat":
        return readings_VD, None
    at = readings_VD.shape[1] - router_width
    return readings_VD[:, :at], readings_VD[:, at:]


def joined_rows(rows: Mapping[int, Row], which_RV: Indices, failed: Failures) -> Sparse:
    """The sparse rows [R] of texts of one view each; empty where one has failed."""
    views = enumerate(which_RV[:, 0])
    return sparse([NOTHING if text in failed else rows[int(view)] for text, view in views])


def of_texts(troubles: Mapping[int, tuple[str, str]], which_RV: Indices) -> Failures:
    """The reason of each text that has a troubled view: that of its first one."""
    if not troubles:
        return {}
    troubled_RV = np.isin(which_RV, list(troubles))
    texts = np.flatnonzero(troubled_RV.any(axis=1))
    return {int(r): troubles[int(which_RV[r, troubled_RV[r].argmax()])] for r in texts}


def _unfinished(finished: Vectors, recipe: Recipe) -> Failures:
    norms = np.linalg.norm(finished, axis=1)
    bad = ~np.isfinite(norms)
    if recipe.normalized:
        bad |= np.abs(norms - 1) > _UNIT_TOLERANCE
    detail = "the finished embedding is not finite, or is zero and cannot be normalised"
    return {int(row): ("non_finite", detail) for row in np.flatnonzero(bad)}


def _weight(template: object) -> float:
    return template.weight if isinstance(template, WeightedTemplate) else 1.0
