"""Continuations that a job samples once from its corpus: a real Ray, a tiny model, real Parquet.

Covers: embedjob.stages.fits.continuations, embedjob.job.text_fits, embedjob.job.planned_fits,
    embedjob.vectors.fits.continuation_ids
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import embedjob
from embedjob.encoder.encoder import Encoder
from embedjob.errors import FitError, OutputError
from embedjob.output.fits.artefacts import read_artefact
from embedjob.output.fits.records import read_records
from embedjob.output.snapshot import open_snapshot
from embedjob.stages.fits.continuations import Drawn, distinct_draws
from embedjob.vectors.fits.continuation_ids import (
    continuation_ids,
    continuations_problem,
    fitted_continuations,
)
from embedjob.vectors.fits.fitted import Fitted
from tests import running
from tests.cluster import Cluster
from tests.connection import NOWHERE
from tests.encoder.literal_trajectories import Literal
from tests.encoder.tiny import save_chat
from tests.running import Job, texts, write_shard

FIT = {"kind": "continuations", "name": "c", "sample": 5, "count": 2, "max_new_tokens": 9}


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat(tmp_path_factory.mktemp("continued"))


def job(source: Path, out: str | Path, model: Path, **fit: Any) -> Job:
    encoder = {"method": "trajectories", "model": str(model), "heads": [{"continuations": "fit:c"}]}
    base = running.job(source, out, model, run={"max_quarantined": 0.5})
    return {**base, "encoder": encoder, "fit": [{**FIT, **fit}]}


def vectors(out: str) -> dict[tuple[str, int], np.ndarray]:
    table = open_snapshot(out).to_table(columns=["shard", "row", "embedding"])
    return {
        (Path(row["shard"]).stem, row["row"]): np.array(row["embedding"], np.float32)
        for row in table.to_pylist()
    }


@pytest.mark.ray
@pytest.mark.slow
def test_a_corpus_is_embedded_by_what_the_model_says_after_some_of_it(
    cluster: Cluster, chat: Path, tmp_path: Path, run_out: str
) -> None:
    bodies = [*texts(16), None, "", " ", texts(1)[0]]
    write_shard(tmp_path / "in" / "a.parquet", bodies)
    document = job(tmp_path / "in", run_out, chat)
    plan = embedjob.plan(document)
    assert (plan.unfitted, plan.job.width) == (("c",), 10)
    ran = running.run(document, tmp_path, "--address", cluster.address)
    assert ran.code == 0, ran.err
    assert "from 5 texts" in ran.err
    # What was sampled is what the authors' loop samples after five of the texts.
    [record] = read_records(run_out).values()
    sampled = continuation_ids(read_artefact(run_out, "continuations", record.artefact))
    literal = Literal(chat, count=2, length=9, seed=17)
    good = [*dict.fromkeys(text for text in bodies if text and text.strip())]
    after = {text: literal.sample(text, literal.prompt(text)) for text in good}
    chosen = [
        next(text for text in good if [tuple(one) for one in after[text]] == [*pair])
        for pair in zip(sampled[::2], sampled[1::2], strict=True)
    ]
    assert len({*chosen}) == 5
    # The vectors are the literal scores of these after each text.
    found = vectors(run_out)
    # A blank text has a full stop, and an empty one nothing.
    assert sorted(row for _, row in found) == [*range(16), 18, 19]
    for row in (0, 7, 15, 19):
        text = bodies[row]
        assert text is not None
        scores = [literal.score(literal.prompt(text), [*one]) for one in sampled]
        assert np.abs(found["a", row] - scores).max() <= 1e-5
    # Queries have the same, and the output says how vectors compare.
    queries = Encoder.from_output(run_out).encode(texts(3))
    for row in range(3):
        assert np.abs(queries[row] - found["a", row]).max() <= 1e-5
    if not run_out.startswith("s3"):
        data = next(path for path in Path(run_out, "data").rglob("*.parquet"))
        assert pq.read_metadata(data).metadata[b"embedjob.similarity"] == b"manhattan"
    assert running.command("verify", run_out, "--json").summary["problems"] == []
    # A corpus that grows keeps its continuations, and its rows.
    write_shard(tmp_path / "in" / "b.parquet", texts(6, seed=3))
    ran = running.run(document, tmp_path, "--address", cluster.address)
    assert ran.code == 0, ran.err
    grown = vectors(run_out)
    assert {key: grown[key].tolist() for key in found} == {
        key: one.tolist() for key, one in found.items()
    }
    assert len(read_records(run_out)) == 1
    again = running.run(document, tmp_path, "--address", NOWHERE)
    assert (again.code, again.summary["chunks_written"]) == (0, 0), again.err


@pytest.mark.ray
@pytest.mark.slow
def test_a_sample_is_made_alone_and_anew_and_decides_the_vectors(
    cluster: Cluster, chat: Path, tmp_path: Path
) -> None:
    write_shard(tmp_path / "in" / "a.parquet", texts(30))
    out = tmp_path / "out"
    document = job(tmp_path / "in", out, chat)
    place = tmp_path / "job.yaml"
    place.write_text(json.dumps(document))
    ran = running.command("fit", str(place), "--json", "--address", cluster.address)
    assert ran.code == 0, ran.err
    plan = embedjob.plan(document)
    assert plan.unfitted == ()
    # The same seed gives the same bytes, whoever samples; another seed another fingerprint.
    other = embedjob.plan(job(tmp_path / "in", out, chat, seed=3))
    assert other.unfitted == ("c",)
    for name, seed in (("same", 17), ("other", 3)):
        (tmp_path / name).mkdir()
        place.write_text(json.dumps(job(tmp_path / "in", tmp_path / name, chat, seed=seed)))
        ran = running.command("fit", str(place), "--json", "--address", cluster.address)
        assert ran.code == 0, ran.err
    made = {
        name: embedjob.plan(job(tmp_path / "in", tmp_path / name, chat, seed=seed))
        for name, seed in (("same", 17), ("other", 3))
    }
    assert made["same"].job.fingerprint == plan.job.fingerprint
    assert made["other"].job.fingerprint != plan.job.fingerprint
    # Damaged, it is refused before anything starts, and made anew where that is asked for.
    [tensors] = out.glob("artefacts/*.safetensors")
    data = bytearray(tensors.read_bytes())
    data[-8] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(OutputError, match=r"is not the file that was put there"):
        embedjob.plan(document)


@pytest.mark.ray
@pytest.mark.slow
def test_a_corpus_of_too_few_texts_is_refused(cluster: Cluster, chat: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "a.parquet", [*texts(2), *texts(2), None, ""])
    ran = running.run(
        job(tmp_path / "in", tmp_path / "out", chat), tmp_path, "--address", cluster.address
    )
    assert ran.code == 2
    assert "fit: c: got 2 distinct texts in 6 rows, and it needs 5; set a smaller" in ran.err
    with pytest.raises(FitError, match=r"got 6 of 6 rows, and it needs 7 at least; set a smaller"):
        embedjob.plan(job(tmp_path / "in", tmp_path / "out", chat, sample=7))


def test_texts_are_drawn_by_their_keys_and_each_once() -> None:
    rows = [
        Drawn(5, "a", 1, "x"),
        Drawn(2, "b", 0, "y"),
        Drawn(9, "a", 2, "y"),
        Drawn(1, "a", 3, "x"),
    ]
    assert [one.text for one in distinct_draws(rows)] == ["x", "y"]
    assert distinct_draws(reversed(rows)) == distinct_draws(rows)


def test_ids_come_back_from_their_tensors() -> None:
    ids = [(1, 2, 3), (4,), (5, 6)]
    fitted = fitted_continuations(ids, texts=3)
    assert continuations_problem(fitted) is None
    assert continuation_ids(fitted) == tuple(ids)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "it holds nothing"),
    "floats": ({"ids": np.ones(3), "offsets": np.array([0, 1, 3])}, "no whole numbers"),
    "too few": ({"ids": np.arange(3), "offsets": np.array([0, 3])}, "each of 2"),
    "an empty one": ({"ids": np.arange(3), "offsets": np.array([0, 0, 3])}, "has no token"),
    "below 0": ({"ids": np.array([1, -1]), "offsets": np.array([0, 1, 2])}, "an id below 0"),
    "beyond": ({"ids": np.arange(3), "offsets": np.array([0, 1, 4])}, "each of 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_tensors_that_are_no_continuations_are_named(name: str) -> None:
    tensors, said = WRONG[name]
    assert said in (continuations_problem(Fitted("continuations", 3, 2, tensors)) or "")
