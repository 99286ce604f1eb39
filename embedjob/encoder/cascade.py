"""Attention whose keys and values come in two pieces: what all views share, and each view's own.

The pieces are attended to apart and joined by their log-sum-exps, which is exact. So what is shared
is neither computed nor copied per view.

Legend: V views, H heads, K key heads, G = H / K, T tokens, S shared tokens, E head width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

NAME = "embedjob_cascade"
_FLASH_TYPES = (torch.float16, torch.bfloat16)
# What models hand to their attention and what does not change it, or is heeded below. With anything
# else (sinks, position biases, ...) the model is not one of those that this function can serve.
_KNOWN_WORDS = """
cache_position dropout is_causal output_attentions output_hidden_states position_ids return_dict
scaling sliding_window softcap use_cache
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


_pieces: ContextVar[_Pieces] = ContextVar("pieces")


@contextmanager
def cascading(
    model: PreTrainedModel, *, shared: KeyValues | None = None, kept: KeyValues | None = None
) -> Iterator[None]:
    """Within it the model's attention sees `shared` before a view's own tokens, and fills `kept`.

    It is causal, and knows no padding: views are padded on the right, where no token sees it.
    """
    configs = {id(c): c for c in (model.config, model.config.get_text_config())}.values()
    before = [config._attn_implementation for config in configs]
    token = _pieces.set(_Pieces(shared, kept))
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
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
    pieces, layer = _pieces.get(), int(module.layer_idx)  # type: ignore[arg-type]
    length = query_VHTE.shape[2] + (pieces.shared.length if pieces.shared else 0)
    unknown = sorted(
        name for name, value in asked.items() if value is not None and name not in _KNOWN
    )
    if unknown or attention_mask is not None or (asked.get("sliding_window") or length) < length:
        raise NotImplementedError(f"attention with {unknown or 'a mask or a sliding window'}")
    if pieces.kept is not None:
        pieces.kept.layers[layer] = (key_VKTE.clone(), value_VKTE.clone())
    scale = asked.get("scaling") or query_VHTE.shape[-1] ** -0.5
    softcap = asked.get("softcap")
    groups = query_VHTE.shape[1] // key_VKTE.shape[1]
    own = [piece.repeat_interleave(groups, dim=1) for piece in (key_VKTE, value_VKTE)]
    out, weight = _attend(query_VHTE, *own, causal=True, scale=scale, softcap=softcap)
    if pieces.shared is not None:
        keys, values = pieces.shared.layers[layer]
        folded = _fold(query_VHTE, keys.shape[1])
        other = _attend(folded, keys, values, causal=False, scale=scale, softcap=softcap)
        there, its_weight = (_unfold(part, like=query_VHTE) for part in other)
        share = torch.sigmoid(its_weight.float() - weight.float()).unsqueeze(-1)
        out = torch.lerp(out.float(), there.float(), share).to(query_VHTE.dtype)
    return out.transpose(1, 2).contiguous(), None


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


def _attend(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The attention's output, and the log-sum-exp of its scores per query."""
    aten = torch.ops.aten
    same_width = key.shape[-1] == value.shape[-1]
    if softcap is None and same_width and query.device.type == "cpu":
        flash = aten._scaled_dot_product_flash_attention_for_cpu
        out, weight = flash(query, key, value, 0.0, causal, scale=scale)
        return out, weight
    fits = same_width and query.shape[-1] % 8 == 0 and query.dtype in _FLASH_TYPES
    if softcap is None and fits and query.device.type == "cuda":
        flash = aten._scaled_dot_product_flash_attention
        out, weight = flash(query, key, value, 0.0, causal, False, scale=scale)[:2]
        return out, weight
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(ahead, -torch.inf)
    return torch.softmax(scores, dim=-1).to(value.dtype) @ value, torch.logsumexp(scores, dim=-1)
