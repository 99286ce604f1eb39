"""Prefix sharing by cascade attention: what all views of a template begin with is run once.

A view's own tokens attend to the keys and values of the prefix and to each other; the two results
are merged by their log-sum-exps.

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
from embedjob.encoder.attention.kernels import Scores, attend, merge_attention
from embedjob.encoder.attention.tree import PrefixTreeBatch
from embedjob.encoder.attention.varlen import (
    AttentionInputs,
    AttentionOptions,
    PackedTrees,
    Sequences,
    attend_sequences,
    attend_trees,
)
from embedjob.encoder.backbone import Backbone, ReadLayer
from embedjob.encoder.batching.transfers import to_device
from embedjob.errors import in_one_line
from embedjob.models.architecture import length_bound_ropes
from embedjob.text.arrays import Ids

_LOG = logging.getLogger(__name__)
NAME = "embedjob_cascade"
# Arguments of a model's attention that do not change it, or that are obeyed below. With any other
# argument (sinks, position biases, ...) this function cannot take the place of the model's own.
_KNOWN = frozenset(
    {
        "cache_position",
        "deterministic",
        "dropout",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "position_ids",
        "return_dict",
        "scaling",
        "sliding_window",
        "softcap",
        "use_cache",
    }
)
# Four shared tokens before 18 own tokens bring 1.17x, before 270 own tokens neither gain nor loss
# (SmolLM2-135M, one thread). With fewer, attending twice in every layer costs what it saves.
FEWEST_TOKENS = 4
# The keys of many few-shot prompts may outgrow the weights: the oldest are dropped and run again.
_KEPT_BYTES = 4 << 30
_EXAMPLE = tuple(range(1, 10))
_SHARED = 4


@dataclass(frozen=True)
class KeyValues:
    """The keys and values [1, K, S, E] of tokens that views share, by layer."""

    length: int
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Return the memory that they take."""
        return sum(tensor.nbytes for pair in self.layers.values() for tensor in pair)


