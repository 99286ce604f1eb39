"""The forward pass of views and of prefix trees: from token views to pooled vectors.

Views that begin with the same prefix share its keys and values. The views of a text that begin
alike may go through the model as a tree. Both need a model whose tokens interact in attention
alone, by their positions: `Prefixes.serves` tells.

Legend: R texts, V views, T tokens, D width.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from embedjob.config.interventions import keep_prefixes
from embedjob.config.recipe import Recipe
from embedjob.encoder.attention.packing import Packing
from embedjob.encoder.attention.shared_prefix import FEWEST_TOKENS, Prefixes
from embedjob.encoder.attention.tree import build_tree_batch
from embedjob.encoder.batching.padding import (
    MicroBatch,
    Side,
    bearable_padding,
    pad_views,
)
from embedjob.encoder.intervention_hooks import InterventionHooks
from embedjob.encoder.outputs.decoding import decode, draws_of
from embedjob.encoder.outputs.pool_and_heads import Readout
from embedjob.encoder.outputs.view_states import ViewStates
from embedjob.text.arrays import Flags, Ids, Ints
from embedjob.text.views import TokenViews
from embedjob.vectors.sparse import Row

# Padded trees compute suffixes against each other, and mask that. For few tokens it costs little;
# for more, about as many pairs as a state is wide cost what running a token costs.
_FEW_SUFFIX_TOKENS = 512
_WORTH = 0.9


class Loaded(NamedTuple):
    """The parts of an encoder that run views."""

    prefixes: Prefixes
    packing: Packing
    readout: Readout
    recipe: Recipe
    side: Side
    hooks: InterventionHooks


class ViewForward:
    """Computes the vectors of chosen views.

    `rows` holds the sparse entries of views from their last pass. A view whose entries are not
    finite gets a vector of NaN, so that it is retried as for its vector.
    """

    def __init__(self, views: TokenViews, chosen: Ints, loaded: Loaded) -> None:
        """Choose views, which must all have the same number of parts."""
        self._views = views
        self._chosen = chosen
        self._prefixes, self._packing, self._readout = loaded[:3]
        self._recipe, self._side, self._hooks = loaded[3:]
        self._backbone = loaded.prefixes.backbone
        self.rows: dict[int, Row] = {}

    @property
    def width(self) -> int:
        """Return the length of a view's vector, or of the vectors of all its parts together."""
        return self._readout.width * len(self._views.spans(int(self._chosen[0])))

    @cached_property
    def groups(self) -> Ints:
        """Return per view the prefix that its group shares, -1 for views that go whole."""
        ids = [prefix.tobytes() for prefix in self._views.prefixes]
        # Templates may begin alike: then their views are one group.
        prefix = np.array([*map(ids.index, ids), -1])[self._views.prefix[self._chosen]]
        if self._recipe.decode is not None or not keep_prefixes(self._recipe.interventions):
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
        """Return the tokens of each view that are run once for its group."""
        return np.where(self.groups >= 0, self._views.prefix_lengths[self._chosen], 0)

    @cached_property
    def lengths(self) -> Ints:
        """Return the tokens that each view runs itself."""
        return self._views.lengths[self._chosen] - self.saved

    @cached_property
    def pairs(self) -> Ints:
        """Return the query-key pairs that each view attends over."""
        full, saved = self.lengths + self.saved, self.saved
        causal: Ints = (full * (full + 1) - saved * (saved + 1)) // 2
        return full**2 if self._recipe.attention == "bidirectional" else causal

    def padded(self, which: Ints) -> int:
        """Return the tokens that these views run together, with padding."""
        lengths = self.lengths[which]
        return int(lengths.sum() if self._packed(which) else lengths.max() * len(which))

    @cached_property
    def bearable_padding(self) -> int | None:
        """Return the padding tokens cheaper than a further micro-batch; None if not padded."""
        packed = len(self._chosen) > 0 and self._packed(np.arange(len(self._chosen)))
        return None if packed else bearable_padding(self._backbone.device)

    def __call__(self, which: Ints) -> Tensor:
        """Return the vectors [V, D] of views of one group, or [V, P x D] of their P parts."""
        group = int(self.groups[which[0]])
        if group < 0 and not self._packed(which):
            return self._whole(which)
        batch = pad_views(self._views, self._chosen[which], whole=group < 0)
        prefix = None if group < 0 else self._views.prefixes[group]
        hidden_VTD = self._states(which, batch, prefix)
        return self._read(which, hidden_VTD, batch.parts or (batch.span_VT,), batch.ids_VT)

    def _states(self, which: Ints, batch: MicroBatch, prefix: Ids | None) -> Tensor:
        """Return the hidden states of the tokens after a prefix, packed or padded."""
        layer = self._recipe.layer
        if self._packed(which):
            shared = None if prefix is None else self._prefixes.key_values(prefix)
            return self._packing.states(batch.ids_VT, batch.mask_VT, layer=layer, shared=shared)
        assert prefix is not None, "a padded batch without a prefix goes whole"
        # Run the prefix first: it is kept, and no intervention that is installed may change it.
        self._prefixes.key_values(prefix)
        with self._hooks.installed(self._views, self._chosen[which], batch, skip=len(prefix)):
            return self._prefixes.states(prefix, batch.ids_VT, batch.mask_VT, layer=layer)

    def in_float32(self, view: int) -> Tensor:
        """Return the vector [1, D] of one view, run whole and in float32."""
        with self._backbone.float32():
            return self._whole(np.array([view]))

    def _packed(self, which: Ints) -> bool:
        """Tell whether these views go through the model in one row."""
        # Decoding continues padded rows, and routers and interventions read or change them.
        if self._recipe.decode or self._recipe.reads_routers or self._recipe.interventions:
            return False
        longest = int((self.lengths[which] + self.saved[which]).max())
        return self._packing.serves(longest, shared=bool(self.groups[which[0]] >= 0))

    def _whole(self, which: Ints) -> Tensor:
        batch = pad_views(self._views, self._chosen[which], side=self._side)
        if self._recipe.decode is not None:
            return self._decoded(which, batch)
        layer = self._recipe.layer
        with self._hooks.installed(self._views, self._chosen[which], batch):
            hidden_VTD = self._backbone.states(batch.ids_VT, batch.mask_VT, layer=layer)
        return self._read(which, hidden_VTD, batch.parts or (batch.span_VT,), batch.ids_VT)

    def _decoded(self, which: Ints, batch: MicroBatch) -> Tensor:
        """Return the vectors of these views, pooled from the tokens that are decoded after them."""
        options, head, stops = self._recipe.decode, self._backbone.head, self._views.stops
        assert options is not None
        assert head is not None
        assert stops is not None
        # Padding stands between a prompt and its decoded tokens. This is harmless if attention uses
        # positions alone and has no window; otherwise each view is run by itself.
        if len(which) > 1 and not self._prefixes.serves(
            FEWEST_TOKENS, batch.ids_VT.shape[1] + options.max_tokens
        ):
            return torch.cat([self._whole(which[[row]]) for row in range(len(which))])
        decoded = decode(
            self._backbone,
            head,
            (batch.ids_VT, batch.mask_VT),
            steps=options.max_tokens,
            stops=torch.from_numpy(stops.astype(np.int64)),
            draws=draws_of([self._views.full_ids(int(v)) for v in self._chosen[which]], options),
        )
        return self._read(which, decoded.states_VSD, (decoded.counts_VS,), batch.ids_VT)

    def _read(
        self, which: Ints, hidden_VTD: Tensor, spans: Sequence[Tensor], ids_VT: Tensor
    ) -> Tensor:
        """Return the vectors of all parts side by side; keep the sparse entries in `rows`."""
        words = self._views.words
        # With sparse entries each text has a single view, and each view a single part.
        chosen = None if words is None else [words.of(int(text)) for text in self._chosen[which]]
        parts = [ViewStates(hidden_VTD, span_VT, ids_VT, chosen) for span_VT in spans]
        vectors_VD = torch.cat([self._readout(part) for part in parts], dim=1)
        if parts[0].rows is not None:
            self.rows.update(zip(which.tolist(), parts[0].rows, strict=True))
        return vectors_VD


