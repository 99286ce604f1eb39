"""LLM encoders on a GPU: tokens per second, utilisation, sentence-transformers, prefix reuse.

Llama-shaped random weights in bfloat16, last-token vectors. Utilisation is the FLOPs that the own
tokens of the texts need, per second, over those of a plain matrix product measured in the same run.
The peer is `SentenceTransformer.encode` with a copy of the weights and the best of several batch
sizes; it pads, since flash-attn is not among our requirements. Both sides start from texts; our
rate from token views, as a job's actors get them, is told apart.

    python -m benchmarks.gpu.llama [--sizes 0.6B 1.5B 7B] [--tokens 1000000] [--rounds 3] [--tiny]
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import making
from benchmarks.measuring.claims import Claim, report
from benchmarks.measuring.turns import least_cosine, take_turns
from embedjob.config.recipe import Recipe
from embedjob.encoder.backbone import Backbone
from embedjob.encoder.encoder import Encoder
from embedjob.models.tokenizer import load_tokenizer
from embedjob.text.views import TokenViews, assemble

# As much work for every size: a larger model gets fewer tokens.
SHARES = {"0.6B": 1.0, "1.5B": 1 / 3, "7B": 1 / 15, "tiny": 1 / 1000}
BATCH_SIZES = (16, 64, 256)
LENGTHS = ("64", "lognormal", "512", "2048")
UTILISATION = {("0.6B", "512"): 0.55, ("7B", "512"): 0.70}
LEAST_COSINE = 0.999
PREFIX, AFTER = 1000, 64
Part = tuple[list[Claim], dict[str, Any]]


def recipe(where: str, template: str = "{text}") -> Recipe:
    """Last-token vectors."""
    return Recipe(
        model=where,
        templates=(template,),
        span="last_token",
        attention="causal",
        max_tokens=4096,
        dtype="bfloat16",
    )


def compare(where: str, model: Any, kind: str, asked: argparse.Namespace) -> Part:
    """Ours and sentence-transformers on texts of one kind of length."""
    size = asked.size
    tokens, most = int(asked.tokens * SHARES[size]), 64 if asked.tiny else 2048
    texts = making.texts(making.lengths(kind, tokens, most=most))
    counts = [len(text) for text in texts]
    asks = recipe(where)
    turns, best = making.side_by_side(
        model, asks, texts, pooling="lasttoken", sizes=BATCH_SIZES, rounds=asked.rounds
    )
    needed = making.flops(model, counts, causal=True)
    used = needed / turns.median("ours, from views") / asked.matmul
    name = f"{size}, {kind} tokens"
    claims = [
        Claim(
            f"{name}, against sentence-transformers",
            turns.ratio("peer", "ours"),
            spread=turns.ratios("peer", "ours"),
            floor=2.0 if kind == "lognormal" else None,
            cosine=least_cosine(turns.results["peer"], turns.results["ours"]),
            least_cosine=LEAST_COSINE,
        ),
        Claim(f"{name}, FLOP utilisation", used, floor=UTILISATION.get((size, kind))),
    ]
    rates = {f"{name}, {way}, tokens/s": sum(counts) / turns.median(way) for way in turns.seconds}
    return claims, rates | {f"{name}, peer's batch size": best, f"{name}, texts": len(texts)}


def reuse(where: str, model: Any, asked: argparse.Namespace) -> Part:
    """What a shared prefix brings, beside what the numbers of tokens say that it should."""
    prefix, after = (32, 8) if asked.tiny else (PREFIX, AFTER)
    count = max(8, int(asked.tokens * SHARES[asked.size]) // (prefix + after))
    asks = recipe(where, making.texts([prefix], seed=2)[0].strip() + " {text}")
    shared = load_tokenizer(asks).views(making.texts([after] * count))
    plain = without_sharing(shared)
    encoder = Encoder(Backbone(model, attention="causal"), asks)
    # All of them: the token budget is searched for in the first pass that is long enough.
    encoder.encode_views(plain)
    encoder.encode_views(shared)
    turns = take_turns(
        {
            "no reuse": lambda: encoder.encode_views(plain),
            "ours": lambda: encoder.encode_views(shared),
        },
        rounds=asked.rounds,
    )
    tokens = {way: found.stats["forward_tokens"] for way, found in turns.results.items()}
    measured, predicted = turns.ratio("no reuse", "ours"), tokens["no reuse"] / tokens["ours"]
    name = f"{asked.size}, prefix of {prefix} before texts of {after}"
    claim = Claim(
        f"{name}: time saved over what token counts predict",
        measured / predicted,
        spread=[one / predicted for one in turns.ratios("no reuse", "ours")],
        floor=0.85,
        cosine=least_cosine(*(found.embeddings for found in turns.results.values())),
        least_cosine=LEAST_COSINE,
    )
    return [claim], {f"{name}, times faster": measured, f"{name}, predicted": predicted}


def without_sharing(views: TokenViews) -> TokenViews:
    """The same views, each with all its ids."""
    return assemble(
        [views.full_ids(view).tolist() for view in range(len(views.prefix))],
        span=views.span,
        truncated=views.truncated,
        prefixes=[()] * views.views_per_text,
    )


def main() -> None:
    """Prints every figure, and all of them as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SHARES, default=["0.6B", "1.5B", "7B"])
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of 0.6B; fewer of larger")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: does it run?")
    asked = parser.parse_args()
    device = making.place(asked.tiny)
    if asked.tiny:
        asked.sizes = ["tiny"]
    asked.matmul = making.matmul_flops(device, torch.bfloat16, tiny=asked.tiny)
    claims: list[Claim] = []
    figures: dict[str, Any] = {"matmul, TFLOP/s": asked.matmul / 1e12}
    with tempfile.TemporaryDirectory() as work:
        where = making.folder(Path(work))
        for size in asked.sizes:
            asked.size = size
            model = making.llama(size, device, torch.bfloat16)
            parts = [
                compare(where, model, kind, asked) for kind in LENGTHS[: 2 if asked.tiny else 4]
            ]
            for found, measured in [*parts, reuse(where, model, asked)]:
                claims += found
                figures |= measured
            del model
            torch.cuda.empty_cache()
    if asked.tiny:
        claims = [claim.unbound() for claim in claims]
    report(claims, figures, asked=vars(asked), machine=making.machine(device))


if __name__ == "__main__":
    main()
