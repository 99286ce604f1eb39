"""Weights of words and SIF: against literal references, over texts that are cut anywhere.

Covers: embedjob.stages.fits.word_counts, embedjob.vectors.fits.rare_words
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import embedjob
from embedjob.config.job_file import job_source
from embedjob.config.pooling import WordWeights
from embedjob.errors import ConfigError, FitError, ModelError
from embedjob.input.reading import read_chunk
from embedjob.job.resolve import identify, resolve
from embedjob.output.fits.artefacts import put_artefact, read_fitted
from embedjob.output.fits.records import Record, put_record
from embedjob.stages.engine import recipe_engine
from embedjob.stages.fits.term_counts import grouped
from embedjob.stages.fits.word_counts import (
    count_words,
    counts_of,
    fitted_counts,
    no_counts,
    sum_of,
)
from embedjob.stages.tokenize import tokenize_rows
from embedjob.static.lookup_encoder import LookupEncoder
from embedjob.text.lookup.word_lookup import WordLookup
from embedjob.vectors.fits.fitted import Block, Fitted
from embedjob.vectors.fits.rare_words import (
    CommonComponentPass,
    without_common_component,
    word_counts_problem,
    word_weights,
)
from tests.running import write_shard

WORDS = ["the", "fox", "dog", "jumps", "over", "lazy", "unused"]
VECTORS = np.random.default_rng(2).normal(size=(len(WORDS), 5)).astype(np.float32)
TEXTS = ["the the fox", "The dog jumps", "over the lazy dog", "fox fox fox the", "nothing known"]
# By hand: in how many texts, and how often.
DOCUMENTS = [4, 2, 2, 1, 1, 1, 0]
OCCURRENCES = [5, 4, 2, 1, 1, 1, 0]


def counted(texts: list[str], pieces: int = 1) -> Fitted:
    lookup = WordLookup(WORDS, max_tokens=100)
    parts = [counts_of(lookup.views(texts[n::pieces]), len(WORDS)) for n in range(pieces)]
    return fitted_counts(sum_of(no_counts(len(WORDS)), *parts))


@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_texts_and_words_are_counted(pieces: int) -> None:
    found = counted(TEXTS, pieces)
    assert found.rows == len(TEXTS)
    assert found.tensors["documents"].tolist() == DOCUMENTS
    assert found.tensors["occurrences"].tolist() == OCCURRENCES
    assert word_counts_problem(found) is None


def test_a_corpus_without_a_word_of_the_table_is_refused() -> None:
    with pytest.raises(FitError, match="none of 2 texts has a word of the table"):
        counted(["nothing", ""])


def test_counts_that_were_edited_are_no_counts() -> None:
    good = counted(TEXTS)
    documents, occurrences = good.tensors["documents"], good.tensors["occurrences"]
    for tensors in (
        {"documents": documents},
        {"documents": documents[:-1], "occurrences": occurrences},
        {"documents": documents.astype(np.float32), "occurrences": occurrences},
        {"documents": documents + 9, "occurrences": occurrences + 9},
    ):
        assert word_counts_problem(Fitted("word_counts", 5, len(WORDS), tensors)) is not None


def test_weights_are_those_of_the_papers() -> None:
    counts = counted(TEXTS)
    idf = word_weights(counts, WordWeights(idf="x"))
    assert np.allclose(idf, [np.log(6 / (1 + n)) + 1 for n in DOCUMENTS])
    sif = word_weights(counts, WordWeights(sif="x", a=0.01))
    assert np.allclose(sif, [0.01 / (0.01 + n / 14) for n in OCCURRENCES])


def literal_sif(vectors: np.ndarray) -> np.ndarray:
    """As the authors' code: the first right singular vector is taken out of each row."""
    direction = np.linalg.svd(vectors.astype(np.float64), full_matrices=False)[2][0]
    return vectors - vectors @ np.outer(direction, direction)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.lists(st.integers(0, 40), max_size=4))
def test_the_common_component_is_the_first_singular_vector(
    seed: int, rows: int, cuts: list[int]
) -> None:
    vectors = np.random.default_rng(seed).normal(size=(rows, 6)).astype(np.float32) + 1
    step, keys = CommonComponentPass(), np.zeros(rows, np.uint64)
    edges = [0, *sorted(min(cut, rows) for cut in cuts), rows]
    states = [
        step.partial(Block(vectors[first:last], keys[first:last]))
        for first, last in pairwise(edges)
        if last > first
    ]
    state = states[0]
    for one in states[1:]:
        state = step.merge(state, one)
    made = without_common_component(step.finish(state), vectors)
    assert np.allclose(made, literal_sif(vectors), atol=1e-5)


