"""Vocabularies and their sparse rows, against scikit-learn, however the corpus is cut.

Covers: embedjob.config.tables, embedjob.stages.fits.term_counts, embedjob.text.lookup.terms,
embedjob.vectors.vocabulary
"""

import hashlib
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

import embedjob
from embedjob.config.fits.fit_kinds import VocabularyFit as Section
from embedjob.config.job_file import job_source
from embedjob.encoder.encoder import Encoder
from embedjob.errors import ConfigError, FitError, InputError, ModelError
from embedjob.input.chunks import Chunk, Shard
from embedjob.input.reading import read_chunk
from embedjob.job.resolve import identify, resolve
from embedjob.output.fits.artefacts import put_artefact
from embedjob.output.fits.records import Record, put_record
from embedjob.reports.preview import preview
from embedjob.stages.engine import PlannedFiles, recipe_engine
from embedjob.stages.fits.term_counts import (
    added,
    by_partition,
    count_group,
    grouped,
    kept,
    most_frequent,
    vocabulary,
)
from embedjob.stages.tokenize import tokenize_rows
from embedjob.static.bag_of_words import sketches
from embedjob.text.lookup.terms import TermCounts, TermRules, count_terms
from embedjob.vectors.encoded import Encoded
from embedjob.vectors.sparse import Sparse
from embedjob.vectors.vocabulary import SKETCH, Vocabulary, bounds, vocabulary_of
from tests.running import texts, write_shard

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "the the THE fox",
    "Zwölf Boxkämpfer jagen Viktor, don't they?",
    "敏捷的棕色狐狸 跳过了懒狗 2.71828",
    "İstanbul ẞ straße STRASSE",
    "dog dog dog bites fox_7",
    "The quick brown fox jumps over the lazy dog.",
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDJOB_CACHE", str(tmp_path / "cache"))


def made(texts: list[str], pieces: int = 1, **keys: Any) -> Vocabulary:
    """The vocabulary of texts that are counted in so many tasks; it is what Ray would give."""
    section = Section(kind="vocabulary", name="v", **keys)
    rules = TermRules(section.lowercase, section.token_pattern)
    parts = []
    for piece in range(pieces):
        counts = TermCounts(0, Counter(), Counter())
        count_terms(texts[piece::pieces], rules, counts)
        parts.append(by_partition(counts))
    fewest, most = bounds(section, len(texts))
    same = zip(*parts, strict=True)
    tables = [kept(added(*some), fewest, most, section.max_features) for some in same]
    table = most_frequent(added(*tables), section.max_features)
    return vocabulary(table, len(texts), rules)


def saved(one: Vocabulary, folder: Path) -> Path:
    """The file that a fit puts."""
    data = safetensors.numpy.save({**one.fitted().tensors})
    path = folder / f"vocabulary-{hashlib.sha256(data).hexdigest()[:12]}.safetensors"
    path.write_bytes(data)
    return path


def encoder(model: Path, **weights: Any) -> Encoder:
    heads = [{"bag_of_words": weights}]
    return Encoder.from_config({"model": str(model), "heads": heads}, device="cpu")


def dense(encoded: Encoded, terms: int) -> np.ndarray:
    sparse = encoded.sparse
    assert sparse is not None
    shape = (len(sparse), terms)
    return csr_matrix((sparse.values, sparse.indices, sparse.offsets), shape=shape).toarray()


WEIGHTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "sublinear": ({"sublinear_tf": True}, {"sublinear_tf": True}),
    "not smooth": ({"smooth_idf": False}, {"smooth_idf": False}),
    "no norm": ({"norm": "none"}, {"norm": None}),
    "no idf": ({"weights": "counts"}, {"use_idf": False}),
}
CUTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "capitals": {"lowercase": False},
    "letters": {"token_pattern": r"(?u)\b\w+\b"},
    "a group": {"token_pattern": r"(\w)\w*"},
    "in two texts": {"min_df": 2},
    "in few texts": {"max_df": 2},
    "shares": {"min_df": 0.2, "max_df": 0.5},
    "the most frequent": {"max_features": 3},
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("pieces", [1, 3])
def test_weights_are_those_of_scikit_learn(weights: str, pieces: int, tmp_path: Path) -> None:
    ours, theirs = WEIGHTS[weights]
    vectorizer = TfidfVectorizer(**theirs)
    expected = vectorizer.fit_transform(TEXTS).toarray()
    one = made(TEXTS, pieces)
    assert list(one.terms) == list(vectorizer.get_feature_names_out())
    found = encoder(saved(one, tmp_path), **ours).outputs(TEXTS)
    assert np.abs(dense(found, len(one.terms)) - expected).max() < 1e-6


