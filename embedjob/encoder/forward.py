"""Views through the model and the pooling, their prefixes only once: what recovery calls.

Legend: V views, T tokens, D width.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from embedjob.encoder.batches import Indices, MicroBatch, Side, assemble, bearable_padding
from embedjob.encoder.decoding import decode
from embedjob.encoder.interventions import Steering
from embedjob.encoder.packing import Packing
from embedjob.encoder.prefixes import FEWEST_TOKENS, Prefixes
from embedjob.encoder.readout import Readout
from embedjob.encoder.sparse import finite
from embedjob.encoder.transfers import onto
from embedjob.recipe import Recipe
from embedjob.text.runs import Ids
from embedjob.text.views import TokenViews
from embedjob.vectors.sparse import Row


class Loaded(NamedTuple):
    """What an encoder runs views with."""

    prefixes: Prefixes
    packing: Packing
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
        self._prefixes, self._packing, self._readout = loaded[:3]
        self._recipe, self._side, self._steering = loaded[3:]
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

    @cached_property
    def bearable_padding(self) -> int | None:
        """Tokens of padding that cost less than one more micro-batch; None where none is."""
        everything = np.arange(len(self._chosen))
        packed = len(everything) > 0 and self._packed(everything)
        return None if packed else bearable_padding(self._backbone.device)

    def __call__(self, which: Indices) -> Tensor:
        """The vectors [V, D] of these views, all of one group, or [V, P x D] of their P parts."""
        group = int(self.groups[which[0]])
        if group < 0 and not self._packed(which):
            return self._whole(which)
        batch = assemble(self._views, self._chosen[which], whole=group < 0)
        prefix = None if group < 0 else self._views.prefixes[group]
        hidden_VTD = self._states(which, batch, prefix)
        return self._read(which, hidden_VTD, batch.parts or (batch.span_VT,), batch.ids_VT)

    def _states(self, which: Indices, batch: MicroBatch, prefix: Ids | None) -> Tensor:
        """The hidden states of what comes after a prefix, in one row or padded."""
        layer = self._recipe.layer
        if self._packed(which):
            shared = None if prefix is None else self._prefixes.key_values(prefix)
            return self._packing.states(batch.ids_VT, batch.mask_VT, layer=layer, shared=shared)
        assert prefix is not None, "only rows without padding may go without a prefix here"
        # What is done to states inside is not done to the prefix.
        self._prefixes.key_values(prefix)
        with self._steering.over(self._views, self._chosen[which], batch, skip=len(prefix)):
            return self._prefixes.states(prefix, batch.ids_VT, batch.mask_VT, layer=layer)

    def precisely(self, view: int) -> Tensor:
        """The vector [1, D] of one view, whole and in float32."""
        with self._backbone.float32():
            return self._whole(np.array([view]))

    def _packed(self, which: Indices) -> bool:
        """Whether these views go through the model in one row."""
        # What is said goes on from padded rows, and routers and interventions look into them.
        if self._recipe.decode or self._readout.router_width or self._recipe.interventions:
            return False
        longest = int((self.lengths[which] + self.saved[which]).max())
        return self._packing.serves(longest, shared=bool(self.groups[which[0]] >= 0))

    def _whole(self, which: Indices) -> Tensor:
        batch = assemble(self._views, self._chosen[which], side=self._side)
        if self._recipe.decode is not None:
            return self._decoded(which, batch)
        layer = self._recipe.layer
        with self._steering.over(self._views, self._chosen[which], batch):
            hidden_VTD = self._backbone.states(batch.ids_VT, batch.mask_VT, layer=layer)
        return self._read(which, hidden_VTD, batch.parts or (batch.span_VT,), batch.ids_VT)

    def _decoded(self, which: Indices, batch: MicroBatch) -> Tensor:
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
            return torch.cat([self._whole(which[[row]]) for row in range(len(which))])
        said = decode(
            self._backbone,
            head,
            (batch.ids_VT, batch.mask_VT),
            steps=asked.max_tokens,
            stops=torch.from_numpy(stops.astype(np.int64)),
        )
        return self._read(which, said.states_VSD, (said.counts_VS,), batch.ids_VT)

    def _read(
        self, which: Indices, hidden_VTD: Tensor, spans: Sequence[Tensor], ids_VT: Tensor
    ) -> Tensor:
        """The vectors of one part of the views after the other, and the entries beside them."""
        vectors_VD = torch.cat(
            [self._readout(hidden_VTD, span_VT, ids_VT) for span_VT in spans], dim=1
        )
        if self._readout.sparse is None:
            return vectors_VD
        told = self._views.words
        # With sparse entries there is one view per text, and one part per view.
        words = None if told is None else [told.of(int(text)) for text in self._chosen[which]]
        rows = self._readout.rows(hidden_VTD, spans[0], words)
        self.rows.update(zip(which.tolist(), rows, strict=True))
        broken_V = torch.tensor([not finite(entries) for entries in rows])
        return vectors_VD.masked_fill(onto(broken_V, vectors_VD.device)[:, None], torch.nan)
