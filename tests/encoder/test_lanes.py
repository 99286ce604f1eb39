"""Keys that fill whole vectors, against keys as they are; on any CPU, quicker there or not."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.encoder import fused, kernels, lanes
from embedjob.encoder.backbone import Backbone
from embedjob.encoder.encoder import Encoder
from embedjob.encoder.fused import fuse
from embedjob.encoder.kernels import ROOM, Scores, attend, in_lanes
from embedjob.encoder.lanes import NAME, use_lanes
from tests.encoder import tiny
from tests.encoder.test_fast_paths import recipe, same, views_of
from tests.encoder.test_fused import backbone_of

# Their keys and values are what a linear layer gave, or are turned where they lie.
NOT_COPIED = {"llama", "mistral", "opt", "bert", "roberta", "distilbert"}
ALIKE = ["llama", "qwen3", "mistral", "gpt2", "neox", "opt", "bert", "roberta", "distilbert"]


@pytest.fixture(autouse=True)
def lanes_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (kernels, fused):
        monkeypatch.setattr(module, "has_avx512", lambda: True)


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
    assert other.stack is not None
    fuse(other.stack)
    assert taking(other)
    filled = []
    in_lanes = lanes.in_lanes

    def counting(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = in_lanes(key, value)
        filled.append(keys.shape[2] - key.shape[2])
        return keys, values

    monkeypatch.setattr(lanes, "in_lanes", counting)
    drawn = torch.Generator().manual_seed(3)
    for length in (1, 9, 10, 13, 16, 17, 31):
        ids = torch.randint(3, 590, (3, length), generator=drawn)
        for padded in (False, True):
            lengths = torch.tensor([length, 1, max(1, length - 2)] if padded else [length] * 3)
            mask = torch.arange(length) < lengths[:, None]
            mask = mask.flip(1) if side == "left" else mask
            expected, got = (one.states(ids, mask, layer=-1)[mask] for one in (plain, other))
            assert float((got - expected).norm() / expected.norm()) < 1e-5
    layers = len(other.stack)
    # Ten, 13 and 31 keys are filled in any case, nine where none are copied.
    windows = name in NOT_COPIED
    assert filled.count(0) == (3 if windows else 4) * 2 * layers
    assert {*filled} == ({0, 1, 3, 6, 7} if windows else {0, 1, 3, 6})


def before_zeros(states: torch.Tensor) -> torch.Tensor:
    """The same states [V, H, T, E] as a layer with room gives them."""
    views, heads, tokens, width = states.shape
    room = torch.zeros(views * tokens + ROOM, heads, width)
    room[: views * tokens] = states.transpose(1, 2).flatten(0, 1)
    return room[: views * tokens].view(views, tokens, heads, width).transpose(1, 2)


def test_nothing_is_copied_where_there_is_room_and_nothing_read_that_is_no_zero() -> None:
    key, value = (before_zeros(torch.randn(3, 2, 7, 8)) for _ in range(2))
    keys, values = in_lanes(key, value)
    assert keys.shape[2] == values.shape[2] == 16
    assert keys.data_ptr() == key.data_ptr()
    assert values.data_ptr() == value.data_ptr()
    # The last view is followed by zeros, the first by the second.
    assert not keys[-1, :, 7:].any()
    assert torch.equal(keys[0, :, 7:14], key[1])
    # Whatever else may lie there is nobody's to read.
    key.as_strided((1,), (1,), key.numel()).fill_(torch.nan)
    assert in_lanes(key, value)[0] is key
    # Nor is memory in another order: with a few missing it is copied, else left.
    strided = torch.randn(3, 2, 7, 8)
    assert in_lanes(strided, strided)[0] is strided
    for tokens in (10, 15):
        few = torch.randn(3, 2, tokens, 8)
        keys, _ = in_lanes(few, few)
        assert torch.equal(keys[:, :, :tokens], few)
        assert keys.shape[2] == 16


@pytest.mark.parametrize("name", ["bert", "opt", "llama"])
def test_a_view_that_breaks_takes_no_other_with_it(name: str) -> None:
    plain, other = (backbone_of(copy.deepcopy(tiny.model(name)), name) for _ in range(2))
    for backbone in (plain, other):
        # One token whose states are not numbers, as of a text that overflows.
        backbone.model.get_input_embeddings().weight.data[77] = torch.nan
    assert other.stack is not None
    fuse(other.stack)
    assert taking(other)
    asked = recipe(attention="causal" if name in tiny.DECODERS else "bidirectional")
    rows = [[5, 6, 7, 8], [9, 77, 11, 12], [13, 14, 15, 16]]
    views = views_of(rows, [[]], [0] * len(rows))
    expected, got = (Encoder(one, asked).encode_views(views) for one in (plain, other))
    assert set(got.failed) == set(expected.failed) == {1}
    assert same(got.embeddings[[0, 2]], expected.embeddings[[0, 2]])


@given(
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    masked=st.sampled_from(["no", "some", "causal"]),
    room=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_outputs_and_log_sum_exps_are_those_of_the_keys_alone(
    queries: int, keys: int, masked: str, room: bool, seed: int
) -> None:
    drawn = torch.Generator().manual_seed(seed)
    keys = queries if masked == "causal" else keys
    query, key, value = (
        torch.randn(2, 3, length, 8, generator=drawn) for length in (queries, keys, keys)
    )
    if room:
        key, value = (before_zeros(states) for states in (key, value))
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
    monkeypatch.setattr(lanes, "in_lanes", lambda key, value: in_lanes(key, value.flip(2)))
    assert not taking(backbone)
    assert backbone.model.config._attn_implementation != NAME
