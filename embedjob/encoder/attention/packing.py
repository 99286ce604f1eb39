"""Sequence packing: views or trees without padding, end to end in one row.

Views do not see each other. Packing is used for a model only after its states on small examples
were those of padded views.

Legend: R texts, V views, T tokens of the longest, N tokens of all, D width.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from embedjob.encoder.attention.kernels import FLASH_TYPES
from embedjob.encoder.attention.shared_prefix import KeyValues, Prefixes, cascade_attention
from embedjob.encoder.attention.tree import PrefixTreeBatch, pad_trees
from embedjob.encoder.attention.varlen import PackedTrees, Sequences, pack_sequences
from embedjob.encoder.backbone import Backbone, ReadLayer
from embedjob.encoder.batching.transfers import to_device
from embedjob.errors import in_one_line

_LOG = logging.getLogger(__name__)
_LENGTHS = (9, 5, 7)
# The shared tokens of a tree, then the tokens of each suffix.
_TREES = ((5, 2, 3), (3, 1, 4))
_SHARED = 4
# The example exceeds windows up to this width; with a wider window it is enough that the model
# hands it to its attention.
_NARROW = 256
# The error of a single state may be this many times the error allowed for all states together.
_SINGLE_STATE = 4


@dataclass(frozen=True)
class _Row:
    """Padded tokens [V, T], the places [N] of those in the row, and who sees whom there."""

    ids_VT: Tensor
    position_VT: Tensor
    places_N: Tensor
    layout: Sequences | PackedTrees


class Packing:
    """Runs views through one loaded model in one row, where that gives the same states."""

    def __init__(self, prefixes: Prefixes, *, wanted: bool | None = None) -> None:
        """Decide on packing by `wanted`; None packs where it pays: on a GPU, and trees on a CPU."""
        self._prefixes = prefixes
        self.backbone: Backbone = prefixes.backbone
        place = self.backbone.device.type
        fits = place == "cuda" and self.backbone.model.dtype in FLASH_TYPES
        self._wanted = fits if wanted is None else wanted
        # A CPU attends to padding, but the suffixes of a tree cost it more: under a mask it
        # attends from each to all others, in a row to its own tree's shared tokens alone.
        self._trees_wanted = self._wanted or (wanted is None and place == "cpu")

    def serves(self, longest: int, *, shared: bool) -> bool:
        """Tell whether views up to this length can be packed, after a shared prefix or whole."""
        return self._wanted and self._can_pack(longest, shared=shared)

    def serves_trees(self, longest: int, *, shared: bool) -> bool:
        """Tell whether trees, whose views are up to this length, can be packed."""
        return (
            self._trees_wanted and self._can_pack(longest, shared=shared) and not self._pads_trees
        )

    def states(
        self,
        ids_VT: Tensor,
        mask_VT: Tensor,
        *,
        layer: ReadLayer,
        shared: KeyValues | None = None,
    ) -> Tensor:
        """Return the hidden states [V, T, D] of views padded anywhere; 0 at padding."""
        states_VTD, _ = self._run(ids_VT, mask_VT, layer=layer, shared=shared)
        return states_VTD

    def tree_states(
        self, tree_batch: PrefixTreeBatch, *, layer: ReadLayer, shared: KeyValues | None = None
    ) -> Tensor:
        """Return the hidden states [R, T, D] of trees; 0 at padding."""
        states_RTD, _ = self._in_one_row(self._flatten_tree(tree_batch), layer=layer, shared=shared)
        return states_RTD

    def _can_pack(self, longest: int, *, shared: bool) -> bool:
        return longest <= self._longest and not (shared and self._pads_after_prefix)

    def _run(
        self,
        ids_VT: Tensor,
        mask_VT: Tensor,
        *,
        layer: ReadLayer,
        shared: KeyValues | None,
    ) -> tuple[Tensor, set[int]]:
        """Return the hidden states, and the windows that the model's attention asked for."""
        position_VT = mask_VT.long().cumsum(dim=1) - 1 + (shared.length if shared else 0)
        layout = pack_sequences(mask_VT.sum(dim=1).tolist(), device=self.backbone.device)
        row = _Row(ids_VT, position_VT, mask_VT.flatten().nonzero()[:, 0], layout)
        return self._in_one_row(row, layer=layer, shared=shared)

    def _flatten_tree(self, tree_batch: PrefixTreeBatch) -> "_Row":
        """Return the row of the shared tokens of all trees, then all suffixes, the shortest first.

        In each tree those of one length lie side by side, which saves a CPU copies of them.
        """
        suffix_RT = tree_batch.suffix_RT
        shared_N, suffixes_N = (
            which_RT.flatten().nonzero()[:, 0] for which_RT in (suffix_RT == 0, suffix_RT > 0)
        )
        numbers = range(int(suffix_RT.max()) + 1)
        lengths_RS = torch.stack([(suffix_RT == number).sum(dim=1) for number in numbers], dim=1)
        shared, (suffixes_RS, order_RS) = lengths_RS[:, 0].tolist(), lengths_RS[:, 1:].sort(dim=1)
        row_N = suffixes_N // suffix_RT.shape[1]
        rank_N = order_RS.argsort(dim=1)[row_N, suffix_RT.flatten()[suffixes_N] - 1]
        suffixes_N = suffixes_N[(row_N * len(numbers) + rank_N).argsort(stable=True)]
        parts = [*shared, *suffixes_RS.flatten().tolist()]
        trees = PackedTrees(
            *(
                pack_sequences(lengths, device=self.backbone.device)
                for lengths in (parts, shared, suffixes_RS.sum(dim=1).tolist())
            )
        )
        places_N = torch.cat([shared_N, suffixes_N])
        return _Row(tree_batch.ids_RT, tree_batch.position_RT, places_N, trees)

    def _in_one_row(
        self, row: "_Row", *, layer: ReadLayer, shared: KeyValues | None
    ) -> tuple[Tensor, set[int]]:
        """Return the hidden states at their tokens' places, and the windows asked for."""
        backbone = self.backbone
        ids_N = row.ids_VT.flatten()[row.places_N]
        position_N = row.position_VT.flatten()[row.places_N]
        backbone.prepare(layer)
        with cascade_attention(backbone.model, shared=shared, layout=row.layout) as windows:
            states_ND = backbone.states(
                ids_N[None],
                torch.ones_like(ids_N[None], dtype=torch.bool),
                layer=layer,
                position=position_N[None],
            )[0]
        padded_ND = states_ND.new_zeros(row.ids_VT.numel(), states_ND.shape[-1])
        padded_ND.index_copy_(0, to_device(row.places_N, backbone.device), states_ND)
        return padded_ND.view(*row.ids_VT.shape, -1), windows

    @cached_property
    def _longest(self) -> float:
        """Return the longest view that may be packed: 0 for none, infinite without a limit."""
        reason, longest = self._difference(shared=False)
        if reason:
            which = "Views" if self._wanted else "Prefix trees"
            _LOG.warning("%s are padded for this model: %s", which, reason)
            return 0
        return longest

    @cached_property
    def _pads_after_prefix(self) -> bool:
        """Tell whether views must be padded after a shared prefix, though whole views need not."""
        reason, _ = self._difference(shared=True)
        if reason:
            which = "Views" if self._wanted else "Prefix trees"
            _LOG.warning("%s that share a prefix are padded for this model: %s", which, reason)
        return bool(reason)

    @cached_property
    def _pads_trees(self) -> bool:
        """Tell whether trees must be padded, though views need not."""
        try:
            reason = self._tree_difference()
        except Exception as error:
            reason = in_one_line(error)
        if reason:
            _LOG.warning("Prefix trees are padded for this model: %s", reason)
        return bool(reason)

    def _difference(self, *, shared: bool) -> tuple[str, float]:
        """Return why views cannot be packed, empty if they can, and how long they may be."""
        try:
            return self._compare(shared=shared)
        except Exception as error:
            # If a model fails with its attention replaced, it keeps its own attention.
            return in_one_line(error), 0

    def _compare(self, *, shared: bool) -> tuple[str, float]:
        """Compare packed and padded states on a small example; return as `_difference` does.

        A window limits the length if the model does not hand it to its attention, or if attention
        is bidirectional: models do not agree on where a bidirectional window ends.
        """
        backbone = self.backbone
        if not backbone.takes_positions:
            return "the model takes no positions", 0
        windows = backbone.windows
        # After a prefix no view is longer than a window.
        narrow = () if shared else (window for window in windows if window <= _NARROW)
        ids_VT, mask_VT = self._example(narrow)
        expected_VTD = backbone.states(ids_VT, mask_VT, layer=-1)
        skip = _SHARED if shared else 0
        # All views of the example begin alike.
        prefix = self._prefixes.run(ids_VT[0, :skip]) if shared else None
        states_VTD, seen = self._run(ids_VT[:, skip:], mask_VT[:, skip:], layer=-1, shared=prefix)
        real = to_device(mask_VT[:, skip:], states_VTD.device)
        expected_ND = expected_VTD[:, skip:][real].float()
        longest = min((window for window in windows if window not in seen), default=np.inf)
        reason = _state_difference(states_VTD[real], expected_ND, allowed=backbone.tolerance)
        return reason, longest

    def _tree_difference(self) -> str:
        """Compare two small trees with plain views; return why trees cannot be packed, if so."""
        ids = np.arange(1, 1 + sum(map(sum, _TREES))).astype(np.uint32) % self.backbone.vocabulary
        cut = np.split(ids, np.cumsum(_TREES)[:-1])
        trees = [cut[start : start + len(tree)] for start, tree in zip((0, 3), _TREES, strict=True)]
        states_RTD = self.tree_states(pad_trees(trees), layer=-1)
        packed, expected = [], []
        for states_TD, (shared, *suffixes) in zip(states_RTD, trees, strict=True):
            for suffix, before in zip(suffixes, np.cumsum([0, *map(len, suffixes)]), strict=False):
                whole = torch.from_numpy(np.concatenate([shared, suffix]).astype(np.int64))[None]
                plain = self.backbone.states(whole, torch.ones_like(whole).bool(), layer=-1)[0]
                expected.append(plain[len(shared) :].float())
                packed.append(states_TD[len(shared) + before :][: len(suffix)])
        allowed = self.backbone.tolerance
        return _state_difference(torch.cat(packed), torch.cat(expected), allowed=allowed)

    def _example(self, windows: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Return ids and mask [V, T] of views of several lengths, the longest over all windows."""
        room = self.backbone.info.max_positions or np.inf
        lengths = torch.tensor([int(min(room, max(_LENGTHS[0], *windows, 0) + 2)), *_LENGTHS])
        place = torch.arange(int(lengths.max()))
        own = torch.where(place < _SHARED, 0, torch.arange(len(lengths))[:, None])
        ids_VT = (1 + place * 5 + own * 11).remainder(self.backbone.vocabulary)
        mask_VT = place < lengths[:, None]
        return ids_VT, mask_VT


def _state_difference(states_ND: Tensor, expected_ND: Tensor, *, allowed: float) -> str:
    """Describe how much states differ from those expected; empty if by rounding alone."""
    error_N = (states_ND.float() - expected_ND).norm(dim=1)
    norm = float(error_N.norm() / expected_ND.norm())
    # The state of a token whose embedding is zero may be zero.
    each_N = expected_ND.norm(dim=1).clamp(min=1e-3 * float(expected_ND.norm(dim=1).max()))
    worst = float((error_N / each_N).max())
    alike = norm <= allowed and worst <= _SINGLE_STATE * allowed
    return "" if alike else f"its states would differ by {norm:.1e}"