class Prefixes:
    """The keys and values of the prefixes that one loaded model has run."""

    def __init__(self, backbone: Backbone) -> None:
        """Start without prefixes; `tokens_run` counts the tokens of the prefixes that were run."""
        self.backbone = backbone
        self._kept: dict[bytes, KeyValues] = {}
        self.tokens_run = 0

    def serves(self, prefix: int, length: int) -> bool:
        """Tell whether views of `length` tokens can share a prefix of `prefix` tokens."""
        return prefix >= FEWEST_TOKENS and length <= self._longest

    def states(self, prefix: Ids, ids_VT: Tensor, mask_VT: Tensor, *, layer: ReadLayer) -> Tensor:
        """Return the hidden states [V, T, D] of what follows the prefix, padded on the right."""
        shared = self.key_values(prefix)
        self.backbone.prepare(layer)
        with cascade_attention(self.backbone.model, shared=shared):
            return self.backbone.states(ids_VT, mask_VT, layer=layer, position=shared.length)

    def tree_states(
        self, prefix: Ids | None, tree_batch: PrefixTreeBatch, *, layer: ReadLayer
    ) -> Tensor:
        """Return the hidden states [R, T, D] of trees; `prefix` is None if the trees include it."""
        shared = None if prefix is None else self.key_values(prefix)
        self.backbone.prepare(layer)
        with cascade_attention(self.backbone.model, shared=shared, layout=tree_batch.sees_RTT):
            return self.backbone.states(
                tree_batch.ids_RT, tree_batch.mask_RT, layer=layer, position=tree_batch.position_RT
            )

    def key_values(self, prefix: Ids) -> KeyValues:
        """Return the keys and values of a prefix, which is run at its first use."""
        key = prefix.tobytes()
        if key not in self._kept:
            self._kept[key] = self.run(torch.from_numpy(prefix.astype(np.int64)))
            self.tokens_run += len(prefix)
            while len(self._kept) > 1 and sum(kv.bytes for kv in self._kept.values()) > _KEPT_BYTES:
                del self._kept[next(iter(self._kept))]
        return self._kept[key]

    def run(self, ids_T: Tensor) -> KeyValues:
        """Run these ids and return their keys and values, without keeping them."""
        made = KeyValues(len(ids_T))
        with cascade_attention(self.backbone.model, kept=made):
            self.backbone.states(ids_T[None], torch.ones_like(ids_T)[None].bool(), layer=-1)
        return made

    @cached_property
    def _longest(self) -> float:
        """Return the longest view that may share a prefix: 0 for none, infinite without windows."""
        longest = min(self.backbone.windows, default=np.inf)
        ropes = length_bound_ropes(self.backbone.model.config.to_dict())
        reason = (
            f"its positions are of the kind {', '.join(ropes)}"
            if ropes
            else f"its attention reaches back {longest:.0f} tokens only"
            if longest < len(_EXAMPLE)
            else self._difference()
        )
        if reason:
            _LOG.warning("Prefixes that views share are run for every view: %s", reason)
            return 0
        return longest

    def _difference(self) -> str:
        """Compare states with and without sharing on a small example; return why sharing fails."""
        if not self.backbone.takes_positions:
            return "the model takes no positions"
        ids_T = torch.tensor(_EXAMPLE).remainder(self.backbone.vocabulary)
        own = ids_T[_SHARED:]
        # One view is padded, the other is not.
        ids_VT = torch.stack([own, own.flip(0)])
        mask_VT = torch.arange(len(own)) < torch.tensor([[len(own)], [len(own) - 2]])
        plain_VT = torch.cat([ids_T[:_SHARED].expand(2, -1), ids_VT], dim=1)
        whole_VT = torch.cat([torch.ones(2, _SHARED, dtype=torch.bool), mask_VT], dim=1)
        expected = self.backbone.states(plain_VT, whole_VT, layer=-1)[:, _SHARED:]
        try:
            shared = self.run(ids_T[:_SHARED])
            with cascade_attention(self.backbone.model, shared=shared):
                states = self.backbone.states(ids_VT, mask_VT, layer=-1, position=_SHARED)
        except Exception as error:
            # If a model fails with its attention replaced, it keeps its own attention.
            return in_one_line(error)
        real = mask_VT.to(states.device)
        norm = float((states - expected)[real].float().norm() / expected[real].float().norm())
        alike = norm <= self.backbone.tolerance
        return "" if alike else f"its states would differ by {norm:.1e}"


@dataclass(frozen=True)
class _AttentionContext:
    """What `_attention` needs beside a model's arguments, which it gets through a ContextVar."""

    shared: KeyValues | None
    kept: KeyValues | None
    rows: Sequences | PackedTrees | None
    bias_VHTT: Tensor | None
    windows: set[int] = field(default_factory=set)


_context: ContextVar[_AttentionContext] = ContextVar("attention_context")


@contextmanager
def cascade_attention(
    model: PreTrainedModel,
    *,
    shared: KeyValues | None = None,
    kept: KeyValues | None = None,
    layout: Sequences | PackedTrees | Tensor | None = None,
) -> Iterator[set[int]]:
    """Replace the model's attention: it sees `shared` before own tokens and stores into `kept`.

    `layout` says which own tokens see each other. None: attention is causal, and views must be
    padded on the right. A mask [V, T, T]: tokens see what it marks. Sequences or trees: the views
    lie in one row, and attention is as causal as the model's own. Yields the set of windows, to
    which causal attention adds every window that the model asks for.
    """
    sees_VTT = layout if isinstance(layout, Tensor) else None
    bias_VHTT = None
    if sees_VTT is not None:
        blank = torch.zeros(sees_VTT.shape, dtype=model.dtype)
        bias_VHTT = to_device(blank.masked_fill(~sees_VTT, -torch.inf)[:, None], model.device)
    configs = configs_of(model)
    before = [config._attn_implementation for config in configs]
    rows = None if isinstance(layout, Tensor) else layout
    context = _AttentionContext(shared, kept, rows, bias_VHTT)
    token = _context.set(context)
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield context.windows
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        _context.reset(token)


