"""Tree attention: a text once, and after it the suffix of each of its templates.

The views of a text that begin alike make one tree: the tokens that they share, then their suffixes.
A suffix sees the shared tokens and itself, at the positions that it has in its own view.

Legend: R texts, V views, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from embedjob.text.arrays import Ids, Ints
from embedjob.text.views import TokenViews

_PADDING = -1


@dataclass(frozen=True)
class PrefixTreeBatch:
    """Trees padded to one length.

    `suffix_RT` is 0 for shared tokens, the suffix's number from 1 on for others, -1 for padding.
    """

    ids_RT: Tensor
    suffix_RT: Tensor
    position_RT: Tensor

    @property
    def mask_RT(self) -> Tensor:
        """Tell which tokens are real."""
        return self.suffix_RT != _PADDING

    @property
    def sees_RTT(self) -> Tensor:
        """Tell which token sees which: earlier tokens of its own suffix and the shared ones."""
        suffix_RT = self.suffix_RT
        same_RTT = suffix_RT[:, :, None] == suffix_RT[:, None, :]
        return (same_RTT | (suffix_RT == 0)[:, None, :]).tril()


def build_tree_batch(
    views: TokenViews, texts: Ints, *, whole: bool
) -> tuple[PrefixTreeBatch, Tensor]:
    """Return the trees of these texts and the spans of their views.

    Trees begin with the template's prefix if `whole`, else after it. Spans are masks [R, V, T]
    over the tokens of the trees.
    """
    per_text = views.views_per_text
    skip = 0 if whole else int(views.prefix_lengths[texts[0] * per_text])
    trees = [_shared_and_suffixes(views, int(text), whole=whole) for text in texts]
    tree_batch = pad_trees(trees, skip=skip)
    span_RVT = np.zeros((len(trees), per_text, tree_batch.ids_RT.shape[1]), np.bool_)
    for row, (shared, *suffixes) in enumerate(trees):
        start = before = len(shared)
        for number, ids in enumerate(suffixes):
            first, stop = views.span[texts[row] * per_text + number] - skip
            # A span that is scored may begin with a shared token.
            span_RVT[row, number, first : min(stop, before)] = True
            span_RVT[row, number, max(first, before) - before + start : stop - before + start] = (
                True
            )
            start += len(ids)
    return tree_batch, torch.from_numpy(span_RVT)


def pad_trees(trees: Sequence[Sequence[Ids]], *, skip: int = 0) -> PrefixTreeBatch:
    """Pad trees to one length; each is its shared ids, at position `skip` on, and its suffixes."""
    longest = max(sum(map(len, tree)) for tree in trees)
    ids_RT = np.zeros((len(trees), longest), np.int64)
    suffix_RT = np.full((len(trees), longest), _PADDING)
    position_RT = np.zeros((len(trees), longest), np.int64)
    for row, tree in enumerate(trees):
        start = 0
        for number, ids in enumerate(tree):
            here = slice(start, start + len(ids))
            before = skip + (len(tree[0]) if number else 0)
            ids_RT[row, here] = ids
            suffix_RT[row, here] = number
            position_RT[row, here] = before + np.arange(len(ids))
            start += len(ids)
    return PrefixTreeBatch(*map(torch.from_numpy, (ids_RT, suffix_RT, position_RT)))


def _shared_and_suffixes(views: TokenViews, text: int, *, whole: bool) -> list[Ids]:
    """Return the ids that the views of a text share, then the suffix of each view."""
    first = text * views.views_per_text
    numbers = range(first, first + views.views_per_text)
    ids = [views.full_ids(view) if whole else views.own_ids(view) for view in numbers]
    shared = int(views.common[text]) + (int(views.prefix_lengths[first]) if whole else 0)
    return [ids[0][:shared], *(view_ids[shared:] for view_ids in ids)]
