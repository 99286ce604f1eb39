"""Long texts and kept views against plain forwards, one text at a time, without padding.

Covers: embedjob.encoder.outputs.assemble, embedjob.text.long_text
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors
from torch import Tensor
from transformers import PreTrainedModel

from embedjob.config.job_file import recipe_from
from embedjob.config.recipe import Recipe
from embedjob.encoder.backbone import Backbone
from embedjob.encoder.encoder import Encoder
from embedjob.errors import InputError
from embedjob.text.tokenizing import ViewTokenizer
from embedjob.vectors.encoded import Encoded
from tests.encoder import tiny
from tests.fakes import tiny_tokenizer
from tests.methods import making
from tests.methods.references import run, unit

EOL = 'This sentence : "{text}" means in one word:"'
TEXTS = [
    "the quick brown fox jumps over the lazy dog near the river bank. " * 8 + "the end",
    "a fox",
    "Query: how do I get funding for my web based startup idea? " * 3 + "why?",
    "a fox",
]
FAMILIES = {"bert": "bert", "llama": "llama", "qwen3": "qwen"}


@cache
def backbone(name: str) -> Backbone:
    attention: Any = "bidirectional" if name == "bert" else "causal"
    return Backbone(making.model(name), attention=attention)


def recipe(name: str, **knobs: Any) -> Recipe:
    attention = {"attention": "bidirectional"} if name == "bert" else {}
    return recipe_from({"model": "m", "max_tokens": 60, **attention, **knobs}, {})


def encode(name: str, made: Recipe, texts: list[str] = TEXTS, **how: Any) -> Encoded:
    tokenizer = ViewTokenizer(tiny_tokenizer(FAMILIES[name]), made, positions=2000)
    encoded = Encoder(backbone(name), made, **how).encode_views(tokenizer.views(texts))
    assert not encoded.failed
    return encoded


def agree(found: np.ndarray, expected: list[Tensor]) -> None:
    wanted = np.stack([one.numpy() for one in expected])
    assert found.shape == wanted.shape
    assert (found * wanted).sum(axis=1).min() >= 0.99999
    assert np.abs(found - wanted).max() <= 1e-4


def chunk_mean(
    tok: Tokenizer, model: PreTrainedModel, text: str, templates: list[str], most: int
) -> Tensor:
    """The longest beginning that fits is a part of its own; the parts' mean by their tokens."""
    vectors: list[list[Tensor]] = [[] for _ in templates]
    weights: list[list[int]] = [[] for _ in templates]
    while text:
        ends = reversed([end for _, end in tok.encode(text, add_special_tokens=False).offsets])
        part = next(end for end in ends if all(fits(tok, t, text[:end], most) for t in templates))
        part, text = text[:part], text[part:] if text[part:].strip() else ""
        for view, template in enumerate(templates):
            encoding, start = tok.encode(template.replace("{text}", part)), template.index("{")
            inside = [a < start + len(part) and b > start for a, b in encoding.offsets]
            vectors[view].append(run(model, encoding.ids)[-1][-1])
            weights[view].append(sum(inside))
    means = [
        sum(w * v for w, v in zip(*both, strict=True)) / sum(both[0])
        for both in zip(weights, vectors, strict=True)
    ]
    return unit(torch.stack(means).mean(dim=0))


def fits(tok: Tokenizer, template: str, part: str, most: int) -> bool:
    return len(tok.encode(template.replace("{text}", part))) <= most


@pytest.mark.parametrize("templates", [["{text}"], [EOL], [EOL, "Query: {text}"]], ids=len)
def test_chunk_mean_is_the_weighted_mean_of_texts_that_fit(templates: list[str]) -> None:
    made = recipe("qwen3", long_text="chunk_mean", templates=templates, span="last_token")
    tok, model = tiny_tokenizer("qwen"), making.model("qwen3")
    tok.post_processor = processors.ByteLevel(trim_offsets=False)  # blanks are tokens' own
    expected = [chunk_mean(tok, model, text, templates, 60) for text in TEXTS]
    encoded = encode("qwen3", made)
    agree(encoded.embeddings, expected)
    assert encoded.lines is None
    for how in ({"padding_side": "left"}, {"tokens_per_microbatch": 1}):
        agree(encode("qwen3", made, **how).embeddings, expected)


