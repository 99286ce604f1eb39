"""What all views of a template begin with, run once: their later tokens look back on it.

Legend: V views, T tokens, D width.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from embedjob.encoder.attention.direction import configs_of
from embedjob.encoder.attention.kernels import Scores, attend, joined
from embedjob.encoder.attention.varlen import (
    Look,
    Sequences,
    States,
    Trees,
    attend_each,
    attend_trees,
)
from embedjob.encoder.backbone import Backbone, Layer
from embedjob.encoder.batching.padding import PrefixTreeBatch
from embedjob.encoder.batching.transfers import to_device
from embedjob.errors import in_one_line
from embedjob.models.architecture import length_bound_ropes
from embedjob.text.arrays import Ids

NAME = "embedjob_cascade"
# What models hand to their attention and what does not change it, or is heeded below. With anything
# else (sinks, position biases, ...) the model is not one of those that this function can serve.
_KNOWN_WORDS = """
cache_position deterministic dropout is_causal output_attentions output_hidden_states position_ids
return_dict scaling sliding_window softcap use_cache
"""
_KNOWN = frozenset(_KNOWN_WORDS.split())


@dataclass(frozen=True)
class KeyValues:
    """The keys and values [1, K, S, E] of tokens that views share, by layer."""

    length: int
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """The memory that they take."""
        return sum(piece.nbytes for pair in self.layers.values() for piece in pair)


@dataclass(frozen=True)
class _Pieces:
    shared: KeyValues | None
    kept: KeyValues | None
    rows: Sequences | Trees | None
    bias_VHTT: Tensor | None
    windows: set[int] = field(default_factory=set)


_pieces: ContextVar[_Pieces] = ContextVar("pieces")


@contextmanager
def cascading(
    model: PreTrainedModel,
    *,
    shared: KeyValues | None = None,
    kept: KeyValues | None = None,
    among: Sequences | Trees | Tensor | None = None,
) -> Iterator[set[int]]:
    """Within it the model's attention sees `shared` before a view's own tokens, and fills `kept`.

    Among a view's own tokens it is causal, or looks where `among` [V, T, T] says. It knows no
    padding: views are padded on the right, where no token sees it. Or the views lie in one row as
    the sequences `among`, each looking as the model's own attention does, or as trees. Gives the
    windows that causal attention has asked for by then.
    """
    sees_VTT = among if isinstance(among, Tensor) else None
    bias_VHTT = None
    if sees_VTT is not None:
        blank = torch.zeros(sees_VTT.shape, dtype=model.dtype)
        bias_VHTT = to_device(blank.masked_fill(~sees_VTT, -torch.inf)[:, None], model.device)
    configs = configs_of(model)
    before = [config._attn_implementation for config in configs]
    pieces = _Pieces(shared, kept, None if isinstance(among, Tensor) else among, bias_VHTT)
    token = _pieces.set(pieces)
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield pieces.windows
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        _pieces.reset(token)


def _attention(
    module: nn.Module,
    query_VHTE: Tensor,
    key_VKTE: Tensor,
    value_VKTE: Tensor,
    attention_mask: Tensor | None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: the attention's output [V, T, H, E]."""
    pieces = _pieces.get()
    _check_supported(asked, pieces, tokens=query_VHTE.shape[2], mask=attention_mask)
    layer = int(module.layer_idx) if pieces.shared or pieces.kept else 0  # type: ignore[arg-type]
    if pieces.kept is not None:
        pieces.kept.layers[layer] = (key_VKTE.clone(), value_VKTE.clone())
    scores = Scores(asked.get("scaling") or query_VHTE.shape[-1] ** -0.5, asked.get("softcap"))
    if pieces.rows is not None:
        look = Look(scores, _is_causal(module, asked), asked.get("sliding_window"))
        out, weight = _in_one_row((query_VHTE, key_VKTE, value_VKTE), pieces.rows, look)
        pieces.windows.update((look.window,) if look.window and look.causal else ())
    else:
        groups = query_VHTE.shape[1] // key_VKTE.shape[1]
        keys, values = (one.repeat_interleave(groups, dim=1) for one in (key_VKTE, value_VKTE))
        # A model may be spread: what came with the input is where its first block is.
        bias = None if pieces.bias_VHTT is None else pieces.bias_VHTT.to(query_VHTE.device)
        out, weight = attend(query_VHTE, keys, values, scores, causal=bias is None, bias=bias)
    if pieces.shared is not None:
        keys, values = pieces.shared.layers[layer]
        folded = _fold(query_VHTE, keys.shape[1])
        other = attend(folded, keys, values, scores, causal=False, bias=None)
        there, its_weight = (_unfold(part, like=query_VHTE) for part in other)
        out, _ = joined((out, weight), (there, its_weight))
    return out.transpose(1, 2).contiguous(), None