class TreeForward:
    """Computes the vectors of all views of whole texts, as prefix trees: V x D a text."""

    def __init__(self, views: TokenViews, texts: Ints, loaded: Loaded) -> None:
        """Choose texts, whose views must all have one part."""
        self._views = views
        self._texts = texts
        self._prefixes, self._readout, self._recipe = loaded.prefixes, loaded.readout, loaded.recipe
        self._packing, self._loaded = loaded.packing, loaded
        self._views_whole = ViewForward(views, np.arange(len(views.prefix)), loaded)

    @property
    def width(self) -> int:
        """Return the length of the vectors of one text."""
        return self._views.views_per_text * self._views_whole.width

    @cached_property
    def groups(self) -> Ints:
        """Return per text the prefix that its group shares, -1 for texts that go whole."""
        prefix = self._views.prefix[self._texts * self._views.views_per_text].astype(np.int64)
        long = np.array([*(len(p) >= FEWEST_TOKENS for p in self._views.prefixes), False])
        return np.where(long[prefix], prefix, -1)

    @cached_property
    def lengths(self) -> Ints:
        """Return the tokens that each text runs itself, with all its suffixes."""
        prefix = self._views.prefix_lengths[self._texts * self._views.views_per_text]
        return tree_lengths(self._views)[self._texts] - np.where(self.groups >= 0, prefix, 0)

    @cached_property
    def pairs(self) -> Ints:
        """Return the query-key pairs that each text attends over."""
        views, per_text = self._views, self._views.views_per_text
        full = views.lengths.reshape(-1, per_text)[self._texts]
        prefix = views.prefix_lengths[::per_text][self._texts]
        shared, saved = prefix + views.common[self._texts], np.where(self.groups >= 0, prefix, 0)
        suffixes = (full * (full + 1)).sum(axis=1) - per_text * shared * (shared + 1)
        pairs: Ints = (suffixes + shared * (shared + 1) - saved * (saved + 1)) // 2
        return pairs

    def padded(self, which: Ints) -> int:
        """Return the tokens that these texts run together, with padding."""
        lengths = self.lengths[which]
        return int(lengths.sum() if self._packed(which) else lengths.max() * len(which))

    @cached_property
    def bearable_padding(self) -> int | None:
        """Return the padding tokens cheaper than a further micro-batch; None if not padded."""
        packed = len(self._texts) > 0 and self._packed(np.arange(len(self._texts)))
        return None if packed else bearable_padding(self._prefixes.backbone.device)

    def __call__(self, which: Ints) -> Tensor:
        """Return the vectors [R, V x D] of texts of one group."""
        group = int(self.groups[which[0]])
        tree_batch, span_RVT = build_tree_batch(self._views, self._texts[which], whole=group < 0)
        prefix = self._views.prefixes[group] if group >= 0 else None
        layer = self._recipe.layer
        if self._packed(which):
            shared = None if prefix is None else self._prefixes.key_values(prefix)
            hidden_RTD = self._packing.tree_states(tree_batch, layer=layer, shared=shared)
        else:
            hidden_RTD = self._prefixes.tree_states(prefix, tree_batch, layer=layer)
        return self._read(hidden_RTD, span_RVT, tree_batch.ids_RT)

    def _read(self, hidden_RTD: Tensor, span_RVT: Tensor, ids_RT: Tensor) -> Tensor:
        """Return the vectors [R, V x D] of all views: scored together, or pooled one by one."""
        if self._readout.takes_rows:
            texts, views = span_RVT.shape[:2]
            row_V = torch.arange(texts).repeat_interleave(views)
            states = ViewStates(hidden_RTD, span_RVT.flatten(0, 1), ids_RT, row_V=row_V)
            return self._readout(states).view(texts, -1)
        spans = span_RVT.unbind(dim=1)
        vectors = [self._readout(ViewStates(hidden_RTD, span_RT, ids_RT)) for span_RT in spans]
        return torch.cat(vectors, dim=1)

    def _packed(self, which: Ints) -> bool:
        """Tell whether these texts go through the model in one row."""
        lengths_RV = self._views.lengths.reshape(-1, self._views.views_per_text)
        longest = int(lengths_RV[self._texts[which]].max())
        return _in_one_row(longest, self._loaded, shared=bool(self.groups[which[0]] >= 0))

    def in_float32(self, view: int) -> Tensor:
        """Return the vectors [1, V x D] of one text, each view run whole and in float32."""
        first = int(self._texts[view]) * self._views.views_per_text
        numbers = range(first, first + self._views.views_per_text)
        return torch.cat([self._views_whole.in_float32(number) for number in numbers], dim=1)


