"""Text first: the views of a text that begin alike go through the model as one, a text with tails.

Every tail sees the text and itself, at the positions that it has in its own view. That tokens meet
in the attention alone, and by their positions, is what `Prefixes` has seen when it serves.

Legend: R texts, V views, T tokens, D width.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedjob.config.recipe import Recipe
from embedjob.encoder.attention.packing import Packing
from embedjob.encoder.attention.shared_prefix import FEWEST_TOKENS, Prefixes
from embedjob.encoder.attention.tree import build_tree_batch
from embedjob.encoder.batching.padding import (
    MicroBatch,
    Side,
    assemble,
    bearable_padding,
)
from embedjob.encoder.batching.transfers import to_device
from embedjob.encoder.intervention_hooks import InterventionHooks
from embedjob.encoder.outputs.decoding import decode
from embedjob.encoder.outputs.pool_and_heads import Readout
from embedjob.encoder.outputs.sparse_lm import finite
from embedjob.text.arrays import Ids, Ints
from embedjob.text.views import TokenViews
from embedjob.vectors.sparse import Row


class Loaded(NamedTuple):
    """What an encoder runs views with."""

    prefixes: Prefixes
    packing: Packing
    readout: Readout
    recipe: Recipe
    side: Side
    hooks: InterventionHooks


class ViewForward:
    """The chosen views' way to their vectors.

    `rows` are the sparse entries of those that went it, as they were the last time they did. A view
    whose entries are not finite is given no finite vector, so that it is tried again likewise.
    """

    def __init__(self, views: TokenViews, chosen: Ints, loaded: Loaded) -> None:
        """Runs nothing yet; the chosen views are in as many parts each."""
        self._views = views
        self._chosen = chosen
        self._prefixes, self._packing, self._readout = loaded[:3]
        self._recipe, self._side, self._hooks = loaded[3:]
        self._backbone = loaded.prefixes.backbone
        self.rows: dict[int, Row] = {}

    @property
    def width(self) -> int:
        """The length of one vector, or of those of all parts of a view."""
        return self._readout.width * len(self._views.spans(int(self._chosen[0])))

    @cached_property
    def groups(self) -> Ints:
        """Per view, the prefix that it shares with others of its group, or -1 if it goes whole."""
        ids = [prefix.tobytes() for prefix in self._views.prefixes]
        # Templates may begin alike: then their views are of one group.
        prefix = np.array([*map(ids.index, ids), -1])[self._views.prefix[self._chosen]]
        if self._recipe.decode is not None:
            return np.full_like(prefix, -1)
        lengths = self._views.lengths[self._chosen]
        for which in np.unique(prefix[prefix >= 0]):
            longest = int(lengths[prefix == which].max())
            if self._side == "left" or not self._prefixes.serves(
                len(self._views.prefixes[which]), longest
            ):
                prefix[prefix == which] = -1
        return prefix

    @cached_property
    def saved(self) -> Ints:
        """Tokens of each view that it needs not run, because its group did."""
        return np.where(self.groups >= 0, self._views.prefix_lengths[self._chosen], 0)

    @cached_property
    def lengths(self) -> Ints:
        """Tokens that each view runs itself."""
        return self._views.lengths[self._chosen] - self.saved

    @cached_property
    def pairs(self) -> Ints:
        """How often one token of each view looks at another one."""
        full, saved = self.lengths + self.saved, self.saved
        causal: Ints = (full * (full + 1) - saved * (saved + 1)) // 2
        return full**2 if self._recipe.attention == "bidirectional" else causal

    def padded(self, which: Ints) -> int:
        """Tokens that these views run together, padding among them."""
        lengths = self.lengths[which]
        return int(lengths.sum() if self._packed(which) else lengths.max() * len(which))

    @cached_property
    def bearable_padding(self) -> int | None:
        """Tokens of padding that cost less than one more micro-batch; None where none is."""
        everything = np.arange(len(self._chosen))
        packed = len(everything) > 0 and self._packed(everything)
        return None if packed else bearable_padding(self._backbone.device)

    def __call__(self, which: Ints) -> Tensor:
        """The vectors [V, D] of these views, all of one group, or [V, P x D] of their P parts."""
        group = int(self.groups[which[0]])
        if group < 0 and not self._packed(which):
            return self._whole(which)
        batch = assemble(self._views, self._chosen[which], whole=group < 0)
        prefix = None if group < 0 else self._views.prefixes[group]
        hidden_VTD = self._states(which, batch, prefix)
        return self._read(which, hidden_VTD, batch.parts or (batch.span_VT,), batch.ids_VT)

    def _states(self, which: Ints, batch: MicroBatch, prefix: Ids | None) -> Tensor:
        """The hidden states of what comes after a prefix, in one row or padded."""
        layer = self._recipe.layer
        if self._packed(which):
            shared = None if prefix is None else self._prefixes.key_values(prefix)
            return self._packing.states(batch.ids_VT, batch.mask_VT, layer=layer, shared=shared)
        assert prefix is not None, "only rows without padding may go without a prefix here"
        # What is done to states inside is not done to the prefix.
        self._prefixes.key_values(prefix)
        with self._hooks.over(self._views, self._chosen[which], batch, skip=len(prefix)):
            return self._prefixes.states(prefix, batch.ids_VT, batch.mask_VT, layer=layer)

    def in_float32(self, view: int) -> Tensor:
        """The vector [1, D] of one view, whole and in float32."""
        with self._backbone.float32():
            return self._whole(np.array([view]))

    def _packed(self, which: Ints) -> bool:
        """Whether these views go through the model in one row."""
        # What is said goes on from padded rows, and routers and interventions look into them.
        if self._recipe.decode or self._readout.router_width or self._recipe.interventions:
            return False
        longest = int((self.lengths[which] + self.saved[which]).max())
        return self._packing.serves(longest, shared=bool(self.groups[which[0]] >= 0))

    def _whole(self, which: Ints) -> Tensor:
        batch = assemble(self._views, self._chosen[which], side=self._side)
        if self._recipe.decode is not None:
            return self._decoded(which, batch)
        layer = self._recipe.layer
        with self._hooks.over(self._views, self._chosen[which], batch):
            hidden_VTD = self._backbone.states(batch.ids_VT, batch.mask_VT, layer=layer)
        return self._read(which, hidden_VTD, batch.parts or (batch.span_VT,), batch.ids_VT)

    def _decoded(self, which: Ints, batch: MicroBatch) -> Tensor:
        """The vectors of these views, read off what is said after them."""
        asked, head, stops = self._recipe.decode, self._backbone.head, self._views.stops
        assert asked is not None
        assert head is not None
        assert stops is not None
        # Padding stands between a prompt and its words: harmless where attention asks for positions
        # alone and reaches back for ever, else each view goes by itself.
        if len(which) > 1 and not self._prefixes.serves(
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
        self, which: Ints, hidden_VTD: Tensor, spans: Sequence[Tensor], ids_VT: Tensor
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
        return vectors_VD.masked_fill(to_device(broken_V, vectors_VD.device)[:, None], torch.nan)


# Tails look at each other in vain. Of so few tokens that costs little; of more, as many pairs as a
# state is wide cost about what running a token does.
_FEW_TAIL_TOKENS = 512
_WORTH = 0.9


class TreeForward:
    """The way of whole texts to the vectors of their views: one after the other, V x D wide."""

    def __init__(self, views: TokenViews, texts: Ints, loaded: Loaded) -> None:
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
    def groups(self) -> Ints:
        """Per text, the prefix that is run once for its group, or -1 if the text runs it itself."""
        prefix = self._views.prefix[self._texts * self._views.views_per_text].astype(np.int64)
        long = np.array([*(len(p) >= FEWEST_TOKENS for p in self._views.prefixes), False])
        return np.where(long[prefix], prefix, -1)

    @cached_property
    def lengths(self) -> Ints:
        """Tokens that each text runs itself, with all its tails."""
        return tree_lengths(self._views)[self._texts] - np.where(
            self.groups >= 0,
            self._views.prefix_lengths[self._texts * self._views.views_per_text],
            0,
        )

    @cached_property
    def pairs(self) -> Ints:
        """How often one token of each text looks at another one."""
        views, per_text = self._views, self._views.views_per_text
        full = views.lengths.reshape(-1, per_text)[self._texts]
        prefix = views.prefix_lengths[::per_text][self._texts]
        trunk, saved = prefix + views.common[self._texts], np.where(self.groups >= 0, prefix, 0)
        tails = (full * (full + 1)).sum(axis=1) - per_text * trunk * (trunk + 1)
        once: Ints = (tails + trunk * (trunk + 1) - saved * (saved + 1)) // 2
        return once

    def padded(self, which: Ints) -> int:
        """Tokens that these texts run together, padding among them."""
        lengths = self.lengths[which]
        return int(lengths.sum() if self._packed(which) else lengths.max() * len(which))

    @cached_property
    def bearable_padding(self) -> int | None:
        """Tokens of padding that cost less than one more micro-batch; None where none is."""
        packed = len(self._texts) > 0 and self._packed(np.arange(len(self._texts)))
        return None if packed else bearable_padding(self._prefixes.backbone.device)

    def __call__(self, which: Ints) -> Tensor:
        """The vectors [R, V x D] of these texts, all of one group."""
        group = int(self.groups[which[0]])
        tree_batch, span_RVT = build_tree_batch(self._views, self._texts[which], whole=group < 0)
        prefix = self._views.prefixes[group] if group >= 0 else None
        layer = self._recipe.layer
        if self._packed(which):
            shared = None if prefix is None else self._prefixes.key_values(prefix)
            hidden_RTD = self._packing.tree_states(tree_batch, layer=layer, shared=shared)
        else:
            hidden_RTD = self._prefixes.tree_states(prefix, tree_batch, layer=layer)
        spans = span_RVT.unbind(dim=1)
        read = [self._readout(hidden_RTD, span_RT, tree_batch.ids_RT) for span_RT in spans]
        return torch.cat(read, dim=1)

    def _packed(self, which: Ints) -> bool:
        """Whether these texts go through the model in one row."""
        if self._readout.router_width:
            return False
        lengths_RV = self._views.lengths.reshape(-1, self._views.views_per_text)
        longest = int(lengths_RV[self._texts[which]].max())
        return self._packing.serves_trees(longest, shared=bool(self.groups[which[0]] >= 0))

    def in_float32(self, view: int) -> Tensor:
        """The vectors [1, V x D] of one text, each view whole and in float32."""
        first = int(self._texts[view]) * self._views.views_per_text
        each = range(first, first + self._views.views_per_text)
        return torch.cat([self._whole.in_float32(one) for one in each], dim=1)


def tree_lengths(views: TokenViews) -> Ints:
    """Tokens of each text [R] when what its views share is there once."""
    own = np.diff(views.offsets).reshape(-1, views.views_per_text).sum(axis=1)
    total: Ints = own + views.prefix_lengths[:: views.views_per_text]
    return total


def worthwhile(views: TokenViews, loaded: Loaded) -> npt.NDArray[np.bool_]:
    """The texts [R] that are better run as trees than view by view, and can be."""
    lengths_RV = views.lengths.reshape(-1, views.views_per_text)
    prefix = views.prefix_lengths[:: views.views_per_text]
    # Interventions know one last token per row, and a tree has one per tail.
    if loaded.side == "left" or loaded.recipe.interventions or not views.common.any():
        return np.zeros(len(lengths_RV), np.bool_)
    if not loaded.prefixes.serves(FEWEST_TOKENS, int(lengths_RV.max())):
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
