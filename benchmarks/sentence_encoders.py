"""Ours against sentence-transformers on the same texts, weights, dtype and cores, in turns.

The peer is one `SentenceTransformer.encode` on all cores, and its own multi-process pool, each with
the best of several batch sizes; ours is single-thread encoders in as many processes, as a job runs
them. Time is from texts to vectors: tokenizing is in it on both sides.

    python -m benchmarks.sentence_encoders [--rows 4096] [--llm-rows 192] [--rounds 3]
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks.measuring.claims import Claim, report
from benchmarks.measuring.encoders import (
    PROMPT,
    Batch,
    minilm_peer,
    minilm_recipe,
    our_encode,
    peer_encode,
    peer_pool,
    prompteol_peer,
    prompteol_recipe,
)
from benchmarks.measuring.machine import watched
from benchmarks.measuring.texts import corpus, duplicates, sample
from benchmarks.measuring.turns import least_cosine, quickest, take_turns
from benchmarks.measuring.workers import Workers
from embedjob.config.recipe import Recipe

PACKAGES = ("torch", "transformers", "tokenizers", "sentence-transformers")


@dataclass(frozen=True)
class Workload:
    """A model on both sides, its texts, and the floor for our ratio to one `encode`."""

    name: str
    recipe: Callable[[], Recipe]
    peer: Callable[[], Any]
    rows: int
    template: str
    batch_sizes: Sequence[int]
    floor: float


def workloads(asked: argparse.Namespace) -> list[Workload]:
    """What is compared."""
    return [
        Workload(
            "all-MiniLM, Quora",
            minilm_recipe,
            minilm_peer,
            asked.rows,
            "{text}",
            (16, 32, 64, 128),
            floor=1.6,
        ),
        Workload(
            "SmolLM2 PromptEOL, Quora",
            prompteol_recipe,
            prompteol_peer,
            asked.llm_rows,
            PROMPT,
            (8, 16, 32),
            floor=1.2,
        ),
    ]


def compare(work: Workload, asked: argparse.Namespace) -> tuple[list[Claim], dict[str, float]]:
    """Our ratios to one `encode` and to the pool, and what they rest on."""
    texts = sample(corpus("quora"), work.rows)
    rendered = [work.template.format(text=text) for text in texts]
    few = rendered[: max(8, len(texts) // 8)]
    cores = asked.threads
    single = Workers(partial(peer_encode, work.peer), count=1, threads=cores).ready()
    size = quickest(work.batch_sizes, lambda size: single(Batch(few, size)))
    several = Workers(partial(peer_pool, work.peer, processes=cores), count=1, threads=1).ready()
    # Several chunks per process, so that none waits long for the other at the end.
    chunk = len(texts) // (4 * cores) + 1
    settings = [Batch([], size, len(few) // (2 * cores) + 1) for size in work.batch_sizes]
    best = quickest(settings, lambda one: several(one._replace(texts=few)))
    ours = Workers(partial(our_encode, work.recipe()), count=cores, threads=1).ready()
    # One each: a job's chunks are larger still.
    share = -(-len(texts) // cores)
    chunks = [texts[start : start + share] for start in range(0, len(texts), share)]
    ways = {
        "one encode": lambda: single(Batch(rendered, size)),
        "pool": lambda: several(Batch(rendered, best.batch_size, chunk)),
        "ours": lambda: np.concatenate(ours.map(chunks)),
    }
    ours.map([few[:4]] * 4 * cores)
    turns = take_turns(ways, rounds=asked.rounds)
    several(None)
    for workers in (single, several, ours):
        workers.end()
    claims = [
        Claim(
            f"{work.name}, against {peer}",
            turns.ratio(peer, "ours"),
            spread=turns.ratios(peer, "ours"),
            floor=floor,
            cosine=least_cosine(turns.results[peer], turns.results["ours"]),
        )
        for peer, floor in (("one encode", work.floor), ("pool", None))
    ]
    figures = {f"{work.name}, {way}, rows/s": len(texts) / turns.median(way) for way in ways}
    figures |= {
        f"{work.name}, duplicates": duplicates(texts),
        f"{work.name}, one encode, batch size": size,
        f"{work.name}, pool, batch size": best.batch_size,
    }
    return claims, figures


def main() -> None:
    """Prints every figure, and all of them as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096, help="texts for all-MiniLM")
    parser.add_argument("--llm-rows", type=int, default=192, help="texts for SmolLM2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="cores that each side may use")
    asked = parser.parse_args()
    claims: list[Claim] = []
    figures: dict[str, float] = {}
    with watched(PACKAGES, threads=asked.threads) as machine:
        for work in workloads(asked):
            found, measured = compare(work, asked)
            claims += found
            figures |= measured
    report(claims, figures, asked=vars(asked), machine=machine)


if __name__ == "__main__":
    main()
