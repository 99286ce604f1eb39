from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.encoder.attention.kernels import Scores
from embedjob.encoder.attention.varlen import (
    Look,
    States,
    Trees,
    attend_each,
    attend_trees,
    sequences,
)

CPU = torch.device("cpu")


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    key_heads=st.sampled_from([1, 2, 4]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 14),
    softcap=st.none() | st.just(2.0),
)
def test_attention_and_its_log_sum_exps_are_those_of_one_masked_matrix(
    lengths: list[int], key_heads: int, causal: bool, window: int | None, softcap: float | None
) -> None:
    torch.manual_seed(1)
    tokens, scale = sum(lengths), 0.4
    query = torch.randn(tokens, 4, 8)
    key, value = (torch.randn(tokens, key_heads, 8) for _ in range(2))
    rows = sequences(lengths, device=CPU)
    look = Look(Scores(scale, softcap), causal, window)
    out, weight = attend_each(States(query, key, value), rows, look)

    of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    ahead = torch.arange(tokens) - torch.arange(tokens)[:, None]
    sees = of == of[:, None]
    if causal:
        sees &= ahead <= 0
    if window is not None:
        sees &= ahead.abs() < window
    expected = masked((query, key, value), sees, look.scores)
    for got, right in zip((out, weight), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def masked(
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor], sees: torch.Tensor, asked: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and log-sum-exps of one matrix of all scores, where some see some."""
    query, *seen = states
    groups = query.shape[1] // states[1].shape[1]
    keys, values = (one.repeat_interleave(groups, dim=1) for one in seen)
    scores = torch.einsum("qhe,khe->hqk", query, keys) * asked.scale
    if asked.softcap is not None:
        scores = torch.tanh(scores / asked.softcap) * asked.softcap
    scores = scores.masked_fill(~sees, -torch.inf)
    out = torch.einsum("hqk,khe->qhe", scores.softmax(dim=-1), values)
    return out, scores.logsumexp(dim=-1).T


@settings(deadline=None, max_examples=60)
@given(
    trees=st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(1, 5), min_size=1, max_size=3)),
        min_size=1,
        max_size=4,
    ),
    key_heads=st.sampled_from([1, 2, 4]),
    softcap=st.none() | st.just(2.0),
)
def test_a_tail_sees_its_trunk_and_itself_and_nothing_else(
    trees: list[tuple[int, list[int]]], key_heads: int, softcap: float | None
) -> None:
    torch.manual_seed(1)
    trunks, tails = [trunk for trunk, _ in trees], [tails for _, tails in trees]
    each = [*trunks, *(length for some in tails for length in some)]
    query = torch.randn(sum(each), 4, 8)
    key, value = (torch.randn(sum(each), key_heads, 8) for _ in range(2))
    runs = (each, trunks, [sum(some) for some in tails])
    rows = Trees(*(sequences(lengths, device=CPU) for lengths in runs))
    look = Look(Scores(0.4, softcap), causal=True, window=None)
    out, weight = attend_trees(States(query, key, value), rows, look)

    tree_of_tail = [tree for tree, some in enumerate(tails) for _ in some]
    of = torch.repeat_interleave(torch.arange(len(each)), torch.tensor(each))
    tree = torch.tensor([*range(len(trees)), *tree_of_tail])[of]
    trunk = of < len(trees)
    sees = (of == of[:, None]).tril() | (trunk & ~trunk[:, None] & (tree == tree[:, None]))
    expected = masked((query, key, value), sees, look.scores)
    for got, right in zip((out, weight), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_sequences_of_another_row_are_refused() -> None:
    states = torch.randn(5, 2, 8)
    look = Look(Scores(1.0, None), causal=True, window=None)
    with pytest.raises(ValueError, match="sequences of 6 tokens in a row of 5"):
        attend_each(States(states, states, states), sequences([4, 2], device=CPU), look)
    keys = sequences([4, 2], device=CPU)
    own = sequences([3, 2], device=CPU)
    with pytest.raises(ValueError, match="sequences of 6 tokens in a row of 5"):
        attend_each(States(states, states, states), own, look, keys=keys)


def test_bounds_are_where_sequences_begin_and_the_last_ends() -> None:
    rows = sequences([3, 1, 4], device=CPU)
    assert [stop - start for start, stop in pairwise(rows.bounds)] == [3, 1, 4]
    assert rows.bounds_S.tolist() == [0, 3, 4, 8]
    assert rows.bounds_S.dtype == torch.int32
    assert rows.longest == 4
