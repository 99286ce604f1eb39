"""What all views of a template begin with, run once: their later tokens look back on it.

Legend: V views, T tokens, D width.
"""

import logging
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from embedjob.encoder.backbone import Backbone, Layer
from embedjob.encoder.batches import Grove
from embedjob.encoder.cascade import KeyValues, cascading
from embedjob.encoder.windows import length_bound_ropes
from embedjob.errors import in_one_line
from embedjob.text.runs import Ids

_LOG = logging.getLogger(__name__)
# Four shared tokens before 18 own ones bring 1.17x, and before 270 neither gain nor loss (measured
# with SmolLM2-135M on one thread): with fewer, a second look in every layer has too little to save.
FEWEST_TOKENS = 4
# Few-shot prompts of many templates may be larger than the weights; the oldest are made again.
_KEPT_BYTES = 4 << 30
_PROBE = tuple(range(1, 10))
_SHARED = 4


class Prefixes:
    """The keys and values of the prefixes that one loaded model has met."""

    def __init__(self, backbone: Backbone) -> None:
        """Nothing is run before the first prefix comes."""
        self.backbone = backbone
        self._kept: dict[bytes, KeyValues] = {}
        self.tokens_run = 0

    def serve(self, prefix: int, length: int) -> bool:
        """Whether views of this length, that many tokens of them shared, can be run so."""
        return prefix >= FEWEST_TOKENS and length <= self._longest

    def states(self, prefix: Ids, ids_VT: Tensor, mask_VT: Tensor, *, layer: Layer) -> Tensor:
        """The hidden states [V, T, D] of what follows the prefix; padding is on the right."""
        shared = self.key_values(prefix)
        self.backbone.prepare(layer)
        with cascading(self.backbone.model, shared=shared):
            return self.backbone.states(ids_VT, mask_VT, layer=layer, position=shared.length)

    def tree_states(self, prefix: Ids | None, grove: Grove, *, layer: Layer) -> Tensor:
        """The hidden states [R, T, D] of trees, after their prefix if it is not in them."""
        shared = None if prefix is None else self.key_values(prefix)
        self.backbone.prepare(layer)
        with cascading(self.backbone.model, shared=shared, among=grove.sees_RTT):
            return self.backbone.states(
                grove.ids_RT, grove.mask_RT, layer=layer, position=grove.position_RT
            )

    def key_values(self, prefix: Ids) -> KeyValues:
        """The keys and values of a prefix, run when it first comes."""
        key = prefix.tobytes()
        if key not in self._kept:
            self._kept[key] = self.run(torch.from_numpy(prefix.astype(np.int64)))
            self.tokens_run += len(prefix)
            while len(self._kept) > 1 and sum(kv.bytes for kv in self._kept.values()) > _KEPT_BYTES:
                del self._kept[next(iter(self._kept))]
        return self._kept[key]

    def run(self, ids_T: Tensor) -> KeyValues:
        """The keys and values of these ids, which are not kept."""
        made = KeyValues(len(ids_T))
        with cascading(self.backbone.model, kept=made):
            self.backbone.states(ids_T[None], torch.ones_like(ids_T)[None].bool(), layer=-1)
        return made

    @cached_property
    def _longest(self) -> float:
        """The longest view that may be run so: 0 if none may, endless where attention is."""
        longest = min(self.backbone.windows, default=np.inf)
        ropes = length_bound_ropes(self.backbone.model.config.to_dict())
        reason = (
            f"its positions are of the kind {', '.join(ropes)}"
            if ropes
            else f"its attention reaches back {longest:.0f} tokens only"
            if longest < len(_PROBE)
            else self._difference()
        )
        if reason:
            _LOG.warning("Prefixes that views share are run for every view: %s", reason)
            return 0
        return longest

    def _difference(self) -> str:
        """Why this model cannot be run so, if it cannot: seen on a small example."""
        if not self.backbone.takes_positions:
            return "the model takes no positions"
        ids_T = torch.tensor(_PROBE).remainder(self.backbone.vocabulary)
        own = ids_T[_SHARED:]
        # One view is padded, and one is not.
        ids_VT = torch.stack([own, own.flip(0)])
        mask_VT = torch.arange(len(own)) < torch.tensor([[len(own)], [len(own) - 2]])
        plain_VT = torch.cat([ids_T[:_SHARED].expand(2, -1), ids_VT], dim=1)
        whole_VT = torch.cat([torch.ones(2, _SHARED, dtype=torch.bool), mask_VT], dim=1)
        expected = self.backbone.states(plain_VT, whole_VT, layer=-1)[:, _SHARED:]
        try:
            shared = self.run(ids_T[:_SHARED])
            with cascading(self.backbone.model, shared=shared):
                states = self.backbone.states(ids_VT, mask_VT, layer=-1, position=_SHARED)
        except Exception as error:
            # Whatever a model raises when its attention is replaced, it runs as it is.
            return in_one_line(error)
        real = mask_VT.to(states.device)
        norm = float((states - expected)[real].float().norm() / expected[real].float().norm())
        alike = norm <= self.backbone.tolerance
        return "" if alike else f"its states would differ by {norm:.1e}"
