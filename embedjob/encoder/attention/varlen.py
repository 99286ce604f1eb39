"""Variable-length attention: sequences end to end in one row, none of which sees another.

Also over trees, whose suffixes see the shared tokens of their tree.

Legend: N tokens of all queries' sequences, M tokens of the keys' sequences, S sequences, Q and T
tokens of one of them, H heads, K key heads, E head width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import varlen

from embedjob.encoder.attention.kernels import Scores, attend, merge_attention
from embedjob.encoder.batching.transfers import to_device
from embedjob.text.arrays import Ints


@dataclass(frozen=True)
class Sequences:
    """Where each sequence begins and the last ends [S + 1], on the host and on the device."""

    bounds: tuple[int, ...]
    bounds_S: Tensor
    longest: int


@dataclass(frozen=True)
class PackedTrees:
    """Trees in one row: the shared tokens of all trees, then all suffixes, tree by tree.

    In `parts` every suffix is a sequence; in `suffixes` all suffixes of one tree are one sequence.
    """

    parts: Sequences
    shared: Sequences
    suffixes: Sequences


class AttentionOptions(NamedTuple):
    """Which keys a query sees: none after it if causal, none `window` or more tokens away."""

    scores: Scores
    causal: bool
    window: int | None


def pack_sequences(lengths: list[int], *, device: torch.device) -> Sequences:
    """Return the bounds of sequences of these lengths, end to end."""
    bounds_S = torch.tensor([0, *lengths]).cumsum(dim=0)
    placed_S = to_device(bounds_S.to(torch.int32), device)
    return Sequences(tuple(bounds_S.tolist()), placed_S, max(lengths))


class AttentionInputs(NamedTuple):
    """Queries [N, H, E] with the keys and values [M, K, E] that they attend to."""

    query_NHE: Tensor
    key_MKE: Tensor
    value_MKE: Tensor


def attend_trees(
    inputs: AttentionInputs, trees: PackedTrees, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Attend as `attend_sequences` does, where a suffix also sees its tree's shared tokens.

    A suffix and its shared tokens together must not be longer than the window.
    """
    out_NHE, weight_NH = attend_sequences(inputs, trees.parts, options)
    shared = trees.shared.bounds[-1]
    back = AttentionInputs(
        inputs.query_NHE[shared:], inputs.key_MKE[:shared], inputs.value_MKE[:shared]
    )
    whole = options._replace(causal=False, window=None)
    there = attend_sequences(back, trees.suffixes, whole, keys=trees.shared)
    suffixes = merge_attention((out_NHE[shared:], weight_NH[shared:]), there)
    return (
        torch.cat([out_NHE[:shared], suffixes[0]]),
        torch.cat([weight_NH[:shared].float(), suffixes[1]]),
    )