@pytest.mark.parametrize("cut", CUTS)
def test_terms_are_those_of_scikit_learn(cut: str, tmp_path: Path) -> None:
    vectorizer = CountVectorizer(**CUTS[cut])
    expected = vectorizer.fit_transform(TEXTS).toarray()
    one = made(TEXTS, 2, **CUTS[cut])
    assert list(one.terms) == list(vectorizer.get_feature_names_out())
    model = encoder(saved(one, tmp_path), weights="counts", norm="none")
    full = np.flatnonzero(expected.sum(axis=1))
    found = dense(model.outputs([TEXTS[row] for row in full]), len(one.terms))
    assert np.array_equal(found, expected[full])


def test_binary_weights_say_which_terms_are_there(tmp_path: Path) -> None:
    expected = CountVectorizer(binary=True).fit_transform(TEXTS).toarray()
    one = made(TEXTS)
    found = encoder(saved(one, tmp_path), weights="binary", norm="none").outputs(TEXTS)
    assert np.array_equal(dense(found, len(one.terms)), expected)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="ab Aß日_1.", max_size=20), min_size=1), st.integers(1, 5))
def test_however_texts_are_cut_into_tasks_the_vocabulary_is_the_same(
    texts: list[str], pieces: int
) -> None:
    pattern = r"\w+"
    vectorizer = CountVectorizer(token_pattern=pattern)
    try:
        counts = vectorizer.fit_transform(texts)
    except ValueError:
        return  # which is what scikit-learn says to a corpus without terms
    one = made(texts, pieces, token_pattern=pattern)
    assert list(one.terms) == list(vectorizer.get_feature_names_out())
    assert one.documents_V.tolist() == (counts.toarray() > 0).sum(axis=0).tolist()


def test_of_terms_that_are_there_equally_often_the_first_are_kept() -> None:
    assert list(made(["b a c", "a d"], token_pattern=r"\w", max_features=2).terms) == ["a", "b"]


def test_a_text_without_a_term_has_no_row(tmp_path: Path) -> None:
    model = encoder(saved(made(TEXTS), tmp_path))
    with pytest.raises(InputError, match="first is number 1: empty_span, no term of the text"):
        model.outputs(["fox", "unheard", ""])


def test_a_sketch_keeps_the_dot_products_of_rows_on_average() -> None:
    chance = random.Random(3)
    rows = np.zeros((40, 5000), np.float32)
    for row in rows:
        row[chance.sample(range(5000), 60)] = 1 / np.sqrt(60)
    rows[1:20] = rows[0] * 0.5 + rows[1:20] * 0.5
    sparse = csr_matrix(rows)
    made = sketches(
        Sparse(sparse.indptr.astype(np.int64), sparse.indices.astype(np.uint32), sparse.data)
    )
    assert made.shape == (40, SKETCH)
    apart = (made @ made.T - rows @ rows.T)[~np.eye(40, dtype=bool)]
    # The standard deviation of a dot product is |a| |b| / sqrt(places) at most, about.
    assert np.abs(apart.mean()) < 0.01
    assert apart.std() < 1.2 / np.sqrt(SKETCH)
    again = sketches(Sparse(np.array([0, 1]), np.array([7], np.uint32), np.ones(1, np.float32)))
    assert np.flatnonzero(again[0]).size == 1
    assert abs(again[0]).max() == 1.0


def job(model: str, tmp_path: Path, **sections: Any) -> dict[str, Any]:
    heads = [{"bag_of_words": {}}]
    return {
        "input": {"path": str(tmp_path), "text": "body"},
        "encoder": {"model": model, "heads": heads, **sections.pop("encoder", {})},
        "output": {"path": str(tmp_path / "out")},
        **sections,
    }


