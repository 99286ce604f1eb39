"""What all views of a template begin with, run once: their later tokens look back on it.

Legend: V views, T tokens, D width.
"""

import logging
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embedjob.encoder.backbone import Backbone, Layer
from embedjob.encoder.batches import Grove
from embedjob.encoder.cascade import KeyValues, cascading
from embedjob.text.runs import Ids

_LOG = logging.getLogger(__name__)
# Four shared tokens before 18 own ones bring 1.17x, and before 270 neither gain nor loss (measured
# with SmolLM2-135M on one thread): with fewer, a second look in every layer has too little to save.
FEWEST_TOKENS = 4
# Few-shot prompts of many templates may be larger than the weights; the oldest are made again.
_KEPT_BYTES = 4 << 30
_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window", "window_size")
# Their angles depend on how long the whole input is, so a prefix alone is not what it is in a view.
_LENGTH_BOUND_ROPES = frozenset({"dynamic", "longrope"})
_PROBE = tuple(range(1, 10))
_SHARED = 4
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}


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

    def hold(self, prefix: Ids) -> None:
        """Runs a prefix that is not there yet: what is done to states inside is not done to it."""
        self._key_values(prefix)

    def states(self, prefix: Ids, ids_VT: Tensor, mask_VT: Tensor, *, layer: Layer) -> Tensor:
        """The hidden states [V, T, D] of what follows the prefix; padding is on the right."""
        shared = self._key_values(prefix)
        with cascading(self.backbone.model, shared=shared):
            return self.backbone.states(ids_VT, mask_VT, layer=layer, position=shared.length)

    def tree_states(self, prefix: Ids | None, grove: Grove, *, layer: Layer) -> Tensor:
        """The hidden states [R, T, D] of trees, after their prefix if it is not in them."""
        shared = None if prefix is None else self._key_values(prefix)
        with cascading(self.backbone.model, shared=shared, sees_VTT=grove.sees_RTT):
            return self.backbone.states(
                grove.ids_RT, grove.mask_RT, layer=layer, position=grove.position_RT
            )

    def _key_values(self, prefix: Ids) -> KeyValues:
        key = prefix.tobytes()
        if key not in self._kept:
            self._kept[key] = self._run(torch.from_numpy(prefix.astype(np.int64)))
            while len(self._kept) > 1 and sum(kv.bytes for kv in self._kept.values()) > _KEPT_BYTES:
                del self._kept[next(iter(self._kept))]
        return self._kept[key]

    def _run(self, ids_T: Tensor) -> KeyValues:
        made = KeyValues(len(ids_T))
        with cascading(self.backbone.model, kept=made):
            self.backbone.states(ids_T[None], torch.ones_like(ids_T)[None].bool(), layer=-1)
        self.tokens_run += len(ids_T)
        return made

    @cached_property
    def _longest(self) -> float:
        """The longest view that may be run so: 0 if none may, endless where attention is."""
        config = self.backbone.model.config.to_dict()
        windows = [float(one) for one in _found(config, _WINDOWS) if isinstance(one, int) and one]
        longest = min(windows, default=np.inf)
        ropes = _LENGTH_BOUND_ROPES.intersection(map(str, _found(config, ("rope_type", "type"))))
        reason = (
            f"its positions are of the kind {', '.join(sorted(ropes))}"
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
            shared = self._run(ids_T[:_SHARED])
            with cascading(self.backbone.model, shared=shared):
                states = self.backbone.states(ids_VT, mask_VT, layer=-1, position=_SHARED)
        except Exception as error:
            # Whatever a model raises when its attention is replaced, it runs as it is.
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        self.tokens_run = 0
        real = mask_VT.to(states.device)
        norm = float((states - expected)[real].float().norm() / expected[real].float().norm())
        alike = norm <= _TOLERANCE[self.backbone.model.dtype]
        return "" if alike else f"its states would differ by {norm:.1e}"


def _found(config: Mapping[str, Any], keys: tuple[str, ...]) -> Iterator[Any]:
    """The values of these keys, however deep in a config."""
    for key, value in config.items():
        if key in keys and not isinstance(value, Mapping):
            yield value
        if isinstance(value, Mapping):
            yield from _found(value, keys)