def attend_sequences(
    inputs: AttentionInputs,
    rows: Sequences,
    options: AttentionOptions,
    *,
    keys: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the attention's output [N, H, E] and the log-sum-exp of its scores [N, H].

    Each sequence attends to itself, or to the whole sequence of the same number in `keys`.

    Raises:
        NotImplementedError: the device has no kernel for these options.
        ValueError: the bounds do not end where the row ends; a kernel would read past its end.
    """
    seen = rows if keys is None else keys
    for bounds, row in ((rows, inputs.query_NHE), (seen, inputs.key_MKE)):
        if bounds.bounds[-1] != len(row):
            raise ValueError(f"sequences of {bounds.bounds[-1]} tokens in a row of {len(row)}")
    window = options.window if options.window and options.window < rows.longest else None
    narrow = options._replace(window=window)
    attend_all = _flash if inputs.query_NHE.device.type == "cuda" else _by_length
    return attend_all(inputs, (rows, seen), narrow)


def _flash(
    inputs: AttentionInputs, bounds: tuple[Sequences, Sequences], options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    if options.scores.softcap is not None:
        raise NotImplementedError("flash attention over sequences has no softcap")
    query_NHE, key_MKE, value_MKE = inputs
    reach = -1 if options.window is None else options.window - 1
    # With a model spread over GPUs, the bounds are on the GPU of its first block.
    rows_S, seen_S = (sequences.bounds_S.to(query_NHE.device) for sequences in bounds)
    # For sequences of one token each, the kernel would regroup the heads and the log-sum-exps.
    longest, farthest = (max(2, sequences.longest) for sequences in bounds)
    out_NHE, weight = varlen.varlen_attn(
        query_NHE,
        key_MKE,
        value_MKE,
        rows_S,
        seen_S,
        longest,
        farthest,
        return_aux=varlen.AuxRequest(lse=True),
        scale=options.scores.scale,
        window_size=(reach, 0 if options.causal else reach),
        enable_gqa=query_NHE.shape[1] != key_MKE.shape[1],
    )
    tokens, heads = query_NHE.shape[:2]
    # The kernel gives [H, N], torch documents [N, H].
    if weight.shape == (heads, tokens):
        return out_NHE, weight.T
    if weight.shape == (tokens, heads):
        return out_NHE, weight
    raise NotImplementedError(f"flash attention with log-sum-exps of shape {tuple(weight.shape)}")


def _by_length(
    inputs: AttentionInputs, bounds: tuple[Sequences, Sequences], options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Attend where no kernel takes bounds: sequences of the same length go together."""
    query_NHE, *seen = inputs
    groups = query_NHE.shape[1] // inputs.key_MKE.shape[1]
    seen_MHE = [states.repeat_interleave(groups, dim=1) for states in seen]
    tokens, heads = query_NHE.shape[:2]
    out_NHE = query_NHE.new_empty(tokens, heads, inputs.value_MKE.shape[-1])
    weight_NH = query_NHE.new_empty(tokens, heads, dtype=torch.float32)
    for own, there in _of_one_length(*bounds, device=query_NHE.device):
        query, key, value = (
            places.of(states_N).transpose(1, 2)
            for states_N, places in zip((query_NHE, *seen_MHE), (own, there, there), strict=True)
        )
        bias = _window(query.shape[2], options, device=query_NHE.device)
        causal = options.causal and bias is None
        out, weight = attend(query, key, value, options.scores, causal=causal, bias=bias)
        own.put(out.transpose(1, 2), into=out_NHE)
        own.put(weight.transpose(1, 2), into=weight_NH)
    return out_NHE, weight_NH


class _Places(NamedTuple):
    """Where equally long sequences [S, Q] lie in a row; `run` is the first place of a gapless run.

    A run is a view of the row. Copies of states cost a CPU nearly as much as attention.
    """

    place_SQ: Tensor
    run: int | None

    def of(self, states_N: Tensor) -> Tensor:
        """Return the states [S, Q, ...] at these places."""
        if self.run is None:
            return states_N[self.place_SQ]
        run_N = states_N[self.run : self.run + self.place_SQ.numel()]
        return run_N.view(*self.place_SQ.shape, *run_N.shape[1:])

    def put(self, found_SQ: Tensor, *, into: Tensor) -> None:
        """Put what was found for the sequences [S, Q, ...] at their places."""
        if self.run is None:
            into[self.place_SQ] = found_SQ.to(into.dtype)
        else:
            self.of(into).copy_(found_SQ)


def _of_one_length(
    rows: Sequences, seen: Sequences, *, device: torch.device
) -> Iterator[tuple[_Places, _Places]]:
    """Yield the places of sequences that are equally long, and so are what they see.

    A sequence without tokens has nothing to attend with, and is left out.
    """
    bounds = [np.array(sequences.bounds) for sequences in (rows, seen)]
    lengths = np.stack([np.diff(one) for one in bounds], axis=1)
    for kind in np.unique(lengths[lengths[:, 0] > 0], axis=0):
        which = np.flatnonzero((lengths == kind).all(axis=1))
        own, there = (
            _placed(one[which], int(length), device)
            for one, length in zip(bounds, kind, strict=True)
        )
        yield own, there


def _placed(starts: Ints, length: int, device: torch.device) -> _Places:
    places = torch.from_numpy(starts[:, None] + np.arange(length)).to(device)
    gapless = starts[-1] - starts[0] == length * (len(starts) - 1)
    return _Places(places, int(starts[0]) if gapless else None)


def _window(length: int, options: AttentionOptions, *, device: torch.device) -> Tensor | None:
    """Return the bias [1, 1, Q, T] that a window puts on the scores of one sequence, if any."""
    if options.window is None or options.window >= length:
        return None
    place = torch.arange(length, device=device)
    ahead = place - place[:, None]
    unseen = ahead.abs() >= options.window
    if options.causal:
        unseen |= ahead > 0
    return torch.zeros(unseen.shape, device=device).masked_fill(unseen, -torch.inf)[None, None]
