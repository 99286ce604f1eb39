"""SmolLM2 under many or long prompts: what running shared tokens once brings.

Three comparisons, each in one process, in turns, on the same threads, with the same weights:

- MetaEOL (eight prompts per text, Quora) against a research-style loop: transformers, padded,
  sorted, batch 32, every view a full forward.
- A 1,000-token few-shot prefix before Quora questions, with it run once and with it run per text.
- Eight text-first views of Reuters articles against one view of the same articles.

    python -m benchmarks.metaeol [--rows 32] [--few-shot-rows 12] [--articles 24] [--rounds 2]
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoModel, AutoTokenizer

from benchmarks.measuring.claims import Claim, report
from benchmarks.measuring.encoders import Vectors, without_sharing
from benchmarks.measuring.machine import watched
from benchmarks.measuring.texts import SMOLLM, corpus, distinct, sample
from benchmarks.measuring.turns import least_cosine, take_turns
from embedjob.config.recipe import Recipe
from embedjob.encoder.backbone import Backbone, load_backbone
from embedjob.encoder.encoder import Encoder
from embedjob.models.source import ModelSource, materialize
from embedjob.models.tokenizer import load_tokenizer

PACKAGES = ("torch", "transformers", "tokenizers")
METAEOL = Path(__file__).parents[1] / "embedjob" / "methods" / "metaeol.yaml"
EXAMPLE = (
    'This sentence : "How can I learn to play the guitar at home?" means in one word:"Music". '
)
EOL = 'This sentence : "{text}" '
TAILS = (
    'means in one word:"',
    'is, in one word, about:"',
    'can be summarised in one word:"',
    'describes, in one word, the action of:"',
    'has, in one word, the mood of:"',
    'names, in one word, the place:"',
    'asks, in one word, for:"',
    'belongs, in one word, to the topic of:"',
)
Part = tuple[list[Claim], dict[str, float]]


@dataclass(frozen=True)
class Research:
    """MetaEOL as its authors' loop runs it, sorted by length as any careful user would."""

    model: Any
    tokenizer: Any
    batch_size: int = 32

    def encode(self, texts: Sequence[str], templates: Sequence[str]) -> Vectors:
        """The mean of the last tokens' states over all templates, of unit norm."""
        each = [self.view([one.format(text=text) for text in texts]) for one in templates]
        mean = np.mean(each, axis=0)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    @torch.inference_mode()
    def view(self, prompts: list[str]) -> Vectors:
        """The last token's state of every prompt."""
        order = sorted(range(len(prompts)), key=lambda one: -len(prompts[one]))
        found = np.empty((len(prompts), self.model.config.hidden_size), np.float32)
        for start in range(0, len(order), self.batch_size):
            which = order[start : start + self.batch_size]
            batch = self.tokenizer(
                [prompts[one] for one in which],
                padding=True,
                padding_side="left",
                return_tensors="pt",
            )
            found[which] = self.model(**batch, use_cache=False).last_hidden_state[:, -1].numpy()
        return found


def recipe(templates: Sequence[str]) -> Recipe:
    """Last-token vectors of SmolLM2 under these templates, their mean."""
    return Recipe(
        model=SMOLLM,
        templates=tuple(templates),
        span="last_token",
        max_tokens=2048,
        dtype="float32",
    )


def warm(encoder: Encoder) -> Encoder:
    """The encoder after its first texts: what comes once per actor is then done."""
    encoder.encode(["one", "another text"])
    return encoder


def metaeol(backbone: Backbone, asked: argparse.Namespace) -> Part:
    """MetaEOL against the research-style loop."""
    document = yaml.safe_load(METAEOL.read_text(encoding="utf-8"))
    templates = document["encoder"]["templates"]
    texts = sample(corpus("quora"), asked.rows)
    folder = materialize(ModelSource(SMOLLM))
    loop = Research(
        AutoModel.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    loop.tokenizer.pad_token = loop.tokenizer.pad_token or loop.tokenizer.eos_token
    ours = warm(Encoder(backbone, recipe(templates)))
    loop.encode(texts[:1], templates)
    return _part(
        "MetaEOL, 8 views, Quora, against the research-style loop",
        {"loop": lambda: loop.encode(texts, templates), "ours": lambda: ours.encode(texts)},
        asked,
        floor=3.0,
        rows=len(texts),
    )


def few_shot(backbone: Backbone, asked: argparse.Namespace) -> Part:
    """A long prefix with and without reuse."""
    asks = recipe([EXAMPLE * 42 + EOL + TAILS[0]])
    shared = load_tokenizer(asks).views(sample(corpus("quora"), asked.few_shot_rows))
    plain = without_sharing(shared)
    encoder = warm(Encoder(backbone, asks))
    claims, figures = _part(
        "1,000-token few-shot prefix, Quora, against no reuse",
        {
            "no reuse": lambda: encoder.encode_views(plain).embeddings,
            "ours": lambda: encoder.encode_views(shared).embeddings,
        },
        asked,
        floor=15.0,
        rows=shared.texts,
    )
    return claims, figures | {"few-shot prefix, tokens": len(shared.prefixes[0])}


def text_first(backbone: Backbone, asked: argparse.Namespace) -> Part:
    """Eight views that share their text against one."""
    texts = distinct(corpus("reuters"), asked.articles)
    eight = recipe([EOL + tail for tail in TAILS])
    one, all_eight = (warm(Encoder(backbone, r)) for r in (recipe([EOL + TAILS[0]]), eight))
    turns = take_turns(
        {"eight views": lambda: all_eight.encode(texts), "one view": lambda: one.encode(texts)},
        rounds=asked.rounds,
    )
    few = load_tokenizer(eight).views(texts[:2])
    plain = all_eight.encode_views(without_sharing(few)).embeddings
    claim = Claim(
        "8 text-first views, Reuters, time against 1 view of ours",
        turns.ratio("eight views", "one view"),
        spread=turns.ratios("eight views", "one view"),
        ceiling=2.0,
        cosine=least_cosine(plain, turns.results["eight views"][:2]),
    )
    return [claim], {
        f"Reuters, {way}, rows/s": len(texts) / turns.median(way) for way in turns.seconds
    }


def _part(
    name: str,
    ways: dict[str, Callable[[], Vectors]],
    asked: argparse.Namespace,
    *,
    floor: float,
    rows: int,
) -> Part:
    peer = next(iter(ways))
    turns = take_turns(ways, rounds=asked.rounds)
    claim = Claim(
        name,
        turns.ratio(peer, "ours"),
        spread=turns.ratios(peer, "ours"),
        floor=floor,
        cosine=least_cosine(turns.results[peer], turns.results["ours"]),
    )
    return [claim], {f"{name}, {way}, rows/s": rows / turns.median(way) for way in ways}


PARTS = {"metaeol": metaeol, "few-shot": few_shot, "text-first": text_first}


def main() -> None:
    """Prints every figure, and all of them as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32, help="questions under MetaEOL")
    parser.add_argument("--few-shot-rows", type=int, default=12)
    parser.add_argument("--articles", type=int, default=24, help="articles under text-first views")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    asked = parser.parse_args()
    corpus("quora")
    torch.set_num_threads(asked.threads)
    claims: list[Claim] = []
    figures: dict[str, float] = {}
    with watched(PACKAGES, threads=asked.threads) as machine:
        backbone = load_backbone(recipe([EOL + TAILS[0]]), device=torch.device("cpu"))
        for part in asked.parts:
            found, measured = PARTS[part](backbone, asked)
            claims += found
            figures |= measured
    report(claims, figures, asked=vars(asked), machine=machine)


if __name__ == "__main__":
    main()