def _attention(
    module: nn.Module,
    query_VHTE: Tensor,
    key_VKTE: Tensor,
    value_VKTE: Tensor,
    attention_mask: Tensor | None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Return the attention's output [V, T, H, E]; transformers calls this in every layer."""
    context = _context.get()
    _check_supported(arguments, context, tokens=query_VHTE.shape[2], mask=attention_mask)
    layer = int(module.layer_idx) if context.shared or context.kept else 0  # type: ignore[arg-type]
    if context.kept is not None:
        context.kept.layers[layer] = (key_VKTE.clone(), value_VKTE.clone())
    scale = arguments.get("scaling") or query_VHTE.shape[-1] ** -0.5
    scores = Scores(scale, arguments.get("softcap"))
    if context.rows is not None:
        causal = _is_causal(module, arguments)
        options = AttentionOptions(scores, causal, arguments.get("sliding_window"))
        out, weight = _in_one_row((query_VHTE, key_VKTE, value_VKTE), context.rows, options)
        context.windows.update((options.window,) if options.window and options.causal else ())
    else:
        groups = query_VHTE.shape[1] // key_VKTE.shape[1]
        keys = key_VKTE.repeat_interleave(groups, dim=1)
        values = value_VKTE.repeat_interleave(groups, dim=1)
        # With a model spread over GPUs, the bias is on the GPU of its first block.
        bias = None if context.bias_VHTT is None else context.bias_VHTT.to(query_VHTE.device)
        out, weight = attend(query_VHTE, keys, values, scores, causal=bias is None, bias=bias)
    if context.shared is not None:
        keys, values = context.shared.layers[layer]
        folded = _fold(query_VHTE, keys.shape[1])
        over_prefix = attend(folded, keys, values, scores, causal=False, bias=None)
        prefix_out, prefix_weight = (_unfold(part, like=query_VHTE) for part in over_prefix)
        out, _ = merge_attention((out, weight), (prefix_out, prefix_weight))
    return out.transpose(1, 2).contiguous(), None


def _is_causal(module: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Tell whether this attention is causal, by the rule of transformers' own kernels."""
    given = arguments.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _in_one_row(
    states: tuple[Tensor, Tensor, Tensor], rows: Sequences | PackedTrees, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Return output [1, H, T, E] and log-sum-exps [1, H, T] of sequences end to end in T."""
    flat = AttentionInputs(*(state[0].transpose(0, 1) for state in states))
    if isinstance(rows, PackedTrees):
        out_THE, weight_TH = attend_trees(flat, rows, options)
    else:
        out_THE, weight_TH = attend_sequences(flat, rows, options)
    return out_THE.transpose(0, 1)[None], weight_TH.T[None]


def _fold(query_VHTE: Tensor, key_heads: int) -> Tensor:
    """Fold the queries of all views, and of heads with one key head, into one [1, K, VGT, E]."""
    views, heads, tokens, width = query_VHTE.shape
    split = query_VHTE.reshape(views, key_heads, heads // key_heads, tokens, width)
    return split.transpose(0, 1).reshape(1, key_heads, -1, width)


def _unfold(folded: Tensor, *, like: Tensor) -> Tensor:
    """Undo `_fold`: return [V, H, T] and the dimensions after it."""
    views, heads, tokens = like.shape[:3]
    key_heads, rest = folded.shape[1], folded.shape[3:]
    split = folded.reshape(key_heads, views, heads // key_heads, tokens, *rest)
    return split.transpose(0, 1).reshape(views, heads, tokens, *rest)


def _check_supported(
    arguments: Mapping[str, Any], context: _AttentionContext, *, tokens: int, mask: Tensor | None
) -> None:
    """Raise NotImplementedError for an attention that `_attention` cannot stand in for."""
    unknown = sorted(
        name for name, value in arguments.items() if value is not None and name not in _KNOWN
    )
    rows = context.rows
    own = rows.longest if isinstance(rows, Sequences) else tokens
    length = own + (context.shared.length if context.shared else 0)
    # The suffixes of a tree together are more tokens than any token of them sees, and sequences
    # obey windows by themselves.
    trees = context.bias_VHTT is not None or isinstance(rows, PackedTrees)
    apart = trees or (rows is not None and context.shared is None)
    narrow = not apart and (arguments.get("sliding_window") or length) < length
    if unknown or mask is not None or narrow:
        raise NotImplementedError(f"attention with {unknown or 'a mask or a sliding window'}")


AttentionInterface.register(NAME, _attention)
