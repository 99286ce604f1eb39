"""From the vectors of views to the finished embeddings of texts.

Legend: R texts, U parts of texts, V views, D width.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from embedjob.config.recipe import Recipe
from embedjob.config.segments import WeightedTemplate
from embedjob.encoder.batching.encode_all import EncodeResult
from embedjob.text.arrays import Ints
from embedjob.text.views import TextUnits, TokenViews
from embedjob.vectors.aggregation import AGGREGATIONS, joined_parts
from embedjob.vectors.encoded import Encoded, Failures, Lines, Vectors
from embedjob.vectors.finishing import NO_FITS, finish, width
from embedjob.vectors.fits.fit_arithmetic import width_after
from embedjob.vectors.fits.fitted import Fitted
from embedjob.vectors.sparse import NO_ENTRIES, Row, Sparse, sparse

_ROWS_AT_ONCE = 1024
_UNIT_TOLERANCE = 1e-3


def encoded(
    passed: EncodeResult,
    views: TokenViews,
    recipe: Recipe,
    *,
    router_width: int = 0,
    fitted: Mapping[str, Fitted] = NO_FITS,
) -> Encoded:
    """Return the finished embeddings of texts, NaN with the reason where a text has none.

    With them come the columns of heads: sparse rows, and router scores averaged over views.
    `fitted` is what the fits of finishing steps left.
    """
    vectors_VD, routers_VE = without_routers(passed.vectors_VD, router_width, recipe)
    finished, troubles = embeddings(vectors_VD, passed.which_RV, recipe, views.cuts, fitted)
    lines = lines_of(views, recipe)
    lined = Encoded(finished, {}, lines=lines)
    rows = views.text_units if views.parts is None else views.parts.offsets
    failed = {
        **_of_owners(troubles, lined.line_offsets),
        **_of_owners(of_texts(passed.failed, passed.which_RV), rows),
    }
    owners = np.repeat(np.arange(views.texts), np.diff(lined.line_offsets))
    finished[np.isin(owners, list(failed))] = np.nan
    has_rows = "sparse_values" in recipe.head_columns
    return replace(
        lined,
        failed=failed,
        stats=passed.stats,
        sparse=joined_rows(passed.rows, passed.which_RV, failed) if has_rows else None,
        routers=None if routers_VE is None else routers_VE[passed.which_RV].mean(axis=1),
    )


def embeddings(
    vectors_VD: Vectors,
    which_RV: Ints,
    recipe: Recipe,
    cuts: TextUnits | None = None,
    fitted: Mapping[str, Fitted] = NO_FITS,
) -> tuple[Vectors, Failures]:
    """Return the embeddings [R, D] of texts from the vectors of views, and which are not finite.

    With `cuts` the vectors belong to parts of texts, and are joined first. Texts go in blocks: the
    vectors of equal views are stored once, and would take many times the memory laid out per text.
    """
    weights_V = torch.tensor([_weight(template) for template in recipe.templates])
    join = AGGREGATIONS[recipe.aggregation]
    blocks = []
    for start in range(0, len(which_RV) if cuts is None else len(cuts.offsets) - 1, _ROWS_AT_ONCE):
        rows_RVD = _rows(vectors_VD, which_RV, slice(start, start + _ROWS_AT_ONCE), cuts)
        blocks.append(finish(join(rows_RVD, weights_V), recipe.finish, fitted).float().numpy())
    after = {sha256: width_after(one) for sha256, one in fitted.items()}
    wide = width(vectors_VD.shape[1], views=which_RV.shape[1], recipe=recipe, fitted=after)
    finished = np.concatenate([np.empty((0, wide), np.float32), *blocks])
    return finished, _unfinished(finished, recipe)


def lines_of(views: TokenViews, recipe: Recipe) -> Lines | None:
    """Return which embeddings belong to which text; None where each text has a single one."""
    if views.parts is not None:
        return Lines(views.parts.offsets, views.parts.chars)
    if recipe.aggregation == "keep":
        return Lines(np.arange(views.texts + 1) * views.views_per_text)
    return None


def _rows(vectors_VD: Vectors, which_RV: Ints, texts: slice, cuts: TextUnits | None) -> Tensor:
    """Return the vectors of these texts [R, V, D], their parts joined."""
    if cuts is None:
        return torch.from_numpy(vectors_VD[which_RV[texts]])
    offsets = cuts.offsets[texts.start : texts.stop + 1]
    units = slice(offsets[0], offsets[-1])
    tokens_UV = cuts.tokens.reshape(which_RV.shape)[units]
    return joined_parts(
        torch.from_numpy(vectors_VD[which_RV[units]]),
        torch.from_numpy(tokens_UV),
        torch.from_numpy(np.diff(offsets)),
    )


def without_routers(
    readings_VD: Vectors, router_width: int, recipe: Recipe
) -> tuple[Vectors, Vectors | None]:
    """Split the vectors of views from the router scores [V, E]; None if these are no column."""
    if "router" not in recipe.head_columns:
        return readings_VD, None
    at = readings_VD.shape[1] - router_width
    return readings_VD[:, :at], readings_VD[:, at:]


def joined_rows(rows: Mapping[int, Row], which_RV: Ints, failed: Failures) -> Sparse:
    """Return the sparse rows [R] of texts of one view each; empty where a text has failed."""
    views = enumerate(which_RV[:, 0])
    return sparse([NO_ENTRIES if text in failed else rows[int(view)] for text, view in views])


def of_texts(troubles: Mapping[int, tuple[str, str]], which_RV: Ints) -> Failures:
    """Return the reason of each text with a failed view: the reason of its first failed view."""
    if not troubles:
        return {}
    troubled_RV = np.isin(which_RV, list(troubles))
    texts = np.flatnonzero(troubled_RV.any(axis=1))
    return {int(r): troubles[int(which_RV[r, troubled_RV[r].argmax()])] for r in texts}


def _of_owners(troubles: Failures, offsets: Ints) -> Failures:
    """Return the reason of each text with a failed part; text r's parts begin at offsets[r]."""
    owners = np.searchsorted(offsets, np.array(sorted(troubles), np.int64), side="right") - 1
    return {
        int(text): troubles[part]
        for part, text in reversed(list(zip(sorted(troubles), owners, strict=True)))
    }


def _unfinished(finished: Vectors, recipe: Recipe) -> Failures:
    norms = np.linalg.norm(finished, axis=1)
    bad = ~np.isfinite(norms)
    if recipe.normalized:
        bad |= np.abs(norms - 1) > _UNIT_TOLERANCE
    detail = "the finished embedding is not finite, or is zero and cannot be normalised"
    return {int(row): ("non_finite", detail) for row in np.flatnonzero(bad)}


def _weight(template: object) -> float:
    return template.weight if isinstance(template, WeightedTemplate) else 1.0
