"""Attention over sequences that lie end to end in one row, none of which sees another.

Legend: N tokens of all sequences, S sequences, H heads, K key heads, E head width.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import varlen

from embedjob.encoder.kernels import Scores, attend
from embedjob.encoder.transfers import onto


@dataclass(frozen=True)
class Sequences:
    """Where each sequence begins and the last ends [S + 1], here and on the device."""

    bounds: tuple[int, ...]
    bounds_S: Tensor
    longest: int


class Look(NamedTuple):
    """What a token sees: nothing ahead of it if causal, nothing `window` tokens away or further."""

    scores: Scores
    causal: bool
    window: int | None


def sequences(lengths: list[int], *, device: torch.device) -> Sequences:
    """Sequences of these lengths, end to end."""
    bounds_S = torch.tensor([0, *lengths]).cumsum(dim=0)
    placed_S = onto(bounds_S.to(torch.int32), device)
    return Sequences(tuple(bounds_S.tolist()), placed_S, max(lengths))


def attend_each(
    query_NHE: Tensor, key_NKE: Tensor, value_NKE: Tensor, rows: Sequences, look: Look
) -> tuple[Tensor, Tensor]:
    """The attention's output [N, H, E], and the log-sum-exp of its scores [N, H].

    NotImplementedError where the device has no kernel for what is asked; ValueError where the
    sequences are not those of the row, since a kernel would read past its end.
    """
    if rows.bounds[-1] != len(query_NHE):
        raise ValueError(f"sequences of {rows.bounds[-1]} tokens in a row of {len(query_NHE)}")
    window = look.window if look.window and look.window < rows.longest else None
    narrow = look._replace(window=window)
    if query_NHE.device.type == "cuda":
        return _flash(query_NHE, key_NKE, value_NKE, rows, narrow)
    return _one_by_one(query_NHE, key_NKE, value_NKE, rows, narrow)


def _flash(
    query_NHE: Tensor, key_NKE: Tensor, value_NKE: Tensor, rows: Sequences, look: Look
) -> tuple[Tensor, Tensor]:
    if look.scores.softcap is not None:
        raise NotImplementedError("flash attention over sequences knows no softcap")
    reach = -1 if look.window is None else look.window - 1
    # Of sequences of one token each, the kernel would regroup the heads, and the log-sum-exps.
    longest = max(2, rows.longest)
    # A model may be spread: the bounds are where its first block is.
    bounds_S = rows.bounds_S.to(query_NHE.device)
    out_NHE, weight = varlen.varlen_attn(
        query_NHE,
        key_NKE,
        value_NKE,
        bounds_S,
        bounds_S,
        longest,
        longest,
        return_aux=varlen.AuxRequest(lse=True),
        scale=look.scores.scale,
        window_size=(reach, 0 if look.causal else reach),
        enable_gqa=query_NHE.shape[1] != key_NKE.shape[1],
    )
    tokens, heads = query_NHE.shape[:2]
    # The kernel gives [H, N], torch documents [N, H].
    if weight.shape == (heads, tokens):
        return out_NHE, weight.T
    if weight.shape == (tokens, heads):
        return out_NHE, weight
    raise NotImplementedError(f"flash attention with log-sum-exps of shape {tuple(weight.shape)}")


def _one_by_one(
    query_NHE: Tensor, key_NKE: Tensor, value_NKE: Tensor, rows: Sequences, look: Look
) -> tuple[Tensor, Tensor]:
    groups = query_NHE.shape[1] // key_NKE.shape[1]
    keys_NHE, values_NHE = (one.repeat_interleave(groups, dim=1) for one in (key_NKE, value_NKE))
    outs, weights = [], []
    for start, stop in pairwise(rows.bounds):
        query, key, value = (
            one[start:stop].transpose(0, 1)[None] for one in (query_NHE, keys_NHE, values_NHE)
        )
        bias = _window(stop - start, look, device=query_NHE.device)
        causal = look.causal and bias is None
        out, weight = attend(query, key, value, look.scores, causal=causal, bias=bias)
        outs.append(out[0].transpose(0, 1))
        weights.append(weight[0].T)
    return torch.cat(outs), torch.cat(weights)


def _window(length: int, look: Look, *, device: torch.device) -> Tensor | None:
    """What is added to the scores of one sequence, if a token of it does not see all of it."""
    if look.window is None or look.window >= length:
        return None
    place = torch.arange(length, device=device)
    ahead = place - place[:, None]
    unseen = ahead.abs() >= look.window
    if look.causal:
        unseen |= ahead > 0
    return torch.zeros(unseen.shape, device=device).masked_fill(unseen, -torch.inf)[None, None]
