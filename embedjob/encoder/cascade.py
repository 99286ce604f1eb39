"""Attention whose keys and values come in two pieces: what all views share, and each view's own.

The pieces are attended to apart and joined by their log-sum-exps, which is exact. So what is shared
is neither computed nor copied per view.

Legend: V views, H heads, K key heads, G = H / K, T tokens, S shared tokens, E head width.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
    bias_VHTT: Tensor | None


class _Scores(NamedTuple):
    """How scores are made of queries and keys."""

    scale: float
    softcap: float | None


_pieces: ContextVar[_Pieces] = ContextVar("pieces")


@contextmanager
def cascading(
    model: PreTrainedModel,
    *,
    shared: KeyValues | None = None,
    kept: KeyValues | None = None,
    sees_VTT: Tensor | None = None,
) -> Iterator[None]:
    """Within it the model's attention sees `shared` before a view's own tokens, and fills `kept`.

    Among its own tokens it is causal, or looks where it is told to. It knows no padding: views are
    padded on the right, where no token sees it.
    """
    bias_VHTT = None
    if sees_VTT is not None:
        blank = torch.zeros(sees_VTT.shape, dtype=model.dtype)
        bias_VHTT = blank.masked_fill(~sees_VTT, -torch.inf)[:, None].to(model.device)
    configs = {id(c): c for c in (model.config, model.config.get_text_config())}.values()
    before = [config._attn_implementation for config in configs]
    token = _pieces.set(_Pieces(shared, kept, bias_VHTT))
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
    _require_known(asked, pieces, tokens=query_VHTE.shape[2], mask=attention_mask)
    if pieces.kept is not None:
        pieces.kept.layers[layer] = (key_VKTE.clone(), value_VKTE.clone())
    scores = _Scores(asked.get("scaling") or query_VHTE.shape[-1] ** -0.5, asked.get("softcap"))
    groups = query_VHTE.shape[1] // key_VKTE.shape[1]
    keys, values = (one.repeat_interleave(groups, dim=1) for one in (key_VKTE, value_VKTE))
    # A model may be spread: what came with the input is where its first block is.
    bias = None if pieces.bias_VHTT is None else pieces.bias_VHTT.to(query_VHTE.device)
    out, weight = _attend(query_VHTE, keys, values, scores, causal=bias is None, bias=bias)
    if pieces.shared is not None:
        keys, values = pieces.shared.layers[layer]
        folded = _fold(query_VHTE, keys.shape[1])
        other = _attend(folded, keys, values, scores, causal=False, bias=None)
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


def _require_known(
    asked: Mapping[str, Any], pieces: _Pieces, *, tokens: int, mask: Tensor | None
) -> None:
    """NotImplementedError if a model's attention asks for more than is heeded here."""
    unknown = sorted(name for name, one in asked.items() if one is not None and name not in _KNOWN)
    length = tokens + (pieces.shared.length if pieces.shared else 0)
    # Tails that stand side by side are more tokens than any of them looks back on.
    narrow = pieces.bias_VHTT is None and (asked.get("sliding_window") or length) < length
    if unknown or mask is not None or narrow:
        raise NotImplementedError(f"attention with {unknown or 'a mask or a sliding window'}")


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scores: _Scores, *, causal: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The attention's output, and the log-sum-exp of its scores per query."""
    scale, softcap = scores
    plain = softcap is None and key.shape[-1] == value.shape[-1]
    if plain and query.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        bias = None if bias is None else bias.to(query.dtype)
        out, weight = flash(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)
        return out, weight
    fits = bias is None and query.shape[-1] % 8 == 0 and query.dtype in _FLASH_TYPES
    if plain and fits and query.device.type == "cuda":
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out, weight = flash(query, key, value, 0.0, causal, False, scale=scale)[:2]
        return out, weight
    made = (query @ key.transpose(-1, -2)).float() * scale
    if softcap is not None:
        made = torch.tanh(made / softcap) * softcap
    if bias is not None:
        made = made + bias
    if causal:
        ahead = torch.ones(made.shape[-2:], dtype=torch.bool, device=made.device).triu(1)
        made = made.masked_fill(ahead, -torch.inf)
    return torch.softmax(made, dim=-1).to(value.dtype) @ value, torch.logsumexp(made, dim=-1)