def late_chunk(
    tok: Tokenizer, model: PreTrainedModel, text: str, span: str, pool: Callable[[Tensor], Tensor]
) -> tuple[list[Tensor], list[list[int]]]:
    """One forward, its text tokens in even parts of sixty at most, and the characters of each."""
    encoding = tok.encode(text)
    mine = [t for t, special in enumerate(encoding.special_tokens_mask) if not special]
    hidden = run(model, encoding.ids)[-1]
    count = -(-len(mine) // 60)
    edges = [mine[0], *(mine[len(mine) * k // count] for k in range(1, count)), mine[-1] + 1]
    chars = [0, *(encoding.offsets[edge][0] for edge in edges[1:-1]), len(text)]
    if span == "all":
        edges = [0, *edges[1:-1], len(encoding.ids)]
    vectors = [unit(pool(hidden[a:b])) for a, b in pairwise(edges)]
    return vectors, [list(pair) for pair in pairwise(chars)]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("span", "pooling", "pool"),
    [
        ("all", "mean", lambda hidden: hidden.mean(dim=0)),
        ("text", "max", lambda hidden: hidden.amax(dim=0)),
    ],
)
def test_late_chunk_is_one_forward_pooled_in_parts(
    name: str, span: str, pooling: str, pool: Callable[[Tensor], Tensor]
) -> None:
    made = recipe(name, long_text="late_chunk", span=span, pooling=pooling)
    tok, model = tiny_tokenizer(FAMILIES[name]), making.model(name)
    if name == "qwen3":  # blanks are tokens' own
        tok.post_processor = processors.ByteLevel(trim_offsets=False)
    vectors, chars = zip(*(late_chunk(tok, model, t, span, pool) for t in TEXTS), strict=True)
    encoded = encode(name, made)
    expected = [one for text in vectors for one in text]
    agree(encoded.embeddings, expected)
    assert encoded.lines is not None
    assert encoded.lines.counts.tolist() == [len(text) for text in vectors]
    assert encoded.lines.counts[0] > 1
    assert encoded.lines.chars is not None
    assert encoded.lines.chars.tolist() == [pair for text in chars for pair in text]
    assert encoded.stats["distinct_views"] == len(expected) - 1
    for how in ({"padding_side": "left"}, {"tokens_per_microbatch": 1}):
        agree(encode(name, made, **how).embeddings, expected)


def test_a_template_before_a_text_in_parts_is_run_once() -> None:
    """Its keys and values are shared, and the spans lie where they lay."""
    made = recipe("llama", long_text="late_chunk", span="text", templates=["It says today: {text}"])
    encoded = encode("llama", made)
    whole = making.model("llama")
    tok = tiny_tokenizer("llama")
    assert encoded.stats["prefix_tokens_saved"] > 0
    start = len("It says today: ")
    encoding = tok.encode("It says today: " + TEXTS[0])
    mine = [t for t, (_, end) in enumerate(encoding.offsets) if end > start]
    hidden = run(whole, encoding.ids)[-1][mine]
    count = int(encoded.lines.counts[0]) if encoded.lines else 0
    edges = [len(mine) * k // count for k in range(count + 1)]
    expected = [unit(hidden[a:b].mean(dim=0)) for a, b in pairwise(edges)]
    agree(encoded.embeddings[:count], expected)


@pytest.mark.parametrize("long_text", ["truncate", "chunk_mean"])
def test_kept_views_are_those_of_each_template_alone(long_text: str) -> None:
    templates = [EOL, "Query: {text}", "{text}"]
    knobs = {"span": "last_token", "long_text": long_text}
    texts = TEXTS if long_text == "truncate" else TEXTS[1:2]
    kept = encode("llama", recipe("llama", templates=templates, aggregation="keep", **knobs), texts)
    for view, template in enumerate(templates):
        alone = encode("llama", recipe("llama", templates=[template], **knobs), texts)
        np.testing.assert_allclose(kept.embeddings[view::3], alone.embeddings, atol=1e-5)
    assert kept.lines is not None
    assert kept.lines.counts.tolist() == [3] * len(texts)


@contextmanager
def breaking(encoder: Encoder, token: int) -> Iterator[None]:
    """Within it the model raises whenever a token goes in."""

    def hook(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if (kwargs["input_ids"] == token).any():
            raise ValueError("bad kernel")

    handle = encoder.backbone.model.register_forward_pre_hook(hook, with_kwargs=True)
    yield
    handle.remove()


@pytest.mark.parametrize("knobs", [{"long_text": "chunk_mean"}, {"long_text": "late_chunk"}])
def test_a_part_that_fails_fails_its_text_and_no_other(knobs: dict[str, Any]) -> None:
    made = recipe("llama", **knobs)
    tokenizer = ViewTokenizer(tiny_tokenizer("llama"), made, positions=2000)
    encoder = Encoder(backbone("llama"), made)
    texts = [TEXTS[0], f"{TEXTS[0]} 日 {TEXTS[0]}", TEXTS[1], TEXTS[2]]
    told: list[tuple[int, int]] = []
    views = tokenizer.views(texts)
    with breaking(encoder, tiny_tokenizer("llama").token_to_id("<0xE6>")):
        encoded = encoder.encode_views(views, on_progress=lambda *done: told.append(done))
    assert encoded.failed == {1: ("model_error", "ValueError: bad kernel")}
    edges = encoded.line_offsets
    lost = np.isnan(encoded.embeddings).all(axis=1)
    assert lost[edges[1] : edges[2]].all()
    assert lost.sum() == edges[2] - edges[1]
    assert told[-1] == (4, views.lengths.sum())
    assert [texts for texts, _ in told] == sorted(texts for texts, _ in told)
    whole = encoder.encode_views(views).embeddings
    np.testing.assert_allclose(encoded.embeddings[~lost], whole[~lost], atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


def encoder_in(folder: Path, **knobs: Any) -> Encoder:
    values = {"model": str(folder), "max_tokens": 24, "dtype": "float32", **knobs}
    return Encoder.from_recipe(recipe_from(values, {}), device="cpu")


def test_the_encoder_gives_the_views_that_are_kept(folder: Path) -> None:
    encoder = encoder_in(folder, templates=["{text}", "Query: {text}"], aggregation="keep")
    vectors = encoder.encode(["a fox", "the river"])
    assert vectors.shape == (2, 2, 32)
    plain = encoder_in(folder).encode(["a fox", "the river"])
    np.testing.assert_allclose(vectors[:, 0], plain, atol=1e-5)
    assert encoder.encode([]).shape[0] == 0


def test_the_encoder_gives_the_parts_of_a_long_text(folder: Path) -> None:
    """As far as the model's own positions reach, which are eighty."""
    encoder = encoder_in(folder, long_text="late_chunk")
    text = "the fox " * 60
    vectors, lines = encoder.encode_parts(["a fox", text])
    assert lines.counts.tolist() == [1, 4]
    assert lines.chars is not None
    assert lines.chars[0].tolist() == [0, 5]
    assert lines.chars[-1, 1] < len(text)
    assert np.array_equal(encoder.encode(["a fox"]), vectors[:1])
    with pytest.raises(InputError, match=r"text number 1 has 4 parts.*encode_parts"):
        encoder.encode(["a fox", text])


@pytest.mark.parametrize("long_text", ["truncate", "chunk_mean"])
def test_other_texts_have_one_part_each(folder: Path, long_text: str) -> None:
    encoder = encoder_in(folder, long_text=long_text)
    vectors, lines = encoder.encode_parts(["a fox", "the fox " * 30])
    assert lines.counts.tolist() == [1, 1]
    assert np.array_equal(encoder.encode(["a fox", "the fox " * 30]), vectors)
