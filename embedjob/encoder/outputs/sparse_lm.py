"""Sparse weights over the vocabulary from hidden states, as in PromptReps and SPLADE.

Legend: V views, T tokens, N tokens of all spans, D width, W vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from embedjob.config.heads import SparseLm
from embedjob.encoder.outputs.language_model import LanguageHead
from embedjob.text.arrays import Ids
from embedjob.vectors.sparse import Row, heaviest

# Entries of a text without words of its own, as in the authors' code of PromptReps.
_WITHOUT_WORDS = 10


def sparse_rows(
    head: LanguageHead,
    hidden_VTD: Tensor,
    span_VT: Tensor,
    *,
    asked: SparseLm,
    words: Sequence[Ids] | None,
) -> list[Row]:
    """Return the entries of each view [V] from the logits of its span, limited to given words."""
    owner_N, places_N = span_VT.nonzero().unbind(dim=1)
    states_ND = hidden_VTD[owner_N.to(hidden_VTD.device), places_N.to(hidden_VTD.device)]
    most = head.most_states(hidden_VTD.device)
    pooled: dict[int, Tensor] = {}
    rows = []
    for part_ND, part_owner_N in zip(states_ND.split(most), owner_N.split(most), strict=True):
        _pool(pooled, head.logits(part_ND), part_owner_N, asked=asked)
        # The last view may have further tokens in the next part.
        rows += [_entries(pooled, view, asked, words) for view in sorted(pooled)[:-1]]
    return [*rows, *(_entries(pooled, view, asked, words) for view in sorted(pooled))]


def finite(row: Row) -> bool:
    """Tell whether every value of the row is finite."""
    return bool(np.isfinite(row[1]).all())


def _pool(
    pooled: dict[int, Tensor], logits_NW: Tensor, owner_N: Tensor, *, asked: SparseLm
) -> None:
    """Add tokens to their views: the sum of weights, or the largest logits.

    The largest weight is that of the largest logit, and so is found before it is weighed.
    """
    found_NW = logits_NW if asked.pooling == "max" else _weighed(logits_NW, asked)
    join = _POOLINGS[asked.pooling]
    views, counts = owner_N.unique_consecutive(return_counts=True)
    for view, own_NW in zip(views.tolist(), found_NW.split(counts.tolist()), strict=True):
        joined_W = join(own_NW)
        before_W = pooled.get(view)
        pooled[view] = joined_W if before_W is None else join(torch.stack([before_W, joined_W]))


def _weighed(logits: Tensor, asked: SparseLm) -> Tensor:
    weights = logits.relu().log1p_()
    return weights.log1p_() if asked.activation == "log1p_relu" else weights


def _entries(
    pooled: dict[int, Tensor], view: int, asked: SparseLm, words: Sequence[Ids] | None
) -> Row:
    """Return the entries of a view once all its tokens are pooled."""
    found_W = pooled.pop(view)
    weights_W = (_weighed(found_W, asked) if asked.pooling == "max" else found_W).cpu().numpy()
    indices = np.arange(len(weights_W), dtype=np.uint32) if words is None else words[view]
    if words is None or len(indices):
        return heaviest(indices, weights_W[indices], top_k=asked.top_k, scale=asked.scale)
    every = np.arange(len(weights_W), dtype=np.uint32)
    return heaviest(every, weights_W, top_k=_WITHOUT_WORDS, scale=asked.scale)


_POOLINGS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "max": lambda found_NW: found_NW.amax(dim=0),
    "sum": lambda found_NW: found_NW.sum(dim=0),
}