def _in_one_row(longest: int, loaded: Loaded, *, shared: bool) -> bool:
    """Tell whether trees whose views are up to this length go in one row."""
    packing, recipe = loaded.packing, loaded.recipe
    return not recipe.reads_routers and packing.serves_trees(longest, shared=shared)


def worth_as_trees(views: TokenViews, loaded: Loaded) -> Flags:
    """Tell which texts [R] can go as prefix trees, and are cheaper so than view by view."""
    lengths_RV = views.lengths.reshape(-1, views.views_per_text)
    prefix = views.prefix_lengths[:: views.views_per_text]
    # Interventions expect one last token per row, and a tree has one per suffix.
    if loaded.side == "left" or loaded.recipe.interventions or not views.common.any():
        return np.zeros(len(lengths_RV), np.bool_)
    if not loaded.prefixes.serves(FEWEST_TOKENS, int(lengths_RV.max())):
        return np.zeros(len(lengths_RV), np.bool_)
    saved = np.where(prefix >= FEWEST_TOKENS, prefix, 0)
    view_by_view = (lengths_RV - saved[:, None]).sum(axis=1)
    trees = tree_lengths(views) - saved
    suffixes = trees - views.common
    spans = views.span.reshape(-1, views.views_per_text, 2)
    full = (spans[..., 0] < spans[..., 1]).all(axis=1)
    worth = trees <= _WORTH * view_by_view
    if not _in_one_row(int(lengths_RV.max()), loaded, shared=bool(saved.any())):
        saved_pairs = (view_by_view - trees) * loaded.prefixes.backbone.width
        worth &= (suffixes <= _FEW_SUFFIX_TOKENS) | (suffixes**2 <= saved_pairs)
    chosen: Flags = (views.common > 0) & full & worth
    return chosen


def tree_lengths(views: TokenViews) -> Ints:
    """Return the tokens of each text [R] as a tree, which holds shared tokens once."""
    own = np.diff(views.offsets).reshape(-1, views.views_per_text).sum(axis=1)
    total: Ints = own + views.prefix_lengths[:: views.views_per_text]
    return total
