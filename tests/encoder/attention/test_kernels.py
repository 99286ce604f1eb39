"""Attention over one block of keys, against its definition."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.encoder.attention.kernels import Scores, attend


@given(
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    masked=st.sampled_from(["no", "some", "causal"]),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_outputs_and_log_sum_exps_are_those_of_the_definition(
    queries: int, keys: int, masked: str, seed: int
) -> None:
    drawn = torch.Generator().manual_seed(seed)
    keys = queries if masked == "causal" else keys
    query, key, value = (
        torch.randn(2, 3, length, 8, generator=drawn) for length in (queries, keys, keys)
    )
    bias = None
    if masked == "some":
        bias = torch.zeros(2, 1, queries, keys)
        bias[..., 1:] = torch.where(
            torch.rand(2, 1, queries, keys - 1, generator=drawn) < 0.5, 0.0, -torch.inf
        )
    scores = query @ key.transpose(-1, -2) * 0.3
    if bias is not None:
        scores = scores + bias
    if masked == "causal":
        ahead = torch.ones(queries, keys, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(ahead, -torch.inf)
    out, weight = attend(query, key, value, Scores(0.3, None), causal=masked == "causal", bias=bias)
    torch.testing.assert_close(out, scores.softmax(dim=-1) @ value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight, scores.logsumexp(dim=-1), rtol=1e-4, atol=1e-5)