FIT = {"kind": "vocabulary", "name": "terms"}
RULES = TermRules(True, r"(?u)\b\w\w+\b")


def test_a_job_names_the_vocabulary_that_its_fit_makes(tmp_path: Path) -> None:
    identified = identify(resolve(job_source(job("fit:terms", tmp_path, fit=[FIT]))))
    assert identified.width == SKETCH
    assert identified.config.pool.gpus_per_actor == 0
    by_method = {**job("fit:terms", tmp_path), "encoder": {"method": "tfidf"}}
    found = resolve(job_source(by_method)).config
    assert [fit.kind for fit in found.fit] == ["vocabulary"]
    assert found.encoder.model == "fit:terms"


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "no such fit": ({}, "encoder.model: got fit:terms, but the vocabularies .* are: none"),
    "another name": (
        {"fit": [{**FIT, "name": "words"}]},
        "got fit:terms, but the vocabularies that fit: makes are: words",
    ),
    "a bad pattern": ({"fit": [{**FIT, "token_pattern": "("}]}, "no regular expression"),
    "two groups": ({"fit": [{**FIT, "token_pattern": "(a)(b)"}]}, "with 2 groups, allowed is one"),
    "from": ({"fit": [{**FIT, "from": "other"}]}, "fit.*from"),
    "a sample": ({"fit": [{**FIT, "sample": 10}]}, "fit.*sample"),
    "no texts": ({"fit": [{**FIT, "min_df": 0}]}, "fit.*min_df"),
}


@pytest.mark.parametrize("why", MISFITS)
def test_a_vocabulary_that_cannot_be_made_is_refused(why: str, tmp_path: Path) -> None:
    sections, said = MISFITS[why]
    if why == "no texts":
        resolve(job_source(job("fit:terms", tmp_path, **sections)))  # a share of 0: every term
        return
    with pytest.raises(ConfigError, match=said):
        resolve(job_source(job("fit:terms", tmp_path, **sections)))


def test_a_vocabulary_that_nothing_uses_is_refused(model: Path, tmp_path: Path) -> None:
    document = job(str(model), tmp_path, encoder={"heads": []}, fit=[FIT])
    with pytest.raises(ConfigError, match="terms is a vocabulary that the encoder does not use"):
        resolve(job_source(document))


def test_a_vocabulary_and_its_head_need_each_other(tmp_path: Path) -> None:
    path = saved(made(TEXTS), tmp_path)
    without = {"heads": [], "similarity": "dot"}
    with pytest.raises(ModelError, match=r"encoder\.heads: got no bag_of_words"):
        identify(resolve(job_source(job(str(path), tmp_path, encoder=without))))
    steps = {"finish": [{"normalize": True}]}
    with pytest.raises(ModelError, match=r"encoder\.finish: got .*allowed is none"):
        identify(resolve(job_source(job(str(path), tmp_path, encoder=steps))))
    table = tmp_path / "words.txt"
    table.write_text("fox 1 2\n")
    with pytest.raises(ModelError, match=r"encoder\.heads: got "):
        identify(resolve(job_source(job(str(table), tmp_path))))


def test_no_term_is_left() -> None:
    section = Section(kind="vocabulary", name="v", min_df=5, max_df=0.5)
    with pytest.raises(FitError, match=r"min_df: 5 and max_df: 0\.5 over 8 texts, which leave no"):
        bounds(section, 8)
    assert bounds(Section(kind="vocabulary", name="v", min_df=0.5, max_df=0.9), 10) == (5, 9)


def test_a_damaged_vocabulary_is_refused(tmp_path: Path) -> None:
    tensors = {**made(TEXTS).fitted().tensors}
    assert list(vocabulary_of(tensors).terms) == list(made(TEXTS).terms)
    damaged = [
        {**tensors, "documents": tensors["documents"][:-1]},
        {**tensors, "documents": tensors["documents"] + 100},
        {**tensors, "terms": tensors["terms"][:-1]},
        {**tensors, "terms": tensors["terms"][::-1].copy()},
        {name: tensor for name, tensor in tensors.items() if name != "texts"},
    ]
    for number, one in enumerate(damaged):
        with pytest.raises(ValueError, match=r"it |its |a term"):
            vocabulary_of(one)
        path = tmp_path / f"vocabulary-{number:012x}.safetensors"
        safetensors.numpy.save_file(one, path)
        with pytest.raises(ModelError, match=r"is no vocabulary|cannot be read"):
            resolve(job_source(job(str(path), tmp_path)))