def _is_causal(module: nn.Module, asked: Mapping[str, Any]) -> bool:
    """Whether this attention looks back only, as transformers' own kernels ask it."""
    told = asked.get("is_causal")
    return bool(getattr(module, "is_causal", True) if told is None else told)


def _in_one_row(
    states: tuple[Tensor, Tensor, Tensor], rows: Sequences | Trees, look: Look
) -> tuple[Tensor, Tensor]:
    """The output [1, H, T, E] and log-sum-exps [1, H, T] of sequences that lie end to end in T."""
    flat = States(*(one[0].transpose(0, 1) for one in states))
    if isinstance(rows, Trees):
        out_THE, weight_TH = attend_trees(flat, rows, look)
    else:
        out_THE, weight_TH = attend_each(flat, rows, look)
    return out_THE.transpose(0, 1)[None], weight_TH.T[None]


AttentionInterface.register(NAME, _attention)


def _fold(query_VHTE: Tensor, key_heads: int) -> Tensor:
    """The queries of all views, and of the heads that share a key head, as one [1, K, VGT, E]."""
    views, heads, tokens, width = query_VHTE.shape
    split = query_VHTE.reshape(views, key_heads, heads // key_heads, tokens, width)
    return split.transpose(0, 1).reshape(1, key_heads, -1, width)


def _unfold(folded: Tensor, *, like: Tensor) -> Tensor:
    """What `_fold` made one view, per view and head again: [V, H, T] and whatever comes after."""
    views, heads, tokens = like.shape[:3]
    key_heads, rest = folded.shape[1], folded.shape[3:]
    split = folded.reshape(key_heads, views, heads // key_heads, tokens, *rest)
    return split.transpose(0, 1).reshape(views, heads, tokens, *rest)


def _check_supported(
    asked: Mapping[str, Any], pieces: _Pieces, *, tokens: int, mask: Tensor | None
) -> None:
    """NotImplementedError if a model's attention asks for more than is heeded here."""
    unknown = sorted(name for name, one in asked.items() if one is not None and name not in _KNOWN)
    rows = pieces.rows
    own = rows.longest if isinstance(rows, Sequences) else tokens
    length = own + (pieces.shared.length if pieces.shared else 0)
    # Tails that stand side by side are more tokens than any of them looks back on, and sequences
    # keep to windows among themselves.
    trees = pieces.bias_VHTT is not None or isinstance(rows, Trees)
    apart = trees or (rows is not None and pieces.shared is None)
    narrow = not apart and (asked.get("sliding_window") or length) < length
    if unknown or mask is not None or narrow:
        raise NotImplementedError(f"attention with {unknown or 'a mask or a sliding window'}")


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

    def tree_states(
        self, prefix: Ids | None, tree_batch: PrefixTreeBatch, *, layer: Layer
    ) -> Tensor:
        """The hidden states [R, T, D] of trees, after their prefix if it is not in them."""
        shared = None if prefix is None else self.key_values(prefix)
        self.backbone.prepare(layer)
        with cascading(self.backbone.model, shared=shared, among=tree_batch.sees_RTT):
            return self.backbone.states(
                tree_batch.ids_RT, tree_batch.mask_RT, layer=layer, position=tree_batch.position_RT
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
