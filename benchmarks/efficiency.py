"""How near the encoder is to its own model and to the processor, and where start-up goes.

As in a job there are as many actors as cores, of one thread each, and all are busy all the time:

- The encode loop (token views to embeddings) against the bare model on micro-batches built before.
- FLOP/s of the bare model against plain matrix products with its own weights, as many rows each:
  with weights as transformers has them, and as `encoder/cpu/` joins and lays them out.

And by itself:

- The quickstart model, cached: seconds to the first committed chunk, part by part.

    python -m benchmarks.efficiency [--rows 512] [--llm-rows 96] [--rounds 21] [--starts 3]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measuring.claims import Claim, report
from benchmarks.measuring.encoders import minilm_recipe
from benchmarks.measuring.machine import watched
from benchmarks.measuring.texts import SMOLLM, corpus, distinct
from benchmarks.measuring.turns import Turns, take_turns
from benchmarks.measuring.workers import Workers
from embedjob.config.recipe import Recipe
from embedjob.encoder.batching.padding import MicroBatch, bearable_padding
from embedjob.encoder.batching.padding import pad_views as padded
from embedjob.encoder.encoder import Encoder
from embedjob.encoder.loading import load_model
from embedjob.models.source import ModelSource, materialize
from embedjob.models.tokenizer import load_tokenizer
from embedjob.text.microbatches import microbatches
from embedjob.text.views import TokenViews

PACKAGES = ("torch", "transformers", "ray", "pyarrow")
ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"
# What a job takes where a search has not found better.
BUDGET = 1024
LOOP, FORWARD, PRODUCTS, LAID_OUT = WAYS = (
    "encode loop",
    "bare forward",
    "products",
    "products, weights as laid out",
)


@dataclass(frozen=True)
class Bare:
    """A model and the micro-batches that it is run on, all built before.

    The weights [out, in] are those of every linear layer in its blocks, as transformers has them.
    """

    model: Any
    batches: list[MicroBatch]
    weights: list[Tensor]

    @torch.inference_mode()
    def forward(self) -> None:
        """Every micro-batch through the model, and nothing else."""
        for batch in self.batches:
            self.model(input_ids=batch.ids_VT, attention_mask=batch.mask_VT.long())

    def products(self) -> None:
        """The matrix products of the same layers, on as many rows: no attention, no norms."""
        self._multiply(self.weights)

    def products_as_stored(self) -> None:
        """The same with the model's own weights, laid out as its layers have them by now."""
        self._multiply(self._laid_out)

    @torch.inference_mode()
    def _multiply(self, weights: list[Tensor]) -> None:
        for batch in self.batches:
            for weight in weights:
                torch.mm(self._rows(batch)[:, : weight.shape[1]], weight.t())

    @cached_property
    def _laid_out(self) -> list[Tensor]:
        return block_weights(self.model)

    @property
    def linear_flops(self) -> float:
        """Of one pass over all micro-batches, padding included."""
        return 2.0 * sum(weight.numel() for weight in self.weights) * self.padded_tokens

    @property
    def attention_flops(self) -> float:
        """Of the two products in the attention; causal attention needs half of each."""
        config = self.model.config
        width = config.num_attention_heads * (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        causal = 0.5 if config.model_type == "llama" else 1.0
        squares = sum(batch.ids_VT.shape[0] * batch.ids_VT.shape[1] ** 2 for batch in self.batches)
        return causal * 4.0 * width * config.num_hidden_layers * squares

    @property
    def padded_tokens(self) -> int:
        """Tokens of all micro-batches, padding included."""
        return sum(batch.ids_VT.numel() for batch in self.batches)

    @cached_property
    def _wide(self) -> Tensor:
        most = max(batch.ids_VT.numel() for batch in self.batches)
        return torch.randn(most, max(weight.shape[1] for weight in self.weights))

    def _rows(self, batch: MicroBatch) -> Tensor:
        return self._wide[: batch.ids_VT.numel()]


def bare(encoder: Encoder, recipe: Recipe, views: TokenViews) -> Bare:
    """The encoder's own model, on the micro-batches that it would make of these views."""
    bearable = bearable_padding(encoder.backbone.device)
    groups = microbatches(views.lengths, budget=BUDGET, bearable_padding=bearable)
    return Bare(
        encoder.backbone.model,
        batches=[padded(views, which) for which in groups],
        weights=block_weights(load_model(recipe, device=encoder.backbone.device).model),
    )


def block_weights(model: nn.Module) -> list[Tensor]:
    """The weight [out, in] of every linear layer in a model's blocks."""
    # A pooler is not in the blocks.
    layers = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=lambda m: len(m))
    return [weight for weight in layers.parameters() if weight.ndim == 2]


@dataclass(frozen=True)
class Work:
    """A model, the texts that every actor is given, and how often each way is taken.

    `near` is the least share of plain products' FLOP/s that its forward must reach.
    """

    name: str
    recipe: Recipe
    texts: list[str]
    rounds: int
    near: float


@dataclass(frozen=True)
class Found:
    """The seconds of every turn of each way, and what was computed in one."""

    turns: Turns[Any]
    tokens: int
    padded_tokens: int
    linear_flops: float
    attention_flops: float


def actor() -> Callable[[Work], Found]:
    """What one process does, as an actor of the job would be: all of its turns."""
    return _in_turns


def _in_turns(work: Work) -> Found:
    encoder = Encoder.from_recipe(
        work.recipe, device="cpu", tokens_per_microbatch=BUDGET, threads=1
    )
    views = load_tokenizer(work.recipe).views(work.texts)
    model = bare(encoder, work.recipe, views)
    encoder.encode_views(views.take(range(min(8, len(work.texts)))))
    model.products()
    model.products_as_stored()
    ways = {LOOP: lambda: encoder.encode_views(views).stats and None}
    ways |= {FORWARD: model.forward, PRODUCTS: model.products, LAID_OUT: model.products_as_stored}
    return Found(
        turns=take_turns(ways, rounds=work.rounds),
        tokens=int(views.lengths.sum()),
        padded_tokens=model.padded_tokens,
        linear_flops=model.linear_flops,
        attention_flops=model.attention_flops,
    )


