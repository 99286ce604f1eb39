"""Attention over one block of queries and keys, with the log-sum-exps by which blocks are joined.

Legend: V views, H heads, Q queries, T keys, E head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

FLASH_TYPES = (torch.float16, torch.bfloat16)


class Scores(NamedTuple):
    """How scores are made of queries and keys."""

    scale: float
    softcap: float | None


def joined(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What attention over two blocks of keys gives, from what it gives over each: exactly that.

    Of both the outputs [..., E] and the log-sum-exps of their scores [...].
    """
    (out, weight), (there, its_weight) = one, other
    weight, its_weight = weight.float(), its_weight.float()
    share = torch.sigmoid(its_weight - weight).unsqueeze(-1)
    both = torch.lerp(out.float(), there.float(), share).to(out.dtype)
    return both, torch.logaddexp(weight, its_weight)


def attend(
    query: Tensor, key: Tensor, value: Tensor, scores: Scores, *, causal: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The attention's output [V, H, Q, E], and the log-sum-exp of its scores [V, H, Q]."""
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
    made = (query @ key.transpose(-1, -2)).float() * scale
    if softcap is not None:
        made = torch.tanh(made / softcap) * softcap
    if bias is not None:
        made = made + bias
    if causal:
        ahead = torch.ones(made.shape[-2:], dtype=torch.bool, device=made.device).triu(1)
        made = made.masked_fill(ahead, -torch.inf)
    return torch.softmax(made, dim=-1).to(value.dtype) @ value, torch.logsumexp(made, dim=-1)
