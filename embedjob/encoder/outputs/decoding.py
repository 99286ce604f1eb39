"""Decoding after each prompt, greedy or by seeded draws, and the states that predicted tokens.

Legend: V views, T tokens of the prompts, S steps, D width, W vocabulary.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from embedjob.config.heads import Decode
from embedjob.encoder.backbone import Backbone
from embedjob.encoder.outputs.language_model import LanguageHead
from embedjob.encoder.sampling import drawn_tokens
from embedjob.text.arrays import Ids
from embedjob.text.conversations import draw_key, uniforms


class DecodedStates(NamedTuple):
    """The states [V, S, D] of the steps, and which of them count [V, S]."""

    states_VSD: Tensor
    counts_VS: Tensor


class Draws(NamedTuple):
    """How tokens are drawn: the number in [0, 1) of each view and step [V, S], and how freely."""

    numbers_VS: Tensor
    temperature: float

    def tokens(self, head: LanguageHead, state_VD: Tensor, step: int) -> Tensor:
        """Return the token that each view draws at a step [V], some views at a time."""
        most = head.most_states(state_VD.device)
        number_V1 = self.numbers_VS[:, step : step + 1]
        parts = zip(state_VD.split(most), number_V1.split(most), strict=True)
        return torch.cat(
            [drawn_tokens(self._warm(head.logits(one)), number) for one, number in parts]
        )[:, 0]

    def _warm(self, logits_VW: Tensor) -> Tensor:
        """Return scores in float64, the largest 0: no temperature makes it infinite, or nothing."""
        wide_VW = logits_VW.double()
        return (wide_VW - wide_VW.amax(dim=-1, keepdim=True)) / self.temperature


def draws_of(views: Sequence[Ids], options: Decode) -> Draws | None:
    """Return the draws of views, given by all their ids; None where the likeliest token is taken.

    They depend on the ids, the seed and the step alone, as equal views go through the model once:
    a retry, an order and a batch draw the same, up to rounding.
    """
    if not options.temperature:
        return None
    hashes = (hashlib.blake2b(ids.astype("<u4").tobytes(), digest_size=16) for ids in views)
    keys = (draw_key(one.digest(), seed=options.seed, kind="decode", number=0) for one in hashes)
    numbers_VS = np.stack([uniforms(key, options.max_tokens) for key in keys])
    return Draws(torch.from_numpy(numbers_VS), options.temperature)


def decode(
    backbone: Backbone,
    head: LanguageHead,
    prompts: tuple[Tensor, Tensor],
    *,
    steps: int,
    stops: Tensor,
    draws: Draws | None = None,
) -> DecodedStates:
    """Decode after the prompts (ids and mask [V, T], padded on either side).

    Without `draws`, the likeliest token is taken. A state counts if its predicted token is not in
    `stops`, up to the first such token. The state of the first step always counts.
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
        if draws is None:
            token_V = head.logits(state_VD).argmax(dim=-1)
        else:
            token_V = draws.tokens(head, state_VD, step)
        going_V = going_V & ~ends[token_V]
        states.append(state_VD)
        counts.append(going_V | (step == 0))
        if step + 1 == steps or not going_V.any():
            break
        mask_VT = torch.cat([mask_VT, torch.ones_like(position_V1)], dim=1)
        state_VD = backbone.continued(
            token_V[:, None], mask_VT, cache, position_VT=position_V1 + step
        )[:, -1]
    return DecodedStates(torch.stack(states, dim=1), torch.stack(counts, dim=1))
