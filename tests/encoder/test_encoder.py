"""Embeddings of an encoder: the plain model's, the same in any batch, or a failure of one text.

Covers: embedjob.encoder.batching.encode_all, embedjob.encoder.batching.forward,
embedjob.encoder.outputs.assemble, embedjob.encoder.view_encoder
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedjob.config.pooling import Truncate
from embedjob.config.recipe import Recipe, SpecialTokens
from embedjob.encoder.backbone import Backbone, load_backbone
from embedjob.encoder.encoder import Encoder
from embedjob.errors import ConfigError, InputError, InterruptedRunError, ModelError
from embedjob.models.tokenizer import load_tokenizer
from tests.encoder import tiny

CPU = torch.device("cpu")
TEXTS = [
    "The quick brown fox.",
    "a",
    "",
    "It is fine, don't you think? Query: how do I get funding for my web based startup idea?",
    'Quotes " and {braces} and <s> [SEP] <|endoftext|>',
    "日本語の文章もここにあります。",
    "a",
    "the lazy dog " * 30,
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tiny.save(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


def recipe(folder: Path, **knobs: Any) -> Recipe:
    return Recipe(model=str(folder), max_tokens=knobs.pop("max_tokens", 48), **knobs)


KNOBS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen3", {"templates": ('Say "{text}" in one word:"',), "span": "last_token"}),
    ("gpt2", {"templates": ("{text} means", "Topic of {text}:"), "span": "tail"}),
    ("mistral", {"attention": "bidirectional", "pooling": "weighted_mean", "layer": (1, -1)}),
    ("gemma2", {"templates": ("Now: {text}",), "span": "text", "pooling": "max", "layer": 1}),
    ("bert", {"attention": "bidirectional", "span": "first_token", "finish": ()}),
    (
        "roberta",
        {
            "attention": "bidirectional",
            "aggregation": "concat",
            "templates": ("query: {text}", "{text}"),
        },
    ),
]


@pytest.mark.parametrize(("name", "knobs"), KNOBS, ids=[name for name, _ in KNOBS])
def test_an_embedding_does_not_depend_on_its_company(
    name: str, knobs: dict[str, Any], folders: Callable[[str], Path]
) -> None:
    made = recipe(folders(name), **knobs)
    backbone = load_backbone(made, device=CPU)
    texts = [text for text in TEXTS if text]
    alone = np.concatenate([Encoder(backbone, made).encode([text]) for text in texts])
    norms = np.linalg.norm(alone, axis=1)
    assert (np.abs(norms - 1) < 1e-5).all() == made.normalized
    for budget in (1, 64, 100_000):
        for side in ("right", "left"):
            encoder = Encoder(backbone, made, tokens_per_microbatch=budget, padding_side=side)
            together = encoder.encode(texts)
            assert cosine(together, alone).min() >= 0.999999, (budget, side)
            assert np.abs(together - alone).max() <= 1e-4 * np.abs(alone).max()


def test_the_vector_is_that_of_the_plain_model(folders: Callable[[str], Path]) -> None:
    made = recipe(folders("llama"), templates=("In short: {text} =",), span="last_token")
    encoder = Encoder.from_recipe(made, device="cpu")
    tokenizer, model = tiny.tokenizer("llama"), tiny.model("llama")
    for text in TEXTS[:2]:
        ids = torch.tensor([tokenizer.encode(f"In short: {text} =").ids])
        with torch.inference_mode():
            state = model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
        expected = torch.nn.functional.normalize(state, dim=0).numpy()
        np.testing.assert_allclose(encoder.encode([text])[0], expected, atol=1e-5)


def test_equal_views_go_through_the_model_once(folders: Callable[[str], Path]) -> None:
    made = recipe(folders("llama"))
    views = load_tokenizer(made).views(["a", "b", "a", "a"])
    told: list[tuple[int, int]] = []
    encoded = Encoder.from_recipe(made, device="cpu").encode_views(
        views, on_progress=lambda texts, tokens: told.append((texts, tokens))
    )
    assert encoded.stats["distinct_views"] == 2
    assert encoded.stats["forward_tokens"] == views.lengths[:2].sum()
    assert told[-1] == (4, views.lengths.sum())
    assert np.array_equal(encoded.embeddings[0], encoded.embeddings[2])
    assert not np.array_equal(encoded.embeddings[0], encoded.embeddings[1])


@contextmanager
def breaking(backbone: Backbone, token: int, error: Exception) -> Iterator[None]:
    """Within it the model raises whenever a token goes in."""

    def hook(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if (kwargs["input_ids"] == token).any():
            raise error

    handle = backbone.model.register_forward_pre_hook(hook, with_kwargs=True)
    yield
    handle.remove()


def test_a_text_that_breaks_the_model_is_left_out_and_the_others_are_not(
    folders: Callable[[str], Path],
) -> None:
    made = recipe(folders("llama"), templates=("{text}", "Again: {text}"))
    encoder = Encoder.from_recipe(made, device="cpu")
    texts = [*"abcdefgh", "poison 日", *"ijklm"]
    whole = encoder.encode(texts)
    poison = tiny.tokenizer("llama").token_to_id("<0xE6>")
    with breaking(encoder.backbone, poison, ValueError("bad kernel")):
        encoded = encoder.encode_views(load_tokenizer(made).views(texts))
        with pytest.raises(InputError, match=r"1 of 14 texts.*number 8: model_error.*bad kernel"):
            encoder.encode(texts)
    assert encoded.failed == {8: ("model_error", "ValueError: bad kernel")}
    assert np.isnan(encoded.embeddings[8]).all()
    good = np.arange(len(texts)) != 8
    assert cosine(encoded.embeddings[good], whole[good]).min() >= 0.999999


def test_what_a_budget_was_lowered_to_is_kept_for_the_next_chunk(
    folders: Callable[[str], Path],
) -> None:
    made = recipe(folders("llama"))
    encoder = Encoder.from_recipe(made, device="cpu", tokens_per_microbatch=1000)
    tried: list[int] = []

    def hook(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tried.append(kwargs["input_ids"].numel())
        if tried[-1] > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")

    encoder.backbone.model.register_forward_pre_hook(hook, with_kwargs=True)
    texts = [f"{word} {number}" for word in ("fox", "dog") for number in range(20)]
    assert np.isfinite(encoder.encode(texts)).all()
    assert max(tried) > 100
    tried.clear()
    assert np.isfinite(encoder.encode(texts)).all()
    assert max(tried) <= 100


def test_a_vector_that_is_not_finite_makes_its_text_fail(folders: Callable[[str], Path]) -> None:
    made = recipe(folders("llama"))
    encoder = Encoder.from_recipe(made, device="cpu")
    poison = tiny.tokenizer("llama").token_to_id("<0xE6>")
    with torch.no_grad():
        encoder.backbone.model.get_input_embeddings().weight[poison] = torch.nan
    encoded = encoder.encode_views(load_tokenizer(made).views(["a", "日", "b"]))
    assert {text: reason for text, (reason, _) in encoded.failed.items()} == {1: "non_finite"}
    assert np.isfinite(encoded.embeddings[[0, 2]]).all()


def test_an_empty_span_makes_its_text_fail(folders: Callable[[str], Path]) -> None:
    made = recipe(folders("gpt2"), special_tokens=SpecialTokens(bos="none"))
    encoded = Encoder.from_recipe(made, device="cpu").encode_views(
        load_tokenizer(made).views(["a", ""])
    )
    assert encoded.failed[1][0] == "empty_span"
    assert np.isnan(encoded.embeddings[1]).all()
    assert np.isfinite(encoded.embeddings[0]).all()


def test_no_texts_are_no_embeddings_of_the_right_width(folders: Callable[[str], Path]) -> None:
    encoder = Encoder.from_recipe(
        recipe(folders("llama"), finish=(Truncate(truncate=5),)), device="cpu"
    )
    assert encoder.encode([]).shape == (0, 5)


def test_told_to_stop_it_raises(folders: Callable[[str], Path]) -> None:
    made = recipe(folders("llama"))
    with pytest.raises(InterruptedRunError):
        Encoder.from_recipe(made, device="cpu").encode_views(
            load_tokenizer(made).views(["a"]), stop=lambda: True
        )


def test_each_role_has_its_own_template(folders: Callable[[str], Path]) -> None:
    document = recipe(folders("llama"), role="document")
    query = recipe(folders("llama"), role="query", templates=("Query: {text}",))
    encoder = Encoder.from_recipe(document, recipes={"query": query}, device="cpu")
    assert np.allclose(
        encoder.encode(["fox"], role="query"),
        Encoder.from_recipe(query, device="cpu").encode(["fox"]),
        atol=1e-6,
    )
    assert not np.allclose(encoder.encode(["fox"], role="query"), encoder.encode(["fox"]))
    with pytest.raises(ConfigError, match=r"got symmetric.*loaded for query, document"):
        encoder.encode(["fox"], role="symmetric")


def test_all_roles_share_one_model(folders: Callable[[str], Path]) -> None:
    document, query = recipe(folders("llama")), recipe(folders("qwen3"), role="query")
    with pytest.raises(ConfigError, match="one encoder holds one model"):
        Encoder.from_recipe(document, recipes={"query": query}, device="cpu")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"max_tokens": 81}, "got 81, but .* has 80 positions; set encoder.max_tokens: 80"),
        ({"layer": 3}, "encoder.layer: got 3, allowed is -3 to 2"),
        ({"layer": (-1, -4)}, "encoder.layer: got -4"),
    ],
)
def test_a_recipe_that_the_model_cannot_follow_is_refused(
    knobs: dict[str, Any], message: str, folders: Callable[[str], Path]
) -> None:
    with pytest.raises(ModelError, match=message):
        Encoder.from_recipe(recipe(folders("llama"), **knobs), device="cpu")


def test_narrow_types_stay_near_float32(folders: Callable[[str], Path]) -> None:
    exact, narrow = (
        Encoder.from_recipe(recipe(folders("qwen3"), dtype=dtype), device="cpu").encode(TEXTS[3:])
        for dtype in ("float32", "bfloat16")
    )
    assert cosine(exact, narrow).min() >= 0.995
    assert narrow.dtype == np.float32


def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return (one * other).sum(axis=1) / norms