def test_an_encoder_needs_the_output_of_a_job() -> None:
    with pytest.raises(ConfigError, match=r"fit:terms is fitted on a corpus: run a job"):
        Encoder.from_method("tfidf")


def test_a_preview_needs_the_vocabulary(tmp_path: Path) -> None:
    document = job("fit:terms", tmp_path, fit=[FIT])
    with pytest.raises(ConfigError, match=r"fit:terms is made by a run, or by `embedjob fit`"):
        preview(job_source(document), 3)


def test_chunks_are_counted_together_up_to_so_many_rows_or_bytes() -> None:
    shard = Shard("s", 1, "e")
    chunks = [
        Chunk(
            shard=shard,
            start=10 * n,
            stop=10 * n + 10,
            # The last three are pieces of one row group.
            groups=(min(n, 4), min(n, 4) + 1),
            first_row=0,
            name=str(n),
            text_bytes=100,
            footer_bytes=0,
        )
        for n in range(7)
    ]
    by_rows = [[chunk.name for chunk in group] for group in grouped(chunks, rows=20)]
    assert by_rows == [["0", "1"], ["2", "3"], ["4", "5", "6"]]
    assert len([*grouped(chunks, size=100)]) == 5
    assert [*grouped([])] == []


def test_a_plan_takes_the_vocabulary_that_was_made(tmp_path: Path) -> None:
    """All of a run but for Ray: the plan, the counts, the artefact, tokenizing and encoding."""
    bodies = [*texts(30), "!", None, texts(30)[0]]
    write_shard(tmp_path / "in" / "a.parquet", bodies)
    document = job("fit:terms", tmp_path / "in", fit=[FIT])
    document["output"] = {"path": str(tmp_path / "out"), "chunk_rows": 10}
    plan = embedjob.plan(document)
    assert plan.unfitted == ("terms",)
    [fit] = plan.fits
    assert (fit.width, fit.is_first) == (SKETCH, True)
    parts = [count_group(group, plan.job.config.input, RULES) for group in grouped(plan.corpus)]
    assert sum(part[0] for part in parts) == 32
    tables = [added(*same) for same in zip(*(part[1:] for part in parts), strict=True)]
    made = vocabulary(added(*tables), 32, RULES).fitted()
    out = plan.job.out
    head = put_artefact(out, made, encoder=fit.fingerprint, parameters={})
    put_record(out, Record(fit.key, 1, head.kind, head.sha256, fit.name, None))
    again = embedjob.plan(document)
    assert again.unfitted == ()
    assert again.job.fingerprint != plan.job.fingerprint
    assert Path(again.job.config.encoder.model).name == f"{head.name}.safetensors"
    assert again.job.heads.vocabulary == head.facts["terms"]
    engine = recipe_engine(again.job.config, 1)
    PlannedFiles(engine.recipe_json, tuple(again.job.digests.items())).check()
    rows = read_chunk(again.chunks[0], again.job.config.input)
    _, views = tokenize_rows(rows, engine.load_tokenizer(), engine.long_text)
    encoded = engine.load_encoder().encode_views(
        views, stop=lambda: False, on_progress=lambda texts, tokens: None
    )
    good = [text for text in bodies if text is not None]
    vectorizer = TfidfVectorizer().fit(good)
    expected = vectorizer.transform(dict.fromkeys(bodies[:10])).toarray()
    assert np.abs(dense(encoded, expected.shape[1]) - expected).max() < 1e-6
    # Another pattern is another vocabulary, another weight is not.
    sublinear = {"heads": [{"bag_of_words": {"sublinear_tf": True}}]}
    other = {**document, "encoder": {**document["encoder"], **sublinear}}
    assert embedjob.plan(other).unfitted == ()
    assert embedjob.plan(other).job.fingerprint != again.job.fingerprint
    assert embedjob.plan({**document, "fit": [{**FIT, "min_df": 2}]}).unfitted == ("terms",)
