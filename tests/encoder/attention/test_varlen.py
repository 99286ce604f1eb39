from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.encoder.attention.kernels import Scores
from embedjob.encoder.attention.varlen import (
    AttentionInputs,
    AttentionOptions,
    PackedTrees,
    attend_sequences,
    attend_trees,
    pack_sequences,
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
    rows = pack_sequences(lengths, device=CPU)
    options = AttentionOptions(Scores(scale, softcap), causal, window)
    out, weight = attend_sequences(AttentionInputs(query, key, value), rows, options)

    of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    ahead = torch.arange(tokens) - torch.arange(tokens)[:, None]
    sees = of == of[:, None]
    if causal:
        sees &= ahead <= 0
    if window is not None:
        sees &= ahead.abs() < window
    expected = masked((query, key, value), sees, options.scores)
    for got, right in zip((out, weight), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def masked(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], sees: torch.Tensor, asked: Scores
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and log-sum-exps of one matrix of all scores, where some see some."""
    query, *seen = inputs
    groups = query.shape[1] // inputs[1].shape[1]
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
def test_a_suffix_sees_the_shared_tokens_and_itself_and_nothing_else(
    trees: list[tuple[int, list[int]]], key_heads: int, softcap: float | None
) -> None:
    torch.manual_seed(1)
    shared, suffixes = [root for root, _ in trees], [suffixes for _, suffixes in trees]
    parts = [*shared, *(length for some in suffixes for length in some)]
    query = torch.randn(sum(parts), 4, 8)
    key, value = (torch.randn(sum(parts), key_heads, 8) for _ in range(2))
    runs = (parts, shared, [sum(some) for some in suffixes])
    rows = PackedTrees(*(pack_sequences(lengths, device=CPU) for lengths in runs))
    options = AttentionOptions(Scores(0.4, softcap), causal=True, window=None)
    out, weight = attend_trees(AttentionInputs(query, key, value), rows, options)

    tree_of_tail = [tree for tree, some in enumerate(suffixes) for _ in some]
    of = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(parts))
    tree = torch.tensor([*range(len(trees)), *tree_of_tail])[of]
    root = of < len(trees)
    sees = (of == of[:, None]).tril() | (root & ~root[:, None] & (tree == tree[:, None]))
    expected = masked((query, key, value), sees, options.scores)
    for got, right in zip((out, weight), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_sequences_of_another_row_are_refused() -> None:
    inputs = torch.randn(5, 2, 8)
    options = AttentionOptions(Scores(1.0, None), causal=True, window=None)
    with pytest.raises(ValueError, match="sequences of 6 tokens in a row of 5"):
        attend_sequences(
            AttentionInputs(inputs, inputs, inputs), pack_sequences([4, 2], device=CPU), options
        )
    keys = pack_sequences([4, 2], device=CPU)
    own = pack_sequences([3, 2], device=CPU)
    with pytest.raises(ValueError, match="sequences of 6 tokens in a row of 5"):
        attend_sequences(AttentionInputs(inputs, inputs, inputs), own, options, keys=keys)


def test_bounds_are_where_sequences_begin_and_the_last_ends() -> None:
    rows = pack_sequences([3, 1, 4], device=CPU)
    assert [stop - start for start, stop in pairwise(rows.bounds)] == [3, 1, 4]
    assert rows.bounds_S.tolist() == [0, 3, 4, 8]
    assert rows.bounds_S.dtype == torch.int32
    assert rows.longest == 4
