"""Views without padding: end to end in one row, none of which sees another, or as trees.

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
from embedjob.encoder.attention.shared_prefix import KeyValues, Prefixes, cascading
from embedjob.encoder.attention.varlen import Sequences, Trees, sequences
from embedjob.encoder.backbone import Backbone, Layer
from embedjob.encoder.batching.padding import PrefixTreeBatch, pad_trees
from embedjob.encoder.batching.transfers import to_device
from embedjob.errors import in_one_line

_LOG = logging.getLogger(__name__)
_LENGTHS = (9, 5, 7)
# The tokens of a trunk and of its tails.
_TREES = ((5, 2, 3), (3, 1, 4))
_SHARED = 4
# A window this narrow is looked over in the example; of a wider one it is enough that the model
# hands it to its attention.
_NARROW = 256
# One state may be off by so many times what all of them may be together.
_OF_ONE = 4


@dataclass(frozen=True)
class _Row:
    """Padded tokens [V, T], which of them lie in the row [N], and who sees whom there."""

    ids_VT: Tensor
    position_VT: Tensor
    places_N: Tensor
    among: Sequences | Trees


class Packing:
    """Whether views go through one loaded model in one row, and their way through it."""

    def __init__(self, prefixes: Prefixes, *, wanted: bool | None = None) -> None:
        """Runs nothing yet. If not told, it is wanted where a kernel needs no padding: on a GPU."""
        self._prefixes = prefixes
        self.backbone: Backbone = prefixes.backbone
        fits = self.backbone.device.type == "cuda" and self.backbone.model.dtype in FLASH_TYPES
        self._wanted = fits if wanted is None else wanted

    def serves(self, longest: int, *, shared: bool) -> bool:
        """Whether views up to this length can be run so, after a shared prefix or whole."""
        return self._wanted and longest <= self._longest and not (shared and self._apart)

    def serves_trees(self, longest: int, *, shared: bool) -> bool:
        """Whether the views of texts that go as trees, none longer than this, can be run so."""
        return self.serves(longest, shared=shared) and not self._dense

    def states(
        self,
        ids_VT: Tensor,
        mask_VT: Tensor,
        *,
        layer: Layer,
        shared: KeyValues | None = None,
    ) -> Tensor:
        """The hidden states [V, T, D] of views padded anywhere, 0 where they are padded."""
        states_VTD, _ = self._run(ids_VT, mask_VT, layer=layer, shared=shared)
        return states_VTD

    def tree_states(
        self, tree_batch: PrefixTreeBatch, *, layer: Layer, shared: KeyValues | None = None
    ) -> Tensor:
        """The hidden states [R, T, D] of trees, 0 where they are padded."""
        states_RTD, _ = self._in_one_row(self._flatten_tree(tree_batch), layer=layer, shared=shared)
        return states_RTD

    def _run(
        self,
        ids_VT: Tensor,
        mask_VT: Tensor,
        *,
        layer: Layer,
        shared: KeyValues | None,
    ) -> tuple[Tensor, set[int]]:
        """The hidden states, and the windows that the model's attention has asked for."""
        position_VT = mask_VT.long().cumsum(dim=1) - 1 + (shared.length if shared else 0)
        among = sequences(mask_VT.sum(dim=1).tolist(), device=self.backbone.device)
        row = _Row(ids_VT, position_VT, mask_VT.flatten().nonzero()[:, 0], among)
        return self._in_one_row(row, layer=layer, shared=shared)

    def _flatten_tree(self, tree_batch: PrefixTreeBatch) -> "_Row":
        """All trunks end to end, and then all tails."""
        branch_RT = tree_batch.branch_RT
        trunks_N, tails_N = (
            which_RT.flatten().nonzero()[:, 0] for which_RT in (branch_RT == 0, branch_RT > 0)
        )
        lengths_RB = torch.stack(
            [(branch_RT == one).sum(dim=1) for one in range(int(branch_RT.max()) + 1)], dim=1
        )
        trunks, tails_RB = lengths_RB[:, 0].tolist(), lengths_RB[:, 1:]
        runs = [*trunks, *tails_RB.flatten().tolist()], trunks, tails_RB.sum(dim=1).tolist()
        trees = Trees(*(sequences(lengths, device=self.backbone.device) for lengths in runs))
        places_N = torch.cat([trunks_N, tails_N])
        return _Row(tree_batch.ids_RT, tree_batch.position_RT, places_N, trees)

    def _in_one_row(
        self, row: "_Row", *, layer: Layer, shared: KeyValues | None
    ) -> tuple[Tensor, set[int]]:
        """The hidden states where their tokens were, and the windows that were asked for."""
        backbone = self.backbone
        ids_N, position_N = (one.flatten()[row.places_N] for one in (row.ids_VT, row.position_VT))
        backbone.prepare(layer)
        with cascading(backbone.model, shared=shared, among=row.among) as windows:
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
        """The longest view that may be run so: 0 if none may, endless where attention is."""
        reason, longest = self._difference(shared=False)
        if reason:
            _LOG.warning("Views are padded for this model: %s", reason)
            return 0
        return longest

    @cached_property
    def _apart(self) -> bool:
        """Whether views that share a prefix must be padded, though whole ones need not."""
        reason, _ = self._difference(shared=True)
        if reason:
            _LOG.warning("Views that share a prefix are padded for this model: %s", reason)
        return bool(reason)

    @cached_property
    def _dense(self) -> bool:
        """Whether trees must be padded, though views need not."""
        try:
            reason = self._tree_difference()
        except Exception as error:
            reason = in_one_line(error)
        if reason:
            _LOG.warning("Texts with tails are padded for this model: %s", reason)
        return bool(reason)

    def _difference(self, *, shared: bool) -> tuple[str, float]:
        """Why views cannot be run so, by a small example, if they cannot; and how long they may be.

        Whatever a model raises when its attention is replaced, it runs as it is.
        """
        try:
            return self._compared(shared=shared)
        except Exception as error:
            return in_one_line(error), 0

    def _compared(self, *, shared: bool) -> tuple[str, float]:
        """The same, where the model raises nothing.

        A window that the model keeps to itself, and does not hand to its attention, is a limit; and
        so is one of attention that looks both ways, where models do not agree on where it ends.
        """
        backbone = self.backbone
        if not backbone.takes_positions:
            return "the model takes no positions", 0
        windows = backbone.windows
        # After a prefix no view is longer than a window.
        narrow = () if shared else (one for one in windows if one <= _NARROW)
        ids_VT, mask_VT = self._example(narrow)
        expected_VTD = backbone.states(ids_VT, mask_VT, layer=-1)
        skip = _SHARED if shared else 0
        # All views of the example begin alike.
        prefix = self._prefixes.run(ids_VT[0, :skip]) if shared else None
        states_VTD, seen = self._run(ids_VT[:, skip:], mask_VT[:, skip:], layer=-1, shared=prefix)
        real = to_device(mask_VT[:, skip:], states_VTD.device)
        expected_ND = expected_VTD[:, skip:][real].float()
        longest = min((one for one in windows if one not in seen), default=np.inf)
        return _told(states_VTD[real], expected_ND, allowed=backbone.tolerance), longest

    def _tree_difference(self) -> str:
        """Why trees cannot be run so, by two small ones, if they cannot."""
        ids = np.arange(1, 1 + sum(map(sum, _TREES))).astype(np.uint32) % self.backbone.vocabulary
        cut = np.split(ids, np.cumsum(_TREES)[:-1])
        trees = [cut[start : start + len(tree)] for start, tree in zip((0, 3), _TREES, strict=True)]
        states_RTD = self.tree_states(pad_trees(trees), layer=-1)
        found, expected = [], []
        for states_TD, (trunk, *tails) in zip(states_RTD, trees, strict=True):
            for tail, before in zip(tails, np.cumsum([0, *map(len, tails)]), strict=False):
                whole = torch.from_numpy(np.concatenate([trunk, tail]).astype(np.int64))[None]
                plain = self.backbone.states(whole, torch.ones_like(whole).bool(), layer=-1)[0]
                expected.append(plain[len(trunk) :].float())
                found.append(states_TD[len(trunk) + before :][: len(tail)])
        allowed = self.backbone.tolerance
        return _told(torch.cat(found), torch.cat(expected), allowed=allowed)

    def _example(self, windows: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Ids and mask [V, T] of views of several lengths, one of them wider than these windows."""
        room = self.backbone.info.max_positions or np.inf
        lengths = torch.tensor([int(min(room, max(_LENGTHS[0], *windows, 0) + 2)), *_LENGTHS])
        place = torch.arange(int(lengths.max()))
        own = torch.where(place < _SHARED, 0, torch.arange(len(lengths))[:, None])
        ids_VT = (1 + place * 5 + own * 11).remainder(self.backbone.vocabulary)
        mask_VT = place < lengths[:, None]
        return ids_VT, mask_VT


def _told(states_ND: Tensor, expected_ND: Tensor, *, allowed: float) -> str:
    """By how much states differ from what they should be; nothing where it is rounding alone."""
    error_N = (states_ND.float() - expected_ND).norm(dim=1)
    norm = float(error_N.norm() / expected_ND.norm())
    # The state of a token that is embedded as nothing may be nothing.
    each_N = expected_ND.norm(dim=1).clamp(min=1e-3 * float(expected_ND.norm(dim=1).max()))
    worst = float((error_N / each_N).max())
    alike = norm <= allowed and worst <= _OF_ONE * allowed
    return "" if alike else f"its states would differ by {norm:.1e}"
