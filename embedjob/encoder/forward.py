"""Views through the model and the pooling, their prefixes only once: what recovery calls.

Legend: V views, T tokens, D width.
"""

from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch import Tensor

from embedjob.encoder.batches import Indices, Side, assemble
from embedjob.encoder.packing import Packing
from embedjob.encoder.prefixes import Prefixes
from embedjob.encoder.readout import Readout
from embedjob.recipe import Recipe
from embedjob.text.views import TokenViews


class Loaded(NamedTuple):
    """What an encoder runs views with."""

    prefixes: Prefixes
    packing: Packing
    readout: Readout
    recipe: Recipe
    side: Side


class ViewForward:
    """The chosen views' way to their vectors."""

    def __init__(self, views: TokenViews, chosen: Indices, loaded: Loaded) -> None:
        """Runs nothing yet."""
        self._views = views
        self._chosen = chosen
        self._prefixes, self._packing, self._readout, self._recipe, self._side = loaded
        self._backbone = loaded.prefixes.backbone

    @property
    def width(self) -> int:
        """The length of one vector."""
        return self._readout.width

    @cached_property
    def groups(self) -> Indices:
        """Per view, the prefix that it shares with others of its group, or -1 if it goes whole."""
        ids = [prefix.tobytes() for prefix in self._views.prefixes]
        # Templates may begin alike: then their views are of one group.
        prefix = np.array([*map(ids.index, ids), -1])[self._views.prefix[self._chosen]]
        lengths = self._views.lengths[self._chosen]
        for which in np.unique(prefix[prefix >= 0]):
            longest = int(lengths[prefix == which].max())
            if self._side == "left" or not self._prefixes.serve(
                len(self._views.prefixes[which]), longest
            ):
                prefix[prefix == which] = -1
        return prefix

    @cached_property
    def saved(self) -> Indices:
        """Tokens of each view that it needs not run, because its group did."""
        return np.where(self.groups >= 0, self._views.prefix_lengths[self._chosen], 0)

    @cached_property
    def lengths(self) -> Indices:
        """Tokens that each view runs itself."""
        return self._views.lengths[self._chosen] - self.saved

    @cached_property
    def pairs(self) -> Indices:
        """How often one token of each view looks at another one."""
        full, saved = self.lengths + self.saved, self.saved
        causal: Indices = (full * (full + 1) - saved * (saved + 1)) // 2
        return full**2 if self._recipe.attention == "bidirectional" else causal

    def padded(self, which: Indices) -> int:
        """Tokens that these views run together, padding among them."""
        lengths = self.lengths[which]
        return int(lengths.sum() if self._packed(which) else lengths.max() * len(which))

    def __call__(self, which: Indices) -> Tensor:
        """The vectors [V, D] of these views, all of one group."""
        group = int(self.groups[which[0]])
        if group < 0 and not self._packed(which):
            return self._whole(which)
        batch = assemble(self._views, self._chosen[which], whole=group < 0)
        layer = self._recipe.layer
        if self._packed(which):
            shared = None if group < 0 else self._prefixes.key_values(self._views.prefixes[group])
            hidden_VTD = self._packing.states(
                batch.ids_VT, batch.mask_VT, layer=layer, shared=shared
            )
        else:
            prefix = self._views.prefixes[group]
            hidden_VTD = self._prefixes.states(prefix, batch.ids_VT, batch.mask_VT, layer=layer)
        return self._readout(hidden_VTD, batch.span_VT)

    def precisely(self, view: int) -> Tensor:
        """The vector [1, D] of one view, whole and in float32."""
        with self._backbone.float32():
            return self._whole(np.array([view]))

    def _packed(self, which: Indices) -> bool:
        """Whether these views go through the model in one row."""
        if self._recipe.interventions:
            return False  # They look for their tokens in padded rows.
        longest = int((self.lengths[which] + self.saved[which]).max())
        return self._packing.serves(longest, shared=bool(self.groups[which[0]] >= 0))

    def _whole(self, which: Indices) -> Tensor:
        batch = assemble(self._views, self._chosen[which], side=self._side)
        hidden_VTD = self._backbone.states(batch.ids_VT, batch.mask_VT, layer=self._recipe.layer)
        return self._readout(hidden_VTD, batch.span_VT)