def test_there_is_nothing_common_to_zeros() -> None:
    step = CommonComponentPass()
    with pytest.raises(FitError, match="zeros alone"):
        step.finish(step.partial(Block(np.zeros((3, 2), np.float32), np.zeros(3, np.uint64))))


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMBEDJOB_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "words.txt"
    path.write_text(
        "".join(
            f"{word} {' '.join(np.format_float_positional(x) for x in vector)}\n"
            for word, vector in zip(WORDS, VECTORS, strict=True)
        )
    )
    return path


def job(table: Path | str, folder: Path, **sections: Any) -> dict[str, Any]:
    return {
        "input": {"path": str(folder / "in"), "text": "body"},
        "encoder": {"model": str(table), **sections.pop("encoder", {})},
        "output": {"path": str(folder / "out")},
        **sections,
    }


COUNTS = {"kind": "word_counts", "name": "c"}


@pytest.mark.parametrize("weighting", ["idf", "sif"])
def test_a_plan_takes_the_counts_that_were_made(
    weighting: str, table: Path, tmp_path: Path
) -> None:
    """All of a run but for Ray."""
    write_shard(tmp_path / "in" / "a.parquet", [*TEXTS, None])
    encoder = {"pooling": {weighting: "c"}, "finish": [{"normalize": True}]}
    document = job(table, tmp_path, encoder=encoder, fit=[COUNTS])
    plan = embedjob.plan(document)
    [fit] = plan.fits
    assert (plan.unfitted, fit.width, fit.is_first) == (("c",), len(WORDS), True)
    engine = recipe_engine(plan.job.config, 1)
    parts = [
        count_words(group, plan.job.config.input, engine, fit.width)
        for group in grouped(plan.corpus)
    ]
    made = fitted_counts(sum_of(*parts))
    assert made.tensors["documents"].tolist() == DOCUMENTS
    out = plan.job.out
    head = put_artefact(out, made, encoder=fit.fingerprint, parameters={})
    put_record(out, Record(fit.key, 1, head.kind, head.sha256, fit.name, None))
    again = embedjob.plan(document)
    recipe = again.job.config.encoder
    assert again.unfitted == ()
    assert again.job.fingerprint != plan.job.fingerprint
    assert isinstance(recipe.pooling, WordWeights)
    assert recipe.pooling.name == head.sha256
    engine = recipe_engine(again.job.config, 1)
    rows = read_chunk(again.chunks[0], again.job.config.input)
    _, views = tokenize_rows(rows, engine.load_tokenizer(), engine.long_text)
    encoded = engine.load_encoder().encode_views(
        views, stop=lambda: False, on_progress=lambda texts, tokens: None
    )
    weights = word_weights(made, WordWeights(**{weighting: "c"}))
    for text, vector in zip(TEXTS[:4], encoded.embeddings, strict=True):
        ids = [WORDS.index(word) for word in text.lower().split()]
        mean = sum(weights[row] * VECTORS[row] for row in ids) / len(ids)
        assert np.allclose(vector, mean / np.linalg.norm(mean), atol=1e-6)
    fitted = read_fitted(out, [recipe])
    assert np.array_equal(
        LookupEncoder(recipe, fitted=fitted).encode_views(views).embeddings, encoded.embeddings
    )


def test_the_method_sif_brings_its_fits(table: Path, tmp_path: Path) -> None:
    config = resolve(job_source(job(table, tmp_path, encoder={"method": "sif"}))).config
    assert [fit.kind for fit in config.fit] == ["word_counts", "common_component"]
    assert isinstance(config.encoder.pooling, WordWeights)


def test_sif_waits_for_the_counts(table: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "a.parquet", TEXTS)
    steps = [{"common_component": "u"}, {"normalize": True}]
    fits = [COUNTS, {"kind": "common_component", "name": "u", "sample": None}]
    encoder = {"pooling": {"sif": "c"}, "finish": steps}
    plan = embedjob.plan(job(table, tmp_path, encoder=encoder, fit=fits))
    assert plan.unfitted == ("c", "u")
    assert [fit.base is not None for fit in plan.fits] == [True, False]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no fit": ({"encoder": {"pooling": {"sif": "c"}}}, "pooling: got c, but the word_counts"),
    "no use": ({"fit": [COUNTS]}, "c counts words that encoder.pooling does not weigh"),
    "both": ({"encoder": {"pooling": {"sif": "c", "idf": "c"}}, "fit": [COUNTS]}, "got both"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_weights_without_counts_and_counts_without_weights_are_refused(
    why: str, table: Path, tmp_path: Path
) -> None:
    sections, said = REFUSED[why]
    with pytest.raises(ConfigError, match=said):
        resolve(job_source(job(table, tmp_path, **sections)))


def test_weights_of_words_need_a_table(model: Path, tmp_path: Path) -> None:
    document = job(model, tmp_path, encoder={"pooling": {"sif": "c"}}, fit=[COUNTS])
    document["pool"] = {"gpus_per_actor": 0}
    with pytest.raises(ModelError, match=r"encoder\.pooling: got weights of words, but .* is a tr"):
        identify(resolve(job_source(document)))
