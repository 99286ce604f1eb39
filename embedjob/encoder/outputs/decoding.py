"""Greedy decoding after each prompt, and the states from which tokens were predicted.

Legend: V views, T tokens of the prompts, S steps, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from embedjob.encoder.backbone import Backbone
from embedjob.encoder.outputs.language_model import LanguageHead


class GreedyStates(NamedTuple):
    """The states [V, S, D] of the steps, and which of them count [V, S]."""

    states_VSD: Tensor
    counts_VS: Tensor


def decode(
    backbone: Backbone,
    head: LanguageHead,
    prompts: tuple[Tensor, Tensor],
    *,
    steps: int,
    stops: Tensor,
) -> GreedyStates:
    """Decode greedily after the prompts (ids and mask [V, T], padded on either side).

    A state counts if its predicted token is not in `stops`, up to the first such token. The state
    of the first step always counts.
    """
    ids_VT, mask_VT = (one.to(backbone.device) for one in prompts)
    mask_VT = mask_VT.long()
    position_V1 = mask_VT.sum(dim=1, keepdim=True)
    last_V = (mask_VT * torch.arange(mask_VT.shape[1], device=mask_VT.device)).argmax(dim=1)
    every = torch.arange(len(ids_VT), device=ids_VT.device)
    cache = DynamicCache(config=backbone.model.config)
    ends = torch.zeros(head.vocabulary, dtype=torch.bool, device=ids_VT.device)
    ends[stops.to(ends.device)] = True
    state_VD = backbone.continued(ids_VT, mask_VT, cache)[every, last_V]
    going_V = torch.ones(len(ids_VT), dtype=torch.bool, device=ids_VT.device)
    states, counts = [], []
    for step in range(steps):
        token_V = head.logits(state_VD).argmax(dim=-1)
        going_V = going_V & ~ends[token_V]
        states.append(state_VD)
        counts.append(going_V | (step == 0))
        if step + 1 == steps or not going_V.any():
            break
        mask_VT = torch.cat([mask_VT, torch.ones_like(position_V1)], dim=1)
        state_VD = backbone.continued(
            token_V[:, None], mask_VT, cache, position_VT=position_V1 + step
        )[:, -1]
    return GreedyStates(torch.stack(states, dim=1), torch.stack(counts, dim=1))