def measure(actors: Workers, count: int, work: Work) -> tuple[list[Claim], Any]:
    """Both ratios of one model, over the turns of all actors, and what they rest on."""
    found = actors.map([work] * count)
    each = {way: [s for one in found for s in one.turns.seconds[way]] for way in WAYS}
    turns, one = Turns[Any](each), found[0]
    flops = one.linear_flops + one.attention_flops
    extra = flops / one.linear_flops
    name = work.name
    claims = [
        Claim(
            f"{name}: encode loop against its bare model",
            turns.ratio(FORWARD, LOOP),
            spread=turns.ratios(FORWARD, LOOP),
            floor=0.95,
        ),
        Claim(
            f"{name}: FLOP/s of the forward against plain matrix products",
            extra * turns.ratio(PRODUCTS, FORWARD),
            spread=[extra * ratio for ratio in turns.ratios(PRODUCTS, FORWARD)],
            floor=work.near,
        ),
        Claim(
            f"{name}: the same, weights as laid out",
            extra * turns.ratio(LAID_OUT, FORWARD),
            spread=[extra * ratio for ratio in turns.ratios(LAID_OUT, FORWARD)],
        ),
    ]
    return claims, {
        f"{name}, tokens/s of the loop": count * one.tokens / turns.median(LOOP),
        f"{name}, GFLOP/s of the forward": count * flops / turns.median(FORWARD) / 1e9,
        f"{name}, GFLOP/s of plain products": count
        * one.linear_flops
        / turns.median(PRODUCTS)
        / 1e9,
        f"{name}, padding": 1 - one.tokens / one.padded_tokens,
    }


def start_up(starts: int) -> dict[str, float]:
    """Median-run seconds of each part of a quickstart, from the start of its process."""
    materialize(ModelSource(SMOLLM))
    runs = []
    for _ in range(starts):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.efficiency", "--start-up", folder]
            done = subprocess.run(
                [*command, str(time.time())], cwd=ROOT, check=True, stdout=subprocess.PIPE
            )
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    runs.sort(key=lambda run: run["all"])
    return {f"start-up, {part}, s": value for part, value in runs[len(runs) // 2].items()}


def start_once(folder: str, born: float) -> dict[str, float]:
    """One quickstart of two chunks, and when each part of its start-up ended."""
    from embedjob import pipeline
    from embedjob.config.job_file import read_job
    from embedjob.job.options import Console, Options
    from embedjob.stages import session

    marks = {"interpreter and imports": time.time()}
    shows: list[tuple[float, int]] = []

    def marked(name: str, call: Any) -> Any:
        def timed(*given: Any, **named: Any) -> Any:
            found = call(*given, **named)
            marks.setdefault(name, time.time())
            return found

        return timed

    @contextmanager
    def connected(address: str | None) -> Iterator[bool]:
        with connect(address) as started_here:
            marks["Ray"] = time.time()
            yield started_here

    @contextmanager
    def shown(_: Any) -> Iterator[Any]:
        yield lambda tally: shows.append((time.time(), tally.actors))

    connect = session.connected
    session.connected = connected
    pipeline.plan_job = marked("plan", pipeline.plan_job)
    session.preflight_here = marked("preflight", session.preflight_here)
    sets = [f"output.path={folder}/out", "run.limit=200"]
    pipeline.embed(read_job(QUICKSTART, sets), Options(), Console(print, shown))
    # The driver looks every half second: this one mark is that coarse.
    marks["actors and model"] = next(at for at, actors in shows if actors)
    files = Path(folder, "out", "data").glob("*/*.parquet")
    marks["first chunk"] = min(file.stat().st_mtime for file in files)
    ends = [born, *sorted(marks.values())]
    parts = zip(sorted(marks, key=marks.__getitem__), ends, ends[1:], strict=False)
    return {name: stop - start for name, start, stop in parts} | {"all": ends[-1] - born}


def main() -> None:
    """Prints every figure, and all of them as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=512, help="texts for all-MiniLM")
    parser.add_argument("--llm-rows", type=int, default=96, help="texts for SmolLM2")
    parser.add_argument("--rounds", type=int, default=21, help="and a third of it for SmolLM2")
    parser.add_argument("--starts", type=int, default=3, help="quickstarts; 0 leaves them out")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--start-up", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.start_up:
        print(json.dumps(start_once(asked.start_up[0], float(asked.start_up[1]))))
        return
    questions = distinct(corpus("quora"), max(asked.rows, asked.llm_rows))
    plain = Recipe(model=SMOLLM, span="last_token", dtype="float32")
    claims: list[Claim] = []
    with watched(PACKAGES, threads=asked.actors) as machine:
        figures = start_up(asked.starts) if asked.starts else {}
        actors = Workers(actor, count=asked.actors, threads=1)
        for name, recipe, rows, rounds, near in (
            ("all-MiniLM, Quora", minilm_recipe(), asked.rows, asked.rounds, 0.75),
            ("SmolLM2, Quora", plain, asked.llm_rows, max(1, asked.rounds // 3), 0.80),
        ):
            work = Work(name, recipe, questions[:rows], rounds, near)
            found, measured = measure(actors.ready(), asked.actors, work)
            claims += found
            figures |= measured
        actors.end()
    report(claims, figures, asked=vars(asked), machine=machine)


if __name__ == "__main__":
    main()
