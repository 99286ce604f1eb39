"""Attention over one block of queries and keys, with the log-sum-exps by which blocks are joined.

Legend: V views, H heads, Q queries, T keys, E head width.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

FLASH_TYPES = (torch.float16, torch.bfloat16)
# The floats of an AVX-512 vector. With so many keys, or up to six fewer and the rest masked, a CPU
# needs 0.5 to 0.95 of the time that it takes for the keys as they are: products of a few rows take
# a slower way where a vector is not full. With AVX2 nothing is gained.
_LANES, _MOST_MISSING = 16, 6


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
        if lacks_lanes(key):
            bias = unmasked(query, key, causal=causal) if bias is None else bias
            key, value, bias, causal = *in_lanes(key, value, bias), False
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


def lacks_lanes(key: Tensor) -> bool:
    """Whether attention on this CPU is quicker with a few more keys that are masked."""
    quick = key.dtype == torch.float32 and key.device.type == "cpu" and _has_lanes()
    return quick and 0 < -key.shape[-2] % _LANES <= _MOST_MISSING


def unmasked(query: Tensor, key: Tensor, *, causal: bool) -> Tensor:
    """What is added to the scores [Q, T] where no mask says it: nothing, or causality."""
    seen = key.new_zeros(query.shape[-2], key.shape[-2])
    return seen.masked_fill_(torch.ones_like(seen).triu(1) > 0, -torch.inf) if causal else seen


def in_lanes(key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same keys, values and mask with some more keys that are not looked at.

    A mask is true where a key is seen, or is added to the scores.
    """
    missing = -key.shape[-2] % _LANES
    unseen = False if mask.dtype == torch.bool else -torch.inf
    longer = nn.functional.pad(mask, (0, missing), value=unseen)
    return _longer(key, missing), _longer(value, missing), longer


def _longer(states: Tensor, missing: int) -> Tensor:
    """The same states [V, H, T, E] with zeros after them: what is masked has to be a number."""
    views, heads, tokens, width = states.shape
    # As a linear layer gives them: each view is copied in one piece. Padding by torch would first
    # fill everything.
    room = states.new_empty(views, tokens + missing, heads, width)
    room[:, :tokens] = states.transpose(1, 2)
    room[:, tokens:] = 0
    return room.transpose(1, 2)


@cache
def _has_lanes() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"
