"""Attention over sequences that lie end to end in one row, none of which sees another.

Or over trees, whose tails see the trunk that they stand on.

Legend: N tokens of all sequences, M of those that are looked at, S sequences, H heads, K key heads,
E head width.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import varlen

from embedjob.encoder.attention.kernels import Scores, attend, joined
from embedjob.encoder.batching.transfers import to_device


@dataclass(frozen=True)
class Sequences:
    """Where each sequence begins and the last ends [S + 1], here and on the device."""

    bounds: tuple[int, ...]
    bounds_S: Tensor
    longest: int


@dataclass(frozen=True)
class Trees:
    """Trees in one row, all trunks first and then all tails, those of one tree side by side.

    `each` are trunks and tails as sequences of their own; in `tails` those of a tree are one.
    """

    each: Sequences
    trunks: Sequences
    tails: Sequences


class Look(NamedTuple):
    """What a token sees: nothing ahead of it if causal, nothing `window` tokens away or further."""

    scores: Scores
    causal: bool
    window: int | None


def sequences(lengths: list[int], *, device: torch.device) -> Sequences:
    """Sequences of these lengths, end to end."""
    bounds_S = torch.tensor([0, *lengths]).cumsum(dim=0)
    placed_S = to_device(bounds_S.to(torch.int32), device)
    return Sequences(tuple(bounds_S.tolist()), placed_S, max(lengths))


class States(NamedTuple):
    """Queries [N, H, E], and the keys and values [M, K, E] that they look at."""

    query_NHE: Tensor
    key_MKE: Tensor
    value_MKE: Tensor


def attend_trees(states: States, trees: Trees, look: Look) -> tuple[Tensor, Tensor]:
    """The same as `attend_each` of trees: a tail sees its trunk before itself.

    No tail is so long that with its trunk it would be longer than a window.
    """
    out_NHE, weight_NH = attend_each(states, trees.each, look)
    trunks = trees.trunks.bounds[-1]
    back = States(states.query_NHE[trunks:], states.key_MKE[:trunks], states.value_MKE[:trunks])
    whole = look._replace(causal=False, window=None)
    there = attend_each(back, trees.tails, whole, keys=trees.trunks)
    tails = joined((out_NHE[trunks:], weight_NH[trunks:]), there)
    return (
        torch.cat([out_NHE[:trunks], tails[0]]),
        torch.cat([weight_NH[:trunks].float(), tails[1]]),
    )


def attend_each(
    states: States, rows: Sequences, look: Look, *, keys: Sequences | None = None
) -> tuple[Tensor, Tensor]:
    """The attention's output [N, H, E], and the log-sum-exp of its scores [N, H].

    Each sequence looks at itself, or else at that of `keys` of the same number, all of it.
    NotImplementedError where the device has no kernel for what is asked; ValueError where the
    sequences are not those of the row, since a kernel would read past its end.
    """
    seen = rows if keys is None else keys
    for row, of in ((rows, states.query_NHE), (seen, states.key_MKE)):
        if row.bounds[-1] != len(of):
            raise ValueError(f"sequences of {row.bounds[-1]} tokens in a row of {len(of)}")
    window = look.window if look.window and look.window < rows.longest else None
    narrow = look._replace(window=window)
    attend_all = _flash if states.query_NHE.device.type == "cuda" else _one_by_one
    return attend_all(states, (rows, seen), narrow)


def _flash(
    states: States, bounds: tuple[Sequences, Sequences], look: Look
) -> tuple[Tensor, Tensor]:
    if look.scores.softcap is not None:
        raise NotImplementedError("flash attention over sequences knows no softcap")
    query_NHE, key_MKE, value_MKE = states
    reach = -1 if look.window is None else look.window - 1
    # A model may be spread: the bounds are where its first block is.
    rows_S, seen_S = (one.bounds_S.to(query_NHE.device) for one in bounds)
    # Of sequences of one token each, the kernel would regroup the heads, and the log-sum-exps.
    longest, farthest = (max(2, one.longest) for one in bounds)
    out_NHE, weight = varlen.varlen_attn(
        query_NHE,
        key_MKE,
        value_MKE,
        rows_S,
        seen_S,
        longest,
        farthest,
        return_aux=varlen.AuxRequest(lse=True),
        scale=look.scores.scale,
        window_size=(reach, 0 if look.causal else reach),
        enable_gqa=query_NHE.shape[1] != key_MKE.shape[1],
    )
    tokens, heads = query_NHE.shape[:2]
    # The kernel gives [H, N], torch documents [N, H].
    if weight.shape == (heads, tokens):
        return out_NHE, weight.T
    if weight.shape == (tokens, heads):
        return out_NHE, weight
    raise NotImplementedError(f"flash attention with log-sum-exps of shape {tuple(weight.shape)}")


def _one_by_one(
    states: States, bounds: tuple[Sequences, Sequences], look: Look
) -> tuple[Tensor, Tensor]:
    query_NHE, *seen = states
    groups = query_NHE.shape[1] // states.key_MKE.shape[1]
    seen_MHE = [one.repeat_interleave(groups, dim=1) for one in seen]
    outs, weights = [], []
    for own, there in zip(*(pairwise(one.bounds) for one in bounds), strict=True):
        query = query_NHE[slice(*own)].transpose(0, 1)[None]
        key, value = (one[slice(*there)].transpose(0, 1)[None] for one in seen_MHE)
        bias = _window(own[1] - own[0], look, device=query_NHE.device)
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
