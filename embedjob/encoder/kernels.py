"""Attention over one block of queries and keys, with the log-sum-exps by which blocks are joined.

Legend: V views, H heads, Q queries, T keys, E head width.
"""

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

FLASH_TYPES = (torch.float16, torch.bfloat16)
# The floats of an AVX-512 vector. With so many keys, the rest of them masked, a CPU needs down to a
# third of the time that it takes for the keys as they are: products of a few rows take a slower way
# where a vector is not full. With AVX2 nothing is gained.
_LANES = 16
# The kernel takes as many keys at once: of more, only the last ones would be quicker.
_MOST_KEYS = 512
# As many may be missing where the memory after the keys serves, and where they have to be copied.
ROOM, _MOST_COPIED = 12, 6


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
        keys, values = in_lanes(key, value)
        if keys is not key:
            if bias is None:
                bias = unmasked(query.shape[-2], key.shape[-2], causal=causal)
            bias, causal = masked_up_to(keys.shape[-2], bias), False
        out, weight = flash(query, keys, values, 0.0, causal, attn_mask=bias, scale=scale)
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


def in_lanes(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The same, or with more that are to be masked, where this CPU is quicker so."""
    missing = lanes_missing(key.shape[-2])
    if key.dtype != torch.float32 or key.device.type != "cpu" or not missing:
        return key, value
    further = _further(key, missing), _further(value, missing)
    if missing > _MOST_COPIED and (further[0] is None or further[1] is None):
        return key, value
    keys, values = (
        _copied(states, missing) if more is None else more
        for states, more in zip((key, value), further, strict=True)
    )
    return keys, values


def lanes_missing(keys: int) -> int:
    """How many keys may be added on this CPU; 0 where nothing is gained."""
    missing = -keys % _LANES
    return missing if missing <= ROOM and keys <= _MOST_KEYS and has_avx512() else 0


# Every layer of a forward asks for the same one.
@lru_cache(maxsize=1)
def unmasked(queries: int, keys: int, *, causal: bool) -> Tensor:
    """What is added to the scores [Q, T] where no mask says it: nothing, or causality."""
    seen = torch.zeros(queries, keys)
    return seen.masked_fill_(torch.ones_like(seen).triu(1) > 0, -torch.inf) if causal else seen


def masked_up_to(keys: int, mask: Tensor) -> Tensor:
    """The mask for so many keys; those beyond its own are not looked at.

    It is true where a key is seen, or is added to the scores.
    """
    beyond = keys - mask.shape[-1]
    if beyond <= 0:
        return mask[..., :keys]
    unseen = False if mask.dtype == torch.bool else -torch.inf
    return nn.functional.pad(mask, (0, beyond), value=unseen)


def _copied(states: Tensor, missing: int) -> Tensor:
    """The same states [V, H, T, E] with zeros after them: what is masked has to be a number."""
    views, heads, tokens, width = states.shape
    # As a linear layer gives them: each view is copied in one piece. Padding by torch would first
    # fill everything.
    room = states.new_empty(views, tokens + missing, heads, width)
    room[:, :tokens] = states.transpose(1, 2)
    room[:, tokens:] = 0
    return room.transpose(1, 2)


def _further(states: Tensor, missing: int) -> Tensor | None:
    """The same memory read further than a view's states: the next view's, after the last zeros.

    None where views do not follow each other, or the last is not followed by so many zeros.
    """
    views, heads, tokens, width = states.shape
    view, head, token, one = states.stride()
    after = states.storage_offset() + views * tokens * token
    last = after + (missing - 1) * token + (heads - 1) * head + (width - 1) * one
    if view != tokens * token or last * states.itemsize >= states.untyped_storage().nbytes():
        return None
    if states.as_strided((missing, heads, width), (token, head, one), after).any():
        return None
    return states.as_strided((views, heads, tokens + missing, width), states.stride())


@cache
def has_avx512() -> bool:
    """Whether torch computes with vectors of sixteen floats."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"
