"""Attention kernels that also give log-sum-exps, by which blocks of keys are merged exactly.

Legend: V views, H heads, Q queries, T keys, E head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

FLASH_TYPES = (torch.float16, torch.bfloat16)


class Scores(NamedTuple):
    """How attention scores are made of queries and keys."""

    scale: float
    softcap: float | None


def attend(
    query: Tensor, key: Tensor, value: Tensor, scores: Scores, *, causal: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the attention's output [V, H, Q, E] and the log-sum-exp of its scores [V, H, Q]."""
    scale, softcap = scores
    plain = softcap is None and key.shape[-1] == value.shape[-1]
    if plain and query.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        bias = None if bias is None else bias.to(query.dtype)
        out, weight = flash(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)
        return out, weight
    fits = bias is None and query.shape[-1] % 8 == 0 and query.dtype in FLASH_TYPES
    if plain and fits and query.device.type == "cuda":
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out, weight = flash(query, key, value, 0.0, causal, False, scale=scale)[:2]
        return out, weight
    scored = (query @ key.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scored = torch.tanh(scored / softcap) * softcap
    if bias is not None:
        scored = scored + bias
    if causal:
        ahead = torch.ones(scored.shape[-2:], dtype=torch.bool, device=scored.device).triu(1)
        scored = scored.masked_fill(ahead, -torch.inf)
    out = torch.softmax(scored, dim=-1).to(value.dtype) @ value
    return out, torch.logsumexp(scored, dim=-1)


def merge_attention(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Merge attention over two blocks of keys into attention over both; the result is exact.

    Each argument is an output [..., E] with the log-sum-exps of its scores [...], and so is the
    result (the merge step of FlashAttention and of cascade attention).
    """
    (first_out, first_weight), (second_out, second_weight) = first, second
    first_weight, second_weight = first_weight.float(), second_weight.float()
    share = torch.sigmoid(second_weight - first_weight).unsqueeze(-1)
    out = torch.lerp(first_out.float(), second_out.float(), share).to(first_out.dtype)
    return out, torch.logaddexp(first_weight, second_weight)
