"""How many tokens go together: the rule by itself, and with a real model."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.encoder.backbone import Backbone
from embedjob.encoder.batching.budget import (
    SEARCHES,
    BudgetSearch,
    ProbeResult,
    fastest_budget,
    longest_view,
)
from embedjob.encoder.encoder import Encoder
from embedjob.encoder.view_encoder import ViewEncoder
from embedjob.text.views import TokenViews
from tests.encoder import tiny
from tests.encoder.plain import recipe, same
from tests.encoder.token_views import views_of

ASKED = BudgetSearch((512, 1024, 2048, 4096, 8192), 60.0, 2048)


def probing(
    seconds: Callable[[int], float], memory: Callable[[int], float] = lambda tokens: 0.0
) -> tuple[Callable[[int], ProbeResult], list[int]]:
    tried: list[int] = []

    def probe(tokens: int) -> ProbeResult:
        tried.append(tokens)
        return ProbeResult(tokens, seconds(tokens), memory(tokens))

    return probe, tried


def test_a_budget_that_brings_nothing_more_is_not_taken() -> None:
    probe, tried = probing(lambda tokens: max(tokens, 1024) / 1e5)
    assert fastest_budget(probe, BudgetSearch(ASKED.budgets, 60.0, 8192)) == 1024
    assert tried == [512, 1024, 2048, 4096]


def test_among_equals_the_usual_one_is_taken() -> None:
    probe, _ = probing(lambda tokens: tokens / 1e5)
    assert fastest_budget(probe, ASKED) == 2048


def test_the_fastest_is_taken_even_if_it_is_small() -> None:
    probe, _ = probing(lambda tokens: tokens**1.5)
    assert fastest_budget(probe, ASKED) == 512


@given(st.floats(1e-5, 1e-3), st.floats(1.0, 1e6))
def test_no_more_than_its_share_of_the_memory_is_asked_for(each: float, overhead: float) -> None:
    probe, tried = probing(lambda tokens: tokens + overhead, lambda tokens: tokens * each)
    budget = fastest_budget(probe, ASKED)
    assert budget * each <= 0.85 or budget == 512
    assert all(tokens * each <= 0.85 for tokens in tried[1:])


@pytest.mark.parametrize(("memory", "expected"), [(3000, 2048), (512, 512), (100, 256)])
def test_out_of_memory_ends_the_search(memory: int, expected: int) -> None:
    def probe(tokens: int) -> ProbeResult:
        if tokens > memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ProbeResult(tokens, tokens + 1e6, 0.0)

    assert fastest_budget(probe, ASKED) == expected


def test_views_that_break_the_model_and_slow_ones_leave_the_usual_budget() -> None:
    def broken(tokens: int) -> ProbeResult:
        raise IndexError("poison")

    assert fastest_budget(broken, ASKED) == 2048
    slow, tried = probing(lambda tokens: 1.0 * tokens)
    assert fastest_budget(slow, BudgetSearch(ASKED.budgets, -1.0, 2048)) == 2048
    assert tried == [512]


def many(views: TokenViews) -> TokenViews:
    """More tokens than it takes for a search to pay."""
    return views.take(np.arange(200_000 // int(views.lengths.sum()) * views.texts) % views.texts)


@pytest.fixture(scope="module")
def views() -> TokenViews:
    random = np.random.default_rng(1)
    rows = [random.integers(3, 590, size).tolist() for size in random.integers(3, 60, 40)]
    return views_of(rows, [[]], [len(row) - 1 for row in rows])


def encoder_of(**knobs: Any) -> Encoder:
    return Encoder(Backbone(tiny.model("llama").base_model, attention="causal"), recipe(), **knobs)


def test_a_budget_is_searched_when_there_is_much_to_do_and_then_kept(views: TokenViews) -> None:
    encoder = encoder_of()
    assert encoder.encode_views(views).stats["tokens_per_microbatch"] == SEARCHES["cpu"].default
    forwards = []
    encoder.backbone.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    encoder.encode_views(views)
    usual = len(forwards)
    found = encoder.encode_views(many(views))
    assert len(forwards) > 3 * usual
    assert found.stats["tokens_per_microbatch"] in SEARCHES["cpu"].budgets
    after = encoder.encode_views(views)
    assert after.stats["tokens_per_microbatch"] == found.stats["tokens_per_microbatch"]
    expected = encoder_of(tokens_per_microbatch=64).encode_views(views).embeddings
    assert same(after.embeddings, expected)
    assert same(found.embeddings[: views.texts], expected)


def test_memory_that_runs_out_while_searching_bounds_what_follows(views: TokenViews) -> None:
    encoder = encoder_of()
    tried: list[int] = []

    def starve(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tried.append(kwargs["input_ids"].numel())
        if tried[-1] > 700:
            raise torch.OutOfMemoryError("CUDA out of memory")

    encoder.backbone.model.register_forward_pre_hook(starve, with_kwargs=True)
    encoded = encoder.encode_views(many(views))
    assert encoded.stats["tokens_per_microbatch"] == 512
    assert not encoded.failed
    assert len([tokens for tokens in tried if tokens > 700]) == 1


def test_views_without_a_span_are_not_what_a_budget_is_searched_with(views: TokenViews) -> None:
    spanless = many(views)
    spanless.span[:, 0] = spanless.span[:, 1]
    encoder = encoder_of()
    forwards = []
    encoder.backbone.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    found = encoder.encode_views(spanless)
    assert found.stats["tokens_per_microbatch"] == SEARCHES["cpu"].default
    assert len(found.failed) == spanless.texts
    assert not forwards
    # One view with a span among them is embedded, and still not worth a search.
    spanless.span[7, 0] -= 1
    assert len(encoder.encode_views(spanless).failed) == spanless.texts - 1
    assert len(forwards) == 1


def test_the_longest_view_that_is_tried_may_be_longer_than_a_part(views: TokenViews) -> None:
    encoder = encoder_of()
    loaded = ViewEncoder(encoder.backbone, encoder.recipe)._loaded(encoder.recipe)
    for length in (30, 100):
        rows = [[5] * length, [7] * 3]
        sample, number = longest_view(views_of(rows, [[]], [0, 0]), loaded)
        assert sample.lengths[number] == max(length, encoder.recipe.max_tokens)


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 5000))
def test_the_budget_never_changes_a_vector(budget: int) -> None:
    random = np.random.default_rng(1)
    rows = [random.integers(3, 590, size).tolist() for size in (1, 9, 30, 5)]
    few = views_of(rows, [[]], [0] * 4)
    found, usual = (
        encoder_of(tokens_per_microbatch=tokens).encode_views(few).embeddings
        for tokens in (budget, 2048)
    )
    assert same(found, usual)
