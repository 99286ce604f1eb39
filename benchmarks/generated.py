"""Spearman of what generates or samples: GenEOL and trajectories, on 200 pairs of STS-B dev.

    python -m benchmarks.generated [--pairs 200] [--only NAME ...] [--anew] [--threads 1]

The whole set would take hours here, so that all figures, PromptEOL's beside them too, are of the
same pairs, which are drawn by a seed. SmolLM2-135M-Instruct embeds, generates and samples. GenEOL
makes four texts of each, one of every kind (`generate: {count: 1}`), and is compared by cosine.
Trajectories are compared by minus their distance: by the L1 distance of their vectors, whose 40
anchors are sampled after 40 of all texts of the set, and pairwise as in the paper, by 20
continuations of each text. Figures of 200 pairs are kept as benchmarks.quality keeps its own.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.measuring.figures import keep, kept, taken_today
from benchmarks.measuring.sampled_anchors import trajectories_recipe
from benchmarks.measuring.texts import SMOLLM
from benchmarks.quality import STS, Encoders, measured, of_method, spearman
from embedjob.config.generation import TrajectorySettings
from embedjob.config.recipe import Recipe
from embedjob.encoder.encoder import Encoder
from embedjob.encoder.generator import Generator
from embedjob.encoder.trajectories import Trajectories
from embedjob.job.resolve import resolve_encoder
from embedjob.models.tokenizer import load_tokenizer
from embedjob.output.fingerprint import fingerprint
from embedjob.reports.method_figures import OF_FOUR, OF_PAIRS, PAIRWISE
from embedjob.text.conversations import embedded_texts
from embedjob.text.variants import views_with_variants

SEED, PAIRS = 0, 200
Pairs = Sequence[dict[str, Any]]


def main() -> None:
    """Prints every figure, and keeps it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--only", nargs="*", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--anew", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    if not STS.exists():
        print(f"skipped: there are no pairs at {STS}")
        return
    torch.set_num_threads(asked.threads)
    lines = (STS / "stsb.dev.jsonl").read_text("utf-8").splitlines()
    every = [json.loads(line) for line in lines]
    drawn = np.random.RandomState(SEED).permutation(len(every))[: asked.pairs]
    pairs = [every[number] for number in sorted(drawn)]
    taken = kept().get(OF_PAIRS, {}) if asked.pairs == PAIRS else {}
    for name in asked.only:
        if asked.anew or name not in taken:
            found = {**COLUMNS[name](pairs, every), **taken_today("torch", "transformers")}
            taken[name] = {**found, "threads": asked.threads}
            if asked.pairs == PAIRS:
                # Read again: another column may have been taken meanwhile, which can be an hour.
                figures = kept()
                figures.setdefault(OF_PAIRS, {})[name] = taken[name]
                keep(figures)
        print(f"{name:32} {taken[name]}", flush=True)


def plain(name: str) -> Callable[[Pairs, Pairs], dict[str, Any]]:
    """A method that runs the model as it is, as benchmarks.quality measures it."""

    def measure(pairs: Pairs, every: Pairs) -> dict[str, Any]:
        recipe = of_method(name)
        return {"recipe": _mark(recipe), **measured(recipe, list(pairs), Encoders({}, {}))}

    return measure


def geneol(pairs: Pairs, every: Pairs) -> dict[str, Any]:
    """GenEOL whose generator is the model that embeds, with one text of each kind."""
    section = {"method": "geneol", "model": SMOLLM}
    resolved = resolve_encoder(section, on_gpu=False, generate={"count": 1})
    recipe = resolved.recipes["symmetric"]
    texts, said = _texts(pairs), [0, 0]
    generator = Generator.from_recipe(recipe, device="cpu")
    encoder = Encoder.from_recipe(recipe, device="cpu")
    clock = Clock()

    def answered(answers: int, tokens: int) -> None:
        said[:] = answers, tokens

    made = generator.generate(texts, answered=answered)
    generating = clock.costs()["cpu_seconds"]
    variants = [embedded_texts(*one) for one in zip(texts, made, strict=True)]
    views = views_with_variants(load_tokenizer(recipe), texts, variants)
    vectors = encoder.encode_views(views).embeddings
    empty = sum(not one.text for some in made for one in some)
    same = sum(one.text == text for text, some in zip(texts, made, strict=True) for one in some)
    return {
        "recipe": _mark(recipe),
        "spearman": spearman(vectors, texts, list(pairs)),
        **clock.costs(),
        "generating_cpu_seconds": generating,
        "generated_texts": said[0],
        "generated_tokens": said[1],
        "generated_nothing": empty,
        "generated_the_text_itself": same,
    }


def trajectories(pairs: Pairs, every: Pairs) -> dict[str, Any]:
    """Vectors of anchors that are sampled after 40 of all texts of the set."""
    clock = Clock()
    recipe = trajectories_recipe(_texts(every), model=SMOLLM)
    sampling = clock.costs()["cpu_seconds"]
    texts = _texts(pairs)
    vectors = Encoder.from_recipe(recipe, device="cpu").encode(texts)
    place = {text: number for number, text in enumerate(texts)}
    left, right = (vectors[[place[pair[side]] for pair in pairs]] for side in ("s1", "s2"))
    distances = np.abs(left.astype(np.float64) - right).sum(axis=1)
    return {
        "recipe": _mark(recipe),
        "spearman": _of_distances(distances, pairs),
        **clock.costs(),
        "sampling_cpu_seconds": sampling,
    }


def pairwise(pairs: Pairs, every: Pairs) -> dict[str, Any]:
    """The exact distance of the paper."""
    clock = Clock()
    settings = TrajectorySettings()
    compared = Trajectories.load(SMOLLM, settings, device="cpu")
    left, right = ([pair[side] for pair in pairs] for side in ("s1", "s2"))
    distances = compared.distances(left, right)
    return {"spearman": _of_distances(distances, pairs), **clock.costs()}


class Clock:
    """The seconds since it was made, the process' own and all."""

    def __init__(self) -> None:
        """Start."""
        self._started, self._before = time.perf_counter(), time.process_time()

    def costs(self) -> dict[str, Any]:
        """The seconds so far."""
        seconds = time.perf_counter() - self._started
        return {
            "cpu_seconds": round(time.process_time() - self._before, 1),
            "seconds": round(seconds),
        }


COLUMNS: dict[str, Callable[[Pairs, Pairs], dict[str, Any]]] = {
    "prompteol": plain("prompteol"),
    "knowledge_enhanced": plain("knowledge_enhanced"),
    f"trajectories{PAIRWISE}": pairwise,
    f"geneol{OF_FOUR}": geneol,
    "trajectories": trajectories,
}


def _texts(pairs: Pairs) -> list[str]:
    return sorted({pair[side] for pair in pairs for side in ("s1", "s2")})


def _of_distances(distances: np.ndarray, pairs: Pairs) -> float:
    scores = [pair["score"] for pair in pairs]
    return round(100 * float(spearmanr(-distances, scores).statistic), 2)


def _mark(recipe: Recipe) -> str:
    return fingerprint(recipe, {})[:12]


if __name__ == "__main__":
    main()
