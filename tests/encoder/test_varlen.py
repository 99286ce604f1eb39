from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.encoder.kernels import Scores
from embedjob.encoder.varlen import Look, attend_each, sequences

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
    out, weight = attend_each(query, key, value, rows, look)

    of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    ahead = torch.arange(tokens) - torch.arange(tokens)[:, None]
    sees = of == of[:, None]
    if causal:
        sees &= ahead <= 0
    if window is not None:
        sees &= ahead.abs() < window
    keys, values = (one.repeat_interleave(4 // key_heads, dim=1) for one in (key, value))
    scores = torch.einsum("qhe,khe->hqk", query, keys) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~sees, -torch.inf)
    expected = torch.einsum("hqk,khe->qhe", scores.softmax(dim=-1), values)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight, scores.logsumexp(dim=-1).T, rtol=1e-4, atol=1e-5)


def test_sequences_of_another_row_are_refused() -> None:
    states = torch.randn(5, 2, 8)
    look = Look(Scores(1.0, None), causal=True, window=None)
    with pytest.raises(ValueError, match="sequences of 6 tokens in a row of 5"):
        attend_each(states, states, states, sequences([4, 2], device=CPU), look)


def test_bounds_are_where_sequences_begin_and_the_last_ends() -> None:
    rows = sequences([3, 1, 4], device=CPU)
    assert [stop - start for start, stop in pairwise(rows.bounds)] == [3, 1, 4]
    assert rows.bounds_S.tolist() == [0, 3, 4, 8]
    assert rows.bounds_S.dtype == torch.int32
    assert rows.longest == 4
