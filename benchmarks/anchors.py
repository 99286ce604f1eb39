"""Anchors: what a text's shared keys and values save, beside what the counts of tokens say.

    python -m benchmarks.anchors [--questions 4] [--articles 2] [--rounds 3] [--threads 1]

`method: trajectories` with SmolLM2-135M, float32: 40 anchors of up to 20 tokens, which the model
has sampled after 40 questions, and the mean log-probability of each after every text. In turns:

- "no sharing": each text goes through the model whole before each of its anchors, which for a text
  of L tokens and C anchors of A tokens are C x (L + A) tokens.
- "ours": a text once, and all of its anchors after it: L + C x A tokens.

Both are the same encoder, the same micro-batches, and the same head, which runs in both for nothing
but the states that predict a token of an anchor; the state before the first tokens of all anchors
is one state in ours. Keys and values are shared in the body, and the head's work is the same in
both: the ratio of their times outside of the head must be within a fifth of the ratio of their
tokens as the encoder counts them, and so must that of all their time. The seconds are the process'
own.

The texts are questions of Quora and the first 60 words of articles of Reuters.

"Every logit" is reported without a bound, and left out with `--no-loop`: the loop that a reader of
the paper would write, with transformers alone, a text's C sequences in one batch, the logits of all
of their tokens, and log_softmax over the whole vocabulary.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.measuring.claims import Claim, report
from benchmarks.measuring.encoders import Vectors, without_sharing
from benchmarks.measuring.machine import watched
from benchmarks.measuring.sampled_anchors import trajectories_recipe
from benchmarks.measuring.texts import SMOLLM, corpus, distinct
from benchmarks.measuring.turns import Turns, least_cosine, take_turns
from embedjob.encoder.backbone import load_backbone
from embedjob.encoder.encoder import Encoder
from embedjob.models.source import ModelSource, materialize
from embedjob.models.tokenizer import load_tokenizer
from embedjob.text.views import TokenViews
from embedjob.vectors.encoded import Encoded

PACKAGES = ("torch", "transformers", "tokenizers")
# The share of what tokens say that the time must give.
LEAST = 0.8
# Of an article: whole ones of 500 tokens take minutes without sharing.
WORDS = 60


class HeadClock:
    """The process' own seconds in a language-model head."""

    def __init__(self, head: Any) -> None:
        """Stand before the head's `logits`."""
        self.seconds = 0.0
        self._logits = head.logits
        head.logits = self

    def __call__(self, states_ND: torch.Tensor) -> torch.Tensor:
        """The head's logits."""
        started = time.process_time()
        found: torch.Tensor = self._logits(states_ND)
        self.seconds += time.process_time() - started
        return found


@torch.inference_mode()
def every_logit(model: Any, views: TokenViews) -> Vectors:
    """The mean log-probability of each anchor after each text, as a plain loop finds it."""
    per_text = views.views_per_text
    found = np.empty(len(views.prefix), np.float32)
    for first in range(0, len(found), per_text):
        rows = [views.full_ids(first + number).astype(np.int64) for number in range(per_text)]
        ids_VT = np.zeros((per_text, max(map(len, rows))), np.int64)
        for row, ids in zip(ids_VT, rows, strict=True):
            row[: len(ids)] = ids
        logits_VTW = model(input_ids=torch.from_numpy(ids_VT), use_cache=False).logits
        next_VT1 = torch.from_numpy(ids_VT[:, 1:, None])
        scores_VT = logits_VTW[:, :-1].log_softmax(dim=-1).gather(2, next_VT1)[:, :, 0]
        for number in range(per_text):
            start, stop = views.span[first + number].tolist()
            found[first + number] = float(scores_VT[number, start : stop - 1].mean())
    return found.reshape(-1, per_text)


