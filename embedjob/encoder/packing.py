"""Views without padding: end to end in one row, none of which sees another.

Legend: V views, T tokens of the longest, N tokens of all, D width.
"""

import logging
from collections.abc import Iterable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from embedjob.encoder.backbone import Backbone, Layer
from embedjob.encoder.cascade import KeyValues, cascading
from embedjob.encoder.kernels import FLASH_TYPES
from embedjob.encoder.prefixes import Prefixes
from embedjob.encoder.transfers import onto
from embedjob.encoder.varlen import sequences
from embedjob.errors import in_one_line

_LOG = logging.getLogger(__name__)
_LENGTHS = (9, 5, 7)
_SHARED = 4
# A window this narrow is looked over in the example; of a wider one it is enough that the model
# hands it to its attention.
_NARROW = 256
# Of all states together; one of them may be off by some times that.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
_OF_ONE = 4


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

    def states(
        self, ids_VT: Tensor, mask_VT: Tensor, *, layer: Layer, shared: KeyValues | None = None
    ) -> Tensor:
        """The hidden states [V, T, D] of views padded anywhere, 0 where they are padded."""
        states_VTD, _ = self._run(ids_VT, mask_VT, layer=layer, shared=shared)
        return states_VTD

    def _run(
        self, ids_VT: Tensor, mask_VT: Tensor, *, layer: Layer, shared: KeyValues | None
    ) -> tuple[Tensor, set[int]]:
        """The hidden states, and the windows that the model's attention has asked for."""
        backbone = self.backbone
        places_N = mask_VT.flatten().nonzero()[:, 0]
        ids_N = ids_VT.flatten()[places_N]
        first = shared.length if shared else 0
        position_N = (mask_VT.long().cumsum(dim=1) - 1).flatten()[places_N] + first
        rows = sequences(mask_VT.sum(dim=1).tolist(), device=backbone.device)
        backbone.prepare(layer)
        with cascading(backbone.model, shared=shared, among=rows) as windows:
            states_ND = backbone.states(
                ids_N[None],
                torch.ones_like(ids_N[None], dtype=torch.bool),
                layer=layer,
                position=position_N[None],
            )[0]
        padded_ND = states_ND.new_zeros(mask_VT.numel(), states_ND.shape[-1])
        padded_ND.index_copy_(0, onto(places_N, backbone.device), states_ND)
        return padded_ND.view(*mask_VT.shape, -1), windows

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
        real = onto(mask_VT[:, skip:], states_VTD.device)
        expected_ND = expected_VTD[:, skip:][real].float()
        error_N = (states_VTD[real].float() - expected_ND).norm(dim=1)
        allowed = _TOLERANCE[backbone.model.dtype]
        norm = float(error_N.norm() / expected_ND.norm())
        # The state of a token that is embedded as nothing may be nothing.
        each_N = expected_ND.norm(dim=1).clamp(min=1e-3 * float(expected_ND.norm(dim=1).max()))
        worst = float((error_N / each_N).max())
        alike = norm <= allowed and worst <= _OF_ONE * allowed
        longest = min((one for one in windows if one not in seen), default=np.inf)
        return "" if alike else f"its states would differ by {norm:.1e}", longest

    def _example(self, windows: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Ids and mask [V, T] of views of several lengths, one of them wider than these windows."""
        room = self.backbone.facts.max_positions or np.inf
        lengths = torch.tensor([int(min(room, max(_LENGTHS[0], *windows, 0) + 2)), *_LENGTHS])
        place = torch.arange(int(lengths.max()))
        own = torch.where(place < _SHARED, 0, torch.arange(len(lengths))[:, None])
        ids_VT = (1 + place * 5 + own * 11).remainder(self.backbone.vocabulary)
        mask_VT = place < lengths[:, None]
        return ids_VT, mask_VT
