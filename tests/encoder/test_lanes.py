"""Keys that fill whole vectors, against keys as they are; on any CPU, quicker there or not."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.encoder import kernels, lanes
from embedjob.encoder.backbone import Backbone
from embedjob.encoder.kernels import Scores, attend
from embedjob.encoder.lanes import NAME, use_lanes
from tests.encoder import tiny
from tests.encoder.test_fused import backbone_of

ALIKE = ["llama", "qwen3", "mistral", "gpt2", "neox", "opt", "bert", "roberta", "distilbert"]


@pytest.fixture(autouse=True)
def lanes_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_has_lanes", lambda: True)


def taking(backbone: Backbone) -> bool:
    return use_lanes(
        backbone.model,
        states=partial(backbone.states, layer=-1),
        vocabulary=backbone.vocabulary,
        tolerance=backbone.tolerance,
    )


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("side", ["left", "right"])
def test_states_are_those_of_the_models_own_attention(
    name: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, other = (backbone_of(tiny.model(name), name) for _ in range(2))
    assert taking(other)
    filled = []
    in_lanes = lanes.in_lanes
    monkeypatch.setattr(lanes, "in_lanes", lambda *given: filled.append(1) or in_lanes(*given))
    drawn = torch.Generator().manual_seed(3)
    for length in (1, 9, 10, 13, 16, 17, 31):
        ids = torch.randint(3, 590, (3, length), generator=drawn)
        for padded in (False, True):
            lengths = torch.tensor([length, 1, max(1, length - 2)] if padded else [length] * 3)
            mask = torch.arange(length) < lengths[:, None]
            mask = mask.flip(1) if side == "left" else mask
            expected, got = (one.states(ids, mask, layer=-1)[mask] for one in (plain, other))
            assert float((got - expected).norm() / expected.norm()) < 1e-5
    assert len(filled) == 3 * 2 * len(other.blocks or other.stack or ())


@given(
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    masked=st.sampled_from(["no", "some", "causal"]),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_outputs_and_log_sum_exps_are_those_of_the_keys_alone(
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


def test_a_model_with_position_biases_keeps_its_attention_as_it_is() -> None:
    plain, other = (backbone_of(tiny.model("t5"), "t5") for _ in range(2))
    taking(other)
    ids = torch.arange(3, 16)[None]
    mask = torch.ones_like(ids).bool()
    expected, got = (one.states(ids, mask, layer=-1) for one in (plain, other))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_gives_something_else_so_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone = backbone_of(copy.deepcopy(tiny.model("bert")), "bert")
    in_lanes = lanes.in_lanes
    monkeypatch.setattr(
        lanes, "in_lanes", lambda key, value, mask: in_lanes(key, value.flip(2), mask)
    )
    assert not taking(backbone)
    assert backbone.model.config._attn_implementation != NAME
