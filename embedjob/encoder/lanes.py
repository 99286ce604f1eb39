"""A model's own attention on a CPU, with keys that fill whole vectors where that is quicker.

Legend: V views, H heads, K key heads, T tokens, E head width.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
    PreTrainedModel,
)

from embedjob.encoder.attention import States, configs_of
from embedjob.encoder.kernels import in_lanes, lanes_missing, masked_up_to, unmasked

NAME = "embedjob_lanes"
_PLAIN = "sdpa"
_PROBE = tuple(range(1, 15))
# Words with which attention is more than what its mask says: it goes as it is.
_MORE = ("position_bias", "cache")


def use_lanes(model: PreTrainedModel, *, states: States, vocabulary: int, tolerance: float) -> bool:
    """Whether a model's attention is done so from now on: where it can be, and gives the same."""
    configs = configs_of(model)
    if any(config._attn_implementation != _PLAIN for config in configs):
        return False
    ids_VT = torch.tensor([_PROBE, _PROBE[::-1]]).remainder(vocabulary)
    mask_VT = torch.arange(len(_PROBE)) < torch.tensor([[len(_PROBE)], [len(_PROBE) - 2]])
    expected = states(ids_VT, mask_VT)[mask_VT]
    _call(configs, NAME)
    try:
        difference = (states(ids_VT, mask_VT)[mask_VT] - expected).norm()
        alike = bool(difference <= tolerance * expected.norm())
    except Exception:
        # Whatever a model raises when its attention goes by another name, it runs as it is.
        alike = False
    if not alike:
        _call(configs, _PLAIN)
    return alike


def _call(configs: Iterable[PretrainedConfig], name: str) -> None:
    for config in configs:
        config._attn_implementation = name


def _mask(*asked: Any, **named: Any) -> Tensor | None:
    """What transformers calls once for all layers: their mask, as long as keys are to be."""
    seen: Tensor | None = AttentionMaskInterface()[_PLAIN](*asked, **named)
    if seen is None or seen.dtype != torch.bool or seen.device.type != "cpu":
        return seen
    keys = seen.shape[-1]
    added = torch.full((*seen.shape[:-1], keys + lanes_missing(keys)), -torch.inf)
    added[..., :keys].masked_fill_(seen, 0)
    return added


def _attention(
    module: nn.Module,
    query_VHTE: Tensor,
    key_VKTE: Tensor,
    value_VKTE: Tensor,
    attention_mask: Tensor | None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: the attention's output [V, T, H, E]."""
    queries, keys = query_VHTE.shape[2], key_VKTE.shape[2]
    more = any(asked.get(word) is not None for word in _MORE)
    # With fewer queries than keys and no mask, causality is counted from the end.
    if not more and (attention_mask is not None or queries == keys):
        key_VKTE, value_VKTE = in_lanes(key_VKTE, value_VKTE)
    filled = key_VKTE.shape[2]
    if attention_mask is None and filled > keys:
        told = asked.get("is_causal")
        causal = getattr(module, "is_causal", True) if told is None else told
        attention_mask = unmasked(queries, keys, causal=causal)[None, None]
    if attention_mask is not None:
        attention_mask = masked_up_to(filled, attention_mask)
    plain = AttentionInterface()[_PLAIN]
    found: tuple[Tensor, None] = plain(
        module, query_VHTE, key_VKTE, value_VKTE, attention_mask, **asked
    )
    return found


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