def loaded() -> Any:
    """The model as transformers has it, with its head."""
    folder = materialize(ModelSource(SMOLLM))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def compared(
    name: str, texts: Sequence[str], encoder: Encoder, model: Any, asked: argparse.Namespace
) -> tuple[list[Claim], dict[str, Any]]:
    """The ratios of some texts: of time, of tokens, and the one over the other."""
    shared = load_tokenizer(encoder.recipe).views(texts)
    clock = HeadClock(encoder.backbone.head)
    heads: dict[str, list[float]] = {"no sharing": [], "ours": []}
    counts: dict[str, float] = {}

    def way(which: str, views: TokenViews) -> Callable[[], Vectors]:
        def run() -> Vectors:
            clock.seconds = 0.0
            found: Encoded = encoder.encode_views(views)
            heads[which].append(clock.seconds)
            counts[which] = found.stats["forward_tokens"]
            return found.embeddings

        return run

    ways = {"no sharing": way("no sharing", without_sharing(shared)), "ours": way("ours", shared)}
    if model is not None:
        ways["every logit"] = lambda: every_logit(model, shared)
    turns = take_turns(ways, rounds=asked.rounds, clock=time.process_time)
    faster, fewer = turns.ratio("no sharing", "ours"), counts["no sharing"] / counts["ours"]
    one, other = (turns.results[which] for which in ("no sharing", "ours"))
    bodies = Turns(
        {
            which: [whole - head for whole, head in zip(turns.seconds[which], own, strict=True)]
            for which, own in heads.items()
        }
    )
    claims = [
        Claim(
            f"anchors, {name}: ratio of time outside of the head over ratio of tokens",
            bodies.ratio("no sharing", "ours") / fewer,
            spread=[ratio / fewer for ratio in bodies.ratios("no sharing", "ours")],
            floor=LEAST,
            cosine=least_cosine(one, other),
        ),
        Claim(
            f"anchors, {name}: ratio of time over ratio of tokens",
            faster / fewer,
            spread=[ratio / fewer for ratio in turns.ratios("no sharing", "ours")],
            floor=LEAST,
            cosine=least_cosine(one, other),
        ),
    ]
    if model is not None:
        loop = Claim(
            f"anchors, {name}: time of every logit over ours",
            turns.ratio("every logit", "ours"),
            spread=turns.ratios("every logit", "ours"),
            cosine=least_cosine(turns.results["every logit"], other),
        )
        claims.append(loop)
    own = (shared.lengths - (shared.span[:, 1] - shared.span[:, 0] - 1)).reshape(len(texts), -1)
    return claims, {
        f"{name}, tokens of a text": float(own[:, 0].mean()),
        f"{name}, ratio of tokens": fewer,
        f"{name}, ratio of time": faster,
        f"{name}, largest difference of two scores": float(np.abs(one - other).max()),
        **{
            f"{name}, {which}, share of the head": 1 - bodies.median(which) / turns.median(which)
            for which in heads
        },
        **{
            f"{name}, {which}, CPU seconds a text": turns.median(which) / len(texts)
            for which in turns.seconds
        },
    }


def main() -> None:
    """Prints every figure, and all of them as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--articles", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-loop", action="store_true")
    asked = parser.parse_args()
    articles = distinct(corpus("reuters"), asked.articles)
    texts = {
        "Quora": distinct(corpus("quora"), asked.questions),
        "Reuters": [" ".join(article.split()[:WORDS]) for article in articles],
    }
    torch.set_num_threads(asked.threads)
    claims: list[Claim] = []
    figures: dict[str, Any] = {}
    with watched(PACKAGES, threads=asked.threads) as machine:
        recipe = trajectories_recipe(distinct(corpus("quora"), 1000), model=SMOLLM)
        encoder = Encoder(load_backbone(recipe, device=torch.device("cpu")), recipe)
        encoder.encode(["one"])
        model = None if asked.no_loop else loaded()
        for name, some in texts.items():
            if some:
                found, measured = compared(name, some, encoder, model, asked)
                claims += found
                figures |= measured
    report(claims, figures, asked=vars(asked), machine=machine)


if __name__ == "__main__":
    main()
