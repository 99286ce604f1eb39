"""Text first: the views of a text that begin alike go through the model as one, a text with tails.

Every tail sees the text and itself, at the positions that it has in its own view. That tokens meet
in the attention alone, and by their positions, is what `Prefixes` has seen when it serves.

Legend: R texts, V views, T tokens, D width.
"""

from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedjob.encoder.batches import Indices, bearable_padding, plant
from embedjob.encoder.forward import Loaded, ViewForward
from embedjob.encoder.prefixes import FEWEST_TOKENS
from embedjob.text.views import TokenViews

# Tails look at each other in vain. Of so few tokens that costs little; of more, as many pairs as a
# state is wide cost about what running a token does.
_FEW_TAIL_TOKENS = 512
_WORTH = 0.9


class TreeForward:
    """The way of whole texts to the vectors of their views: one after the other, V x D wide."""

    def __init__(self, views: TokenViews, texts: Indices, loaded: Loaded) -> None:
        """Runs nothing yet."""
        self._views = views
        self._texts = texts
        self._prefixes, self._readout, self._recipe = loaded.prefixes, loaded.readout, loaded.recipe
        self._packing = loaded.packing
        self._whole = ViewForward(views, np.arange(len(views.prefix)), loaded)

    @property
    def width(self) -> int:
        """The length of the vectors of one text."""
        return self._views.views_per_text * self._whole.width

    @cached_property
    def groups(self) -> Indices:
        """Per text, the prefix that is run once for its group, or -1 if the text runs it itself."""
        prefix = self._views.prefix[self._texts * self._views.views_per_text].astype(np.int64)
        long = np.array([*(len(p) >= FEWEST_TOKENS for p in self._views.prefixes), False])
        return np.where(long[prefix], prefix, -1)

    @cached_property
    def lengths(self) -> Indices:
        """Tokens that each text runs itself, with all its tails."""
        return tree_lengths(self._views)[self._texts] - np.where(
            self.groups >= 0,
            self._views.prefix_lengths[self._texts * self._views.views_per_text],
            0,
        )

    @cached_property
    def pairs(self) -> Indices:
        """How often one token of each text looks at another one."""
        views, per_text = self._views, self._views.views_per_text
        full = views.lengths.reshape(-1, per_text)[self._texts]
        prefix = views.prefix_lengths[::per_text][self._texts]
        trunk, saved = prefix + views.common[self._texts], np.where(self.groups >= 0, prefix, 0)
        tails = (full * (full + 1)).sum(axis=1) - per_text * trunk * (trunk + 1)
        once: Indices = (tails + trunk * (trunk + 1) - saved * (saved + 1)) // 2
        return once

    def padded(self, which: Indices) -> int:
        """Tokens that these texts run together, padding among them."""
        lengths = self.lengths[which]
        return int(lengths.sum() if self._packed(which) else lengths.max() * len(which))

    @cached_property
    def bearable_padding(self) -> int | None:
        """Tokens of padding that cost less than one more micro-batch; None where none is."""
        packed = len(self._texts) > 0 and self._packed(np.arange(len(self._texts)))
        return None if packed else bearable_padding(self._prefixes.backbone.device)

    def __call__(self, which: Indices) -> Tensor:
        """The vectors [R, V x D] of these texts, all of one group."""
        group = int(self.groups[which[0]])
        grove, span_RVT = plant(self._views, self._texts[which], whole=group < 0)
        prefix = self._views.prefixes[group] if group >= 0 else None
        layer = self._recipe.layer
        if self._packed(which):
            shared = None if prefix is None else self._prefixes.key_values(prefix)
            hidden_RTD = self._packing.tree_states(grove, layer=layer, shared=shared)
        else:
            hidden_RTD = self._prefixes.tree_states(prefix, grove, layer=layer)
        spans = span_RVT.unbind(dim=1)
        read = [self._readout(hidden_RTD, span_RT, grove.ids_RT) for span_RT in spans]
        return torch.cat(read, dim=1)

    def _packed(self, which: Indices) -> bool:
        """Whether these texts go through the model in one row."""
        if self._readout.router_width:
            return False
        lengths_RV = self._views.lengths.reshape(-1, self._views.views_per_text)
        longest = int(lengths_RV[self._texts[which]].max())
        return self._packing.serves_trees(longest, shared=bool(self.groups[which[0]] >= 0))

    def precisely(self, view: int) -> Tensor:
        """The vectors [1, V x D] of one text, each view whole and in float32."""
        first = int(self._texts[view]) * self._views.views_per_text
        each = range(first, first + self._views.views_per_text)
        return torch.cat([self._whole.precisely(one) for one in each], dim=1)


def tree_lengths(views: TokenViews) -> Indices:
    """Tokens of each text [R] when what its views share is there once."""
    own = np.diff(views.offsets).reshape(-1, views.views_per_text).sum(axis=1)
    total: Indices = own + views.prefix_lengths[:: views.views_per_text]
    return total


def worthwhile(views: TokenViews, loaded: Loaded) -> npt.NDArray[np.bool_]:
    """The texts [R] that are better run as trees than view by view, and can be."""
    lengths_RV = views.lengths.reshape(-1, views.views_per_text)
    prefix = views.prefix_lengths[:: views.views_per_text]
    # Interventions know one last token per row, and a tree has one per tail.
    if loaded.side == "left" or loaded.recipe.interventions or not views.common.any():
        return np.zeros(len(lengths_RV), np.bool_)
    if not loaded.prefixes.serve(FEWEST_TOKENS, int(lengths_RV.max())):
        return np.zeros(len(lengths_RV), np.bool_)
    saved = np.where(prefix >= FEWEST_TOKENS, prefix, 0)
    view_by_view = (lengths_RV - saved[:, None]).sum(axis=1)
    trees = tree_lengths(views) - saved
    tails = trees - views.common
    spans = views.span.reshape(-1, views.views_per_text, 2)
    full = (spans[..., 0] < spans[..., 1]).all(axis=1)
    saved_pairs = (view_by_view - trees) * loaded.prefixes.backbone.width
    worth = (trees <= _WORTH * view_by_view) & (
        (tails <= _FEW_TAIL_TOKENS) | (tails**2 <= saved_pairs)
    )
    chosen: npt.NDArray[np.bool_] = (views.common > 0) & full & worth
    return chosen
