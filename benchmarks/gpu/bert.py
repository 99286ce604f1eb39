"""A 109M BERT on a GPU at 50 and 512 tokens: tokens per second, in one process.

The best published on an H200 are 1.41M and 1.64M tokens/s (Arctic Inference, read off its chart, 32
and 4 replicas of the engine). Random weights in bfloat16, mean pooling. From texts, and from token
views as a job's actors get them; sentence-transformers with the same weights beside it.

    python -m benchmarks.gpu.bert [--tokens 4000000] [--rounds 3] [--tiny]
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import making
from benchmarks.measuring.claims import Claim, report
from benchmarks.measuring.turns import least_cosine
from embedjob.config.recipe import Recipe

BEST_PUBLISHED = {50: 1.41e6, 512: 1.64e6}
BATCH_SIZES = (64, 256, 1024)
LEAST_COSINE = 0.999


def measure(
    where: str, model: Any, length: int, asked: argparse.Namespace
) -> tuple[list[Claim], dict[str, Any]]:
    """Tokens per second at one length, beside the best published and sentence-transformers."""
    texts = making.texts([length] * max(4, asked.tokens // length))
    asks = Recipe(model=where, attention="bidirectional", span="all", dtype="bfloat16")
    turns, best = making.side_by_side(
        model, asks, texts, pooling="mean", sizes=BATCH_SIZES, rounds=asked.rounds
    )
    tokens = length * len(texts)
    rates = {way: tokens / turns.median(way) for way in turns.seconds}
    used = making.flops(model, [length] * len(texts), causal=False)
    name = f"BERT, {length} tokens"
    claims = [
        Claim(
            f"{name}, tokens/s over the best published",
            rates["ours, from views"] / BEST_PUBLISHED[length],
            floor=1.0,
        ),
        Claim(
            f"{name}, against sentence-transformers",
            turns.ratio("peer", "ours"),
            spread=turns.ratios("peer", "ours"),
            cosine=least_cosine(turns.results["peer"], turns.results["ours"]),
            least_cosine=LEAST_COSINE,
        ),
    ]
    figures = {f"{name}, {way}, tokens/s": rate for way, rate in rates.items()}
    figures |= {
        f"{name}, FLOP utilisation": used / turns.median("ours, from views") / asked.matmul,
        f"{name}, peer's batch size": best,
    }
    return claims, figures


def main() -> None:
    """Prints every figure, and all of them as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: does it run?")
    asked = parser.parse_args()
    device = making.place(asked.tiny)
    if asked.tiny:
        asked.tokens = 2000
    asked.matmul = making.matmul_flops(device, torch.bfloat16, tiny=asked.tiny)
    claims: list[Claim] = []
    figures: dict[str, Any] = {"matmul, TFLOP/s": asked.matmul / 1e12}
    with tempfile.TemporaryDirectory() as work:
        where = making.folder(Path(work))
        model = making.bert(asked.tiny, device, torch.bfloat16)
        for length in BEST_PUBLISHED:
            found, measured = measure(where, model, length, asked)
            claims += found
            figures |= measured
    if asked.tiny:
        claims = [claim.unbound() for claim in claims]
    report(claims, figures, asked=vars(asked), machine=making.machine(device))


if __name__ == "__main__":
    main()
