"""Views through the model and the pooling, their prefixes only once: what recovery calls.

Legend: V views, T tokens, D width.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from embedjob.encoder.batches import Indices, MicroBatch, Side, assemble
from embedjob.encoder.decoding import decode
from embedjob.encoder.interventions import Steering
from embedjob.encoder.prefixes import FEWEST_TOKENS, Prefixes
from embedjob.encoder.readout import Readout
from embedjob.encoder.recovery import Vectors
from embedjob.encoder.sparse import finite
from embedjob.recipe import Recipe
from embedjob.text.views import TokenViews
from embedjob.vectors.sparse import Row


class Loaded(NamedTuple):
    """What an encoder runs views with."""

    prefixes: Prefixes
    readout: Readout
    recipe: Recipe
    side: Side
    steering: Steering


class ViewForward:
    """The chosen views' way to their vectors.

    `rows` are the sparse entries of those that went it, as they were the last time they did. A view
    whose entries are not finite is given no finite vector, so that it is tried again likewise.
    """

    def __init__(self, views: TokenViews, chosen: Indices, loaded: Loaded) -> None:
        """Runs nothing yet; the chosen views are in as many parts each."""
        self._views = views
        self._chosen = chosen
        self._prefixes, self._readout, self._recipe, self._side, self._steering = loaded
        self._backbone = loaded.prefixes.backbone
        self.rows: dict[int, Row] = {}

    @property
    def width(self) -> int:
        """The length of one vector, or of those of all parts of a view."""
        return self._readout.width * len(self._views.spans(int(self._chosen[0])))

    @cached_property
    def groups(self) -> Indices:
        """Per view, the prefix that it shares with others of its group, or -1 if it goes whole."""
        ids = [prefix.tobytes() for prefix in self._views.prefixes]
        # Templates may begin alike: then their views are of one group.
        prefix = np.array([*map(ids.index, ids), -1])[self._views.prefix[self._chosen]]
        if self._recipe.decode is not None:
            return np.full_like(prefix, -1)
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

    def __call__(self, which: Indices) -> Vectors:
        """The vectors [V, D] of these views, all of one group, or [V, P x D] of their P parts."""
        group = int(self.groups[which[0]])
        if group < 0:
            return self._whole(which)
        batch = assemble(self._views, self._chosen[which], whole=False)
        prefix, layer = self._views.prefixes[group], self._recipe.layer
        self._prefixes.hold(prefix)
        with self._steering.over(self._views, self._chosen[which], batch, skip=len(prefix)):
            hidden_VTD = self._prefixes.states(prefix, batch.ids_VT, batch.mask_VT, layer=layer)
        return self._read(which, hidden_VTD, batch.parts or (batch.span_VT,))

    def precisely(self, view: int) -> Vectors:
        """The vector [1, D] of one view, whole and in float32."""
        with self._backbone.float32():
            return self._whole(np.array([view]))

    def _whole(self, which: Indices) -> Vectors:
        batch = assemble(self._views, self._chosen[which], side=self._side)
        if self._recipe.decode is not None:
            return self._decoded(which, batch)
        layer = self._recipe.layer
        with self._steering.over(self._views, self._chosen[which], batch):
            hidden_VTD = self._backbone.states(batch.ids_VT, batch.mask_VT, layer=layer)
        return self._read(which, hidden_VTD, batch.parts or (batch.span_VT,))

    def _decoded(self, which: Indices, batch: MicroBatch) -> Vectors:
        """The vectors of these views, read off what is said after them."""
        asked, head, stops = self._recipe.decode, self._backbone.head, self._views.stops
        assert asked is not None
        assert head is not None
        assert stops is not None
        # Padding stands between a prompt and its words: harmless where attention asks for positions
        # alone and reaches back for ever, else each view goes by itself.
        if len(which) > 1 and not self._prefixes.serve(
            FEWEST_TOKENS, batch.ids_VT.shape[1] + asked.max_tokens
        ):
            return np.concatenate([self._whole(which[[row]]) for row in range(len(which))])
        said = decode(
            self._backbone,
            head,
            (batch.ids_VT, batch.mask_VT),
            steps=asked.max_tokens,
            stops=torch.from_numpy(stops.astype(np.int64)),
        )
        return self._read(which, said.states_VSD, (said.counts_VS,))

    def _read(self, which: Indices, hidden_VTD: Tensor, spans: Sequence[Tensor]) -> Vectors:
        """The vectors of one part of the views after the other, and the entries beside them."""
        read = [self._readout(hidden_VTD, span_VT) for span_VT in spans]
        vectors_VD = np.concatenate(read, axis=1)
        if self._readout.sparse is None:
            return vectors_VD
        told = self._views.words
        # With sparse entries there is one view per text, and one part per view.
        words = None if told is None else [told.of(int(text)) for text in self._chosen[which]]
        for row, entries in enumerate(self._readout.rows(hidden_VTD, spans[0], words)):
            self.rows[int(which[row])] = entries
            if not finite(entries):
                vectors_VD[row] = np.nan
        return vectors_VD
