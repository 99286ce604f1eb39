"""Counted FLOPs against torch's own count of a real forward."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from embedjob.encoder.backbone import Backbone
from embedjob.encoder.batching.flops import Meter, flops_per_pair, flops_per_token, peak
from tests.encoder import tiny
from tests.encoder.plain import backbone, recipe

TOKENS = 40


def fresh(name: str) -> Backbone:
    model = tiny.model(name)
    # torch counts nothing of a CPU's fused attention.
    model.set_attn_implementation("eager")
    decoder = name in tiny.DECODERS
    attention = "causal" if decoder else "bidirectional"
    return Backbone(model.base_model if decoder else model, attention=attention)


def counted(made: Backbone, layer: int) -> float:
    ids = torch.arange(3, 3 + TOKENS)[None]
    made.states(ids, torch.ones_like(ids).bool(), layer=layer)
    with FlopCounterMode(display=False) as counter:
        made.states(ids, torch.ones_like(ids).bool(), layer=layer)
    return float(counter.get_total_flops())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "neox", "opt", "bert", "distilbert"])
@pytest.mark.parametrize("layer", [-1, 1])
def test_flops_are_those_that_torch_counts(name: str, layer: int) -> None:
    made = fresh(name)
    asked = recipe(layer=layer)
    per_token = flops_per_token(made, asked)
    assert per_token is not None
    # torch counts every pair, whether a causal token sees the other or not.
    ours = per_token * TOKENS + flops_per_pair(made, asked) * TOKENS**2
    assert ours == pytest.approx(counted(made, layer), rel=0.01)


def test_of_windows_and_experts_no_more_is_claimed_than_is_known() -> None:
    assert flops_per_pair(backbone("mistral"), recipe()) == 0.0
    made = Backbone(tiny.model("llama").base_model, attention="causal")
    made.model.config.num_local_experts = 8
    assert flops_per_token(made, recipe()) is None


def test_a_device_is_measured_once_and_only_for_a_pass_that_is_worth_it() -> None:
    meter = Meter(backbone("llama"))
    stats: dict[str, Any] = {"forward_tokens": 1000, "attended_pairs": 5000}
    assert meter.utilization(recipe(), stats, seconds=0.1) == {}
    first = meter.utilization(recipe(), stats, seconds=2.0)
    after = meter.utilization(recipe(), stats, seconds=0.1)
    assert after["model_flops"] == first["model_flops"]
    assert after["peak_flops"] == pytest.approx(first["peak_flops"] / 20)


@pytest.mark.parametrize("disturbed", [1, 2, 3, 9])
def test_a_share_is_never_above_one(disturbed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first measurements are taken while other processes have the device."""
    measured: list[float] = []

    def busy(*_: Any) -> float:
        measured.append(1e6 if len(measured) < disturbed else 1e12)
        return measured[-1]

    monkeypatch.setattr("embedjob.encoder.batching.flops.peak", busy)
    meter = Meter(backbone("llama"))
    for tokens in (1_000, 4_000, 2_000, 8_000, 1):
        stats: dict[str, Any] = {"forward_tokens": tokens, "attended_pairs": tokens}
        found = meter.utilization(recipe(), stats, seconds=2.0)
        assert 0 < found["model_flops"] <= found["peak_flops"]
    assert len(measured) <= 3
    if disturbed < 3:
        assert found["peak_flops"] == 2e12


def test_the_peak_is_that_of_a_device_of_this_age() -> None:
    assert 1e8 < peak(torch.device("cpu"), torch.float32) < 1e14
    assert np.isfinite(peak(torch.device("cpu"), torch.float32))
