"""Jobs with a vocabulary on a real Ray: counted, embedded, queried, kept as the corpus grows."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

import embedjob
from embedjob.encoder.encoder import Encoder
from embedjob.output.fits.artefacts import read_artefact
from embedjob.output.fits.records import read_records
from embedjob.output.snapshot import open_snapshot
from embedjob.vectors.vocabulary import vocabulary_of
from tests import running
from tests.cluster import Cluster
from tests.connection import NOWHERE
from tests.running import Job, texts, write_shard

pytestmark = pytest.mark.ray


def job(source: Path, out: str | Path, **sections: Job) -> Job:
    base = running.job(source, out, "-", **sections)
    return {
        **base,
        "encoder": {"method": "tfidf", **sections.get("encoder", {})},
        "pool": {"actors": 1},
        "run": {**base["run"], "max_quarantined": 0.5},
    }


def rows(out: str | Path) -> dict[tuple[str, int], dict[int, float]]:
    """The sparse entries of each row of the newest snapshot."""
    names = ["shard", "row", "sparse_indices", "sparse_values"]
    return {
        (Path(row["shard"]).stem, row["row"]): dict(
            zip(row["sparse_indices"], row["sparse_values"], strict=True)
        )
        for row in open_snapshot(str(out)).to_table(columns=names).to_pylist()
    }


@pytest.mark.slow
def test_a_corpus_gets_the_weights_of_scikit_learn(
    cluster: Cluster, tmp_path: Path, run_out: str
) -> None:
    bodies = {name: texts(40, seed=n) for n, name in enumerate("ab")}
    for name, some in bodies.items():
        write_shard(tmp_path / "in" / f"{name}.parquet", [*some, "!", None, some[0]])
    document = job(tmp_path / "in", run_out)
    plan = embedjob.plan(document)
    assert plan.unfitted == ("terms",)
    ran = running.run(document, tmp_path, "--address", cluster.address)
    assert ran.code == 0, ran.err
    everything = [text for some in bodies.values() for text in [*some, "!", some[0]]]
    vectorizer = TfidfVectorizer().fit(everything)
    found = rows(run_out)
    assert len(found) == 82
    for (name, row), entries in found.items():
        text = [*bodies[name], "!", None, bodies[name][0]][row]
        expected = vectorizer.transform([text])
        made = csr_matrix(
            ([*entries.values()], ([0] * len(entries), [*entries])), shape=expected.shape
        )
        assert abs(made - expected).max() < 1e-6
    # Queries by the same vocabulary, which lies in the output.
    outputs = Encoder.from_output(run_out).outputs(bodies["a"][:3])
    assert outputs.sparse is not None
    for row in range(3):
        indices, values = outputs.sparse.row(row)
        assert dict(zip(indices.tolist(), values.tolist(), strict=True)) == found["a", row]
    assert running.command("verify", run_out, "--json").summary["problems"] == []
    again = running.run(document, tmp_path, "--address", NOWHERE)
    assert (again.code, again.summary["chunks_written"]) == (0, 0), again.err
    # A corpus that grows keeps its vocabulary, and its rows.
    write_shard(tmp_path / "in" / "c.parquet", ["entirely unheard", *bodies["a"][:2]])
    ran = running.run(document, tmp_path, "--address", cluster.address)
    assert ran.code == 0, ran.err
    grown = rows(run_out)
    assert {key: grown[key] for key in found} == found
    assert grown["c", 1] == found["a", 0]


@pytest.mark.slow
def test_a_vocabulary_is_made_alone_and_anew(cluster: Cluster, tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "a.parquet", texts(40))
    out = str(tmp_path / "out")
    fit = [{"kind": "vocabulary", "name": "terms", "min_df": 3}]
    document = {**job(tmp_path / "in", out, encoder={"method": "bow"}), "fit": fit}
    place = tmp_path / "job.yaml"
    place.write_text(json.dumps(document))
    ran = running.command("fit", str(place), "--json", "--address", cluster.address)
    assert ran.code == 0, ran.err
    [record] = read_records(out).values()
    made = vocabulary_of(read_artefact(out, "vocabulary", record.artefact).tensors)
    vectorizer = CountVectorizer(min_df=3).fit(texts(40))
    assert list(made.terms) == list(vectorizer.get_feature_names_out())
    assert made.texts == 40
    plan = embedjob.plan(document)
    assert plan.unfitted == ()
    ran = running.run(document, tmp_path, "--address", cluster.address)
    assert ran.code == 0, ran.err
    counts = vectorizer.transform(texts(40)).toarray()
    for (_, row), entries in rows(out).items():
        assert np.array_equal(np.flatnonzero(counts[row]), [*entries])
        assert counts[row][[*entries]].tolist() == [*entries.values()]
    # An output is read wherever it is copied to.
    shutil.copytree(out, tmp_path / "copy")
    copied = Encoder.from_output(str(tmp_path / "copy"))
    assert copied.recipe.model.startswith(str(tmp_path / "copy"))
    write_shard(tmp_path / "in" / "b.parquet", texts(40, seed=2))
    ran = running.run(
        document, tmp_path, "--refit", "--new-fingerprint", "--address", cluster.address
    )
    assert ran.code == 0, ran.err
    both = [*texts(40), *texts(40, seed=2)]
    anew = CountVectorizer(min_df=3).fit(both)
    assert len(rows(out)) == np.count_nonzero(anew.transform(both).getnnz(axis=1))


@pytest.mark.slow
def test_the_counts_of_two_million_texts_are_those_of_one_process(
    cluster: Cluster, tmp_path: Path, say: Callable[[str], None]
) -> None:
    chance = np.random.default_rng(11)
    documents: Counter[str] = Counter()
    shards, rows_each = 20, 100_000
    for number in range(shards):
        # Frequencies as in a language: a few words are everywhere, many are there once.
        words = chance.zipf(1.3, size=(rows_each, 6)) % 10_000_000
        bodies = [" ".join(f"w{word}" for word in row) for row in words.tolist()]
        for row in words.tolist():
            documents.update({f"w{word}" for word in row})
        path = tmp_path / "in" / f"{number:02}.parquet"
        path.parent.mkdir(exist_ok=True)
        table = pa.table({"body": bodies, "doc_id": [str(row) for row in range(rows_each)]})
        pq.write_table(table, path, row_group_size=25_000)
    place = tmp_path / "job.yaml"
    document = job(tmp_path / "in", tmp_path / "out")
    place.write_text(json.dumps({**document, "output": {"path": str(tmp_path / "out")}}))
    started = time.monotonic()
    ran = running.command("fit", str(place), "--json", "--address", cluster.address)
    assert ran.code == 0, ran.err
    seconds = time.monotonic() - started
    [record] = read_records(str(tmp_path / "out")).values()
    fitted = read_artefact(str(tmp_path / "out"), "vocabulary", record.artefact)
    made = vocabulary_of(fitted.tensors)
    assert made.texts == shards * rows_each
    assert dict(zip(made.terms, made.documents_V.tolist(), strict=True)) == documents
    say(f"2,000,000 texts, {len(documents):,} terms: {seconds:.0f} s")


@pytest.mark.slow
def test_a_corpus_without_a_term_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "a.parquet", ["!", "?", None])
    document = job(tmp_path / "in", tmp_path / "out")
    ran = running.run(document, tmp_path, "--address", cluster.address)
    assert ran.code == 2
    assert "fit: terms: no term of 2 texts is left" in ran.err
