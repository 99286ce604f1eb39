"""Jobs with a static table on a real Ray: from the local disk and from storage, fitted, queried."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from embedjob.encoder.encoder import Encoder
from embedjob.output.claim import read_claims
from embedjob.output.snapshot import open_snapshot
from embedjob.storage.objects import create
from tests import running
from tests.cluster import Cluster
from tests.connection import NOWHERE
from tests.running import Job, texts, write_shard

pytestmark = pytest.mark.ray
BODIES = [*texts(40), "unheard-of", "", None]
WIDTH = 6


def table(folder: Path) -> Path:
    """A table of the words of the texts, but for one."""
    words = sorted({word for text in texts(40) for word in text.split()})[:-1]
    vectors = np.random.default_rng(7).normal(size=(len(words), WIDTH))
    path = folder / "words.txt"
    path.write_text(
        "".join(
            f"{word} {' '.join(f'{x:.6f}' for x in vector)}\n"
            for word, vector in zip(words, vectors, strict=True)
        )
    )
    return path


def job(source: Path, out: str, model: str | Path, **sections: Job) -> Job:
    document = running.job(source, out, model, **sections)
    return {
        **document,
        "encoder": {"model": str(model), **sections.get("encoder", {})},
        "pool": {"actors": 1},
        "run": {**document["run"], "max_quarantined": 0.2},
    }


def expected(path: Path, text: str) -> np.ndarray:
    """The mean of the words' vectors, by hand."""
    lines = (line.split() for line in path.read_text().splitlines())
    vectors = {word: np.array(numbers, np.float32) for word, *numbers in lines}
    mean = np.mean([vectors[word] for word in text.split() if word in vectors], axis=0)
    return np.asarray(mean / np.linalg.norm(mean))


def test_a_table_embeds_a_corpus_and_its_queries(
    cluster: Cluster, tmp_path: Path, bucket: str, run_out: str
) -> None:
    words = table(tmp_path)
    write_shard(tmp_path / "in" / "a.parquet", BODIES)
    model = f"{bucket}/words.txt" if run_out.startswith("s3") else str(words)
    create(f"{bucket}/words.txt", words.read_bytes())
    document = job(tmp_path / "in", run_out, model)
    ran = running.run(document, tmp_path, "--address", cluster.address)
    assert ran.code == 0, ran.err
    assert (ran.summary["embedded"], ran.summary["quarantined"]) == (40, 3)
    rows = open_snapshot(run_out).to_table(columns=["row", "embedding"]).sort_by("row").to_pylist()
    for row in rows:
        assert np.allclose(row["embedding"], expected(words, BODIES[row["row"]] or ""), atol=1e-6)
    queries = Encoder.from_output(run_out).encode(texts(3))
    assert np.allclose(queries, [row["embedding"] for row in rows[:3]], atol=1e-6)
    assert running.command("verify", run_out, "--json").summary["problems"] == []
    again = running.run(document, tmp_path, "--address", NOWHERE)
    assert (again.code, again.summary["chunks_written"]) == (0, 0), again.err
    assert list(read_claims(run_out)[0].digests) == ["words.txt"]


@pytest.mark.slow
def test_rare_words_weigh_more_and_what_is_common_is_taken_out(
    cluster: Cluster, tmp_path: Path
) -> None:
    words, out = table(tmp_path), str(tmp_path / "out")
    write_shard(tmp_path / "in" / "a.parquet", BODIES)
    document = job(tmp_path / "in", out, words, encoder={"method": "sif"})
    ran = running.run(document, tmp_path, "--address", cluster.address)
    assert ran.code == 0, ran.err
    lines = (line.split() for line in words.read_text().splitlines())
    vectors = {word: np.array(numbers, np.float32) for word, *numbers in lines}
    found = [[word for word in text.split() if word in vectors] for text in texts(40)]
    counts = Counter(word for text in found for word in text)
    weights = {word: 1e-3 / (1e-3 + counts[word] / counts.total()) for word in counts}
    means = np.array(
        [sum(weights[word] * vectors[word] for word in text) / len(text) for text in found]
    )
    direction = np.linalg.svd(means)[2][0]
    left = means - np.outer(means @ direction, direction)
    expected = left / np.linalg.norm(left, axis=1, keepdims=True)
    rows = open_snapshot(out).to_table(columns=["row", "embedding"]).sort_by("row")
    assert np.allclose(rows["embedding"].to_pylist(), expected, atol=1e-5)
    queries = Encoder.from_output(out).encode(texts(3))
    assert np.allclose(queries, expected[:3], atol=1e-5)
    again = running.run(document, tmp_path, "--address", NOWHERE)
    assert (again.code, again.summary["chunks_written"]) == (0, 0), again.err


@pytest.mark.slow
def test_means_of_words_are_whitened_like_any_vectors(cluster: Cluster, tmp_path: Path) -> None:
    words, out = table(tmp_path), str(tmp_path / "out")
    write_shard(tmp_path / "in" / "a.parquet", BODIES)
    steps = [{"whiten": "w"}]
    document = {
        **job(tmp_path / "in", out, words, encoder={"finish": steps, "vector_dtype": "float32"}),
        "fit": [{"kind": "whiten", "name": "w", "sample": None, "dimensions": 4}],
    }
    ran = running.run(document, tmp_path, "--address", cluster.address)
    assert ran.code == 0, ran.err
    vectors = np.array(open_snapshot(out).to_table(columns=["embedding"])["embedding"].to_pylist())
    assert np.allclose(np.cov(vectors.T), np.eye(4), atol=1e-3)
    answers = Encoder.from_output(out).encode(texts(5))
    apart = np.abs(answers[:, None] - vectors[None]).max(axis=2)
    assert apart.min(axis=1).max() < 1e-5
