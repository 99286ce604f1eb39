"""The last block, finished for the tokens alone that are read: which they are, and when."""

import copy
from typing import Any

import pytest
from torch import Tensor, nn

from embedjob.encoder.backbone import Backbone
from embedjob.encoder.encoder import Encoder
from embedjob.encoder.feed_forward import reads_last_tokens
from embedjob.encoder.flops import flops_per_token
from embedjob.recipe import Recipe
from tests.encoder import tiny
from tests.encoder.test_fast_paths import (
    backbone,
    last_tokens,
    recipe,
    same,
    shared_views,
    text_first_views,
    views_of,
)
from tests.encoder.test_interventions import BOTH

NAMED = ("llama", "qwen3", "mistral", "gemma2", "gpt2", "neox")
PLAIN = views_of([[5, 6, 7, 8], [9, 10], [11, 12, 13]], [[]], [3, 1, 2])
LAST = {"span": "last_token"}


class Seen(nn.Module):
    """A layer that tells how many tokens it is given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.tokens: list[int] = []

    def forward(self, states: Tensor) -> Any:
        self.tokens.append(states.shape[:-1].numel())
        return self.layer(states)


def watched(name: str, block: int = -1) -> tuple[Backbone, Seen]:
    made = Backbone(
        copy.deepcopy(backbone(name).model),
        attention="bidirectional" if name in tiny.ENCODERS else "causal",
    )
    assert made.blocks is not None
    made.blocks[block].mlp = seen = Seen(made.blocks[block].mlp)
    return made, seen


def given(name: str, views: Any, made: Recipe, *, block: int = -1, **asked: Any) -> list[int]:
    """The tokens of each micro-batch that a block's layer is given, its result as it should be."""
    model, seen = watched(name, block)
    encoder = Encoder(model, made, **asked)
    encoder.encode_views(views)
    seen.tokens.clear()
    got = encoder.encode_views(views).embeddings
    plain = made.model_copy(update={"span": "all"})
    assert same(got, Encoder(backbone(name), plain).encode_views(views).embeddings)
    return seen.tokens


@pytest.mark.parametrize("side", ["right", "left", "none"])
@pytest.mark.parametrize("name", NAMED)
def test_one_token_of_each_view_is_finished(name: str, side: Any) -> None:
    assert given(name, PLAIN, recipe(**LAST), padding_side=side) == [3]
    # Every block before it knows all tokens.
    assert sum(given(name, PLAIN, recipe(**LAST), block=0, padding_side=side)) >= 9


@pytest.mark.parametrize("side", ["right", "none"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "neox"])
def test_after_a_prefix_and_of_every_tail_too(name: str, side: Any) -> None:
    shared = last_tokens(shared_views())
    assert given(name, shared, recipe(**LAST), padding_side=side) == [6, 6]
    trees = last_tokens(text_first_views(prefix=8))
    assert given(name, trees, recipe(**LAST), padding_side=side) == [18]


def test_of_an_earlier_layer_it_is_the_block_before() -> None:
    assert given("llama", PLAIN, recipe(**LAST, layer=1), block=0) == [3]
    assert given("llama", PLAIN, recipe(**LAST, layer=(1, -1))) == [3]
    assert sum(given("llama", PLAIN, recipe(**LAST, layer=(1, -1)), block=0)) >= 9
    assert sum(given("llama", PLAIN, recipe(**LAST, layer=0))) == 0


@pytest.mark.parametrize("knobs", [{}, {"span": "text"}])
def test_with_more_to_read_all_tokens_are_finished(knobs: dict[str, Any]) -> None:
    assert sum(given("llama", PLAIN, recipe(**knobs))) >= 9


@pytest.mark.parametrize(
    "more",
    [
        {"interventions": BOTH},
        {"heads": ({"router": {"scores": "logits", "join": "column"}},)},
        {"decode": {"max_tokens": 2}},
    ],
)
def test_with_more_than_the_last_state_it_is_not_asked(more: dict[str, Any]) -> None:
    assert reads_last_tokens(recipe(**LAST))
    assert not reads_last_tokens(recipe(**LAST, **more))


def test_tokens_that_see_later_ones_are_all_finished() -> None:
    asked = recipe(**LAST, attention="bidirectional")
    model = Backbone(copy.deepcopy(backbone("llama").model), attention="bidirectional")
    every = flops_per_token(model, recipe(attention="bidirectional"))
    assert flops_per_token(model, asked) == every


def test_a_layer_that_looks_beside_a_token_is_given_all() -> None:
    class Mixing(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, states: Tensor) -> Any:
            return self.layer(states) + states.cumsum(dim=1)

    model = copy.deepcopy(backbone("llama").model)
    model.layers[-1].mlp = Mixing(model.layers[-1].mlp)
    made = Backbone(model, attention="causal")
    assert not made.reads_alone(-1)
    got = Encoder(made, recipe(**LAST)).encode_views(PLAIN).embeddings
    assert same(got, Encoder(made, recipe()).encode_views(PLAIN).embeddings)


@pytest.mark.parametrize("name", ["opt", "bert"])
def test_a_block_without_such_a_layer_is_finished_for_all(name: str) -> None:
    made = backbone(name)
    assert not made.reads_alone(-1)
    attention = "bidirectional" if name == "bert" else "causal"
    asked = recipe(**LAST, attention=attention)
    assert flops_per_token(made, asked) == flops_per_token(made, recipe(attention=attention))


def test_what_is_left_out_is_not_counted() -> None:
    made = backbone("llama")
    layer = made.last_feed_forward(-1)
    assert layer is not None
    weights = sum(parameter.numel() for parameter in layer.parameters())
    every, last = (flops_per_token(made, recipe(span=span)) for span in ("all", "last_token"))
    assert every is not None
    assert last is not None
    assert every - last == 2 * weights
