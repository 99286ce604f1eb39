"""Jobs with fits on a real Ray, with a tiny model: on the local disk and on S3.

Covers: embedjob.stages.fits.fit, embedjob.stages.fits.reduce, embedjob.job.fit_plan
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embedjob
from embedjob.encoder.encoder import Encoder
from embedjob.errors import ConfigError, FitError, OutputError
from embedjob.input.samples import SamplePlace, has_chunk, sample_of, sampled_rows
from embedjob.job.options import Options
from embedjob.output.claim import read_claims
from embedjob.output.fits.artefacts import read_artefact
from embedjob.output.fits.records import read_records
from embedjob.output.snapshot import newest_snapshot, open_snapshot
from embedjob.stages.claiming import PROBE_TEXTS
from embedjob.storage.objects import list_files
from embedjob.vectors.fits.clusters import nearest_centroids
from embedjob.vectors.fits.fitted import Fitted
from embedjob.vectors.fits.flow import flowed
from embedjob.vectors.quantizing import ranges_of
from tests import running
from tests.cluster import Cluster
from tests.connection import NOWHERE
from tests.engines import counting, texts_encoded
from tests.running import Job, texts, write_shard
from tests.vectors.fits.authors_whitening import bert_whitening

pytestmark = pytest.mark.ray
WHITEN = {"kind": "whiten", "name": "w", "dimensions": 6, "sample": 100, "seed": 3}
STEPS = [{"whiten": "w"}, {"normalize": True}]


def job(source: Path, out: str | Path, model: Path, **sections: Any) -> Job:
    """A job that whitens; 150 rows in 15 chunks."""
    fits = sections.pop("fit", [WHITEN])
    encoder = {"finish": STEPS, **sections.pop("encoder", {})}
    return {**running.job(source, out, model, encoder=encoder, **sections), "fit": fits}


def shards(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        write_shard(folder / f"{name}.parquet", texts(75, seed=number))
    return folder


def vectors(out: str | Path) -> dict[tuple[str, int], np.ndarray]:
    """The embeddings of the newest snapshot, by shard and row."""
    table = open_snapshot(str(out)).to_table(columns=["shard", "row", "embedding"])
    rows = zip(*(table[name].to_pylist() for name in table.column_names), strict=True)
    return {(shard, row): np.array(vector, np.float32) for shard, row, vector in rows}


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_a_run_whitens_by_a_sample_and_embeds_nothing_twice(
    cluster: Cluster, model: Path, tmp_path: Path, run_out: str
) -> None:
    source, log = shards(tmp_path / "in", "a", "b"), tmp_path / "log"
    document = job(source, run_out, model)
    result = running.run_with(document, Options(address=cluster.address), counting(log))
    assert result.faults == ()
    # Each of the two encoders embeds the probes first.
    given = [int(line) for line in log.read_text().splitlines()]
    assert sum(given) == 100 + 150 + 2 * len(PROBE_TEXTS)
    # The vectors by themselves, and the authors' recipe over the rows that the seed chooses.
    plain = Encoder.from_config(
        {"model": str(model), "templates": ["It says: {text}."], "max_tokens": 24, "finish": []}
    )
    raw = {
        (str(source / f"{name}.parquet"), row): vector
        for number, name in enumerate("ab")
        for row, vector in enumerate(plain.encode(texts(75, seed=number)))
    }
    kernel, bias = bert_whitening(np.stack([raw[row] for row in chosen(source)]), 6)
    found = vectors(run_out)
    assert found.keys() == raw.keys()
    for row, vector in raw.items():
        assert cosine(found[row], (vector + bias[0]) @ kernel) > 0.9999
    queries = texts(3, seed=0)
    answers = Encoder.from_output(run_out).encode(queries)
    for row in range(3):
        assert cosine(answers[row], found[str(source / "a.parquet"), row]) > 0.99999
    assert running.command("verify", run_out, "--json").summary["problems"] == []
    again = running.run(document, tmp_path, "--address", NOWHERE)
    assert (again.code, again.summary["chunks_written"]) == (0, 0), again.err


def chosen(source: Path) -> list[tuple[str, int]]:
    """The rows of the sample of 100."""
    urls = [str(path) for path in sorted(source.iterdir())]
    places = [SamplePlace(url, at, min(at + 10, 75)) for url in urls for at in range(0, 75, 10)]
    sample = sample_of(places, rows=100, seed=3)
    assert sample is not None
    kept = [one for one in places if has_chunk(sample, one.shard, one.start)]
    rows = [
        (one.shard, int(row))
        for one in kept
        for row in np.arange(one.start, one.stop)[
            sampled_rows(sample, one.shard, np.arange(one.start, one.stop))
        ]
    ]
    assert len(rows) == 100
    return rows


@pytest.mark.slow
class TestArtefacts:
    """One output over several nights."""

    @pytest.fixture(scope="class")
    def made(
        self, cluster: Cluster, model: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> tuple[Job, Path]:
        folder = tmp_path_factory.mktemp("fitted")
        source = shards(folder / "in", "a")
        fits = [
            {"kind": "standardize", "name": "s", "sample": None},
            {"kind": "pca", "name": "p", "dimensions": 5, "sample": None},
        ]
        steps = [{"normalize": True}, {"standardize": "s"}, {"pca": "p"}]
        document = job(source, folder / "out", model, fit=fits, encoder={"finish": steps})
        plan = embedjob.plan(document)
        assert plan.unfitted == ("s", "p")
        assert not (folder / "out").exists()
        place = folder / "job.yaml"
        place.write_text(json.dumps(document))
        ran = running.command("fit", str(place), "--json", "--address", cluster.address)
        assert ran.code == 0, ran.err
        printed = [json.loads(line) for line in ran.out.splitlines()]
        assert [(one["name"], one["artefact"]["rows"]) for one in printed] == [("s", 75), ("p", 75)]
        assert embedjob.plan(document).unfitted == ()
        assert read_claims(str(folder / "out")) == ()
        ran = running.run(document, folder, "--address", cluster.address)
        assert ran.code == 0, ran.err
        return document, folder

    def test_they_are_applied_in_the_order_of_the_steps(self, made: tuple[Job, Path]) -> None:
        document, folder = made
        found = np.stack([*vectors(folder / "out").values()]).astype(np.float64)
        encoder = {**document["encoder"], "finish": [{"normalize": True}]}
        raw = Encoder.from_config(encoder).encode(texts(75)).astype(np.float64)
        scores = (raw - raw.mean(axis=0)) / raw.std(axis=0)
        left, values, _ = np.linalg.svd(scores, full_matrices=False)
        wanted = (left * values)[:, :5]
        signs = np.sign(np.einsum("rd,rd->d", wanted, found))
        np.testing.assert_allclose(found, wanted * signs, rtol=0, atol=2e-3)

    def test_they_stay_while_the_corpus_grows(
        self, made: tuple[Job, Path], cluster: Cluster
    ) -> None:
        document, folder = made
        before, records = vectors(folder / "out"), read_records(str(folder / "out"))
        write_shard(folder / "in" / "c.parquet", texts(12, seed=9))
        ran = running.run(document, folder, "--address", cluster.address)
        assert ran.code == 0, ran.err
        assert ran.summary["chunks_written"] == 2
        after = vectors(folder / "out")
        assert len(after) == 87
        assert all(np.array_equal(after[row], vector) for row, vector in before.items())
        assert read_records(str(folder / "out")) == records

    def test_refit_is_another_fingerprint(self, made: tuple[Job, Path], cluster: Cluster) -> None:
        document, folder = made
        rows = len(vectors(folder / "out"))
        write_shard(folder / "in" / "d.parquet", texts(10, seed=10))
        ran = running.run(document, folder, "--refit", "--address", NOWHERE)
        assert (ran.code, "--new-fingerprint" in ran.err) == (2, True)
        served = newest_snapshot(str(folder / "out"))
        options = ("--refit", "--new-fingerprint", "--address", cluster.address)
        ran = running.run(document, folder, *options)
        assert ran.code == 0, ran.err
        assert served is not None
        assert ran.summary["fingerprint"] != served.fingerprint
        assert len(vectors(folder / "out")) == rows + 10
        assert len(read_claims(str(folder / "out"))) == 2
        ran = running.command("prune", str(folder / "out"), "--keep", "1")
        assert ran.code == 0, ran.err
        assert list_files(f"{folder}/out/fits") == [
            file for file in list_files(f"{folder}/out/fits") if "/leases/" in file.url
        ]
        assert running.command("verify", str(folder / "out"), "--json").summary["problems"] == []

    def test_another_output_gives_its_vectors(
        self, made: tuple[Job, Path], model: Path, cluster: Cluster, tmp_path: Path
    ) -> None:
        """Those of a plain job end in fewer of the steps that the fit's own end in."""
        document, folder = made
        plain = {**document, "output": {"path": str(tmp_path / "plain"), "chunk_rows": 10}}
        plain = {**plain, "fit": [], "encoder": {**document["encoder"], "finish": []}}
        ran = running.run(plain, tmp_path, "--address", cluster.address)
        assert ran.code == 0, ran.err
        log = tmp_path / "log"
        fits = [{"kind": "standardize", "name": "s", "from": str(tmp_path / "plain")}]
        steps = [{"normalize": True}, {"standardize": "s"}]
        other = {
            **document,
            "fit": fits,
            "encoder": {**document["encoder"], "finish": steps},
            "output": {"path": str(tmp_path / "out"), "chunk_rows": 10},
        }
        rows = len(vectors(tmp_path / "plain"))
        result = running.run_with(other, Options(address=cluster.address), counting(log))
        assert result.faults == ()
        assert texts_encoded(log) == rows
        assert list_files(f"{tmp_path}/out/fits") == []
        found = np.stack([*vectors(tmp_path / "out").values()])
        np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-4)
        np.testing.assert_allclose(found.std(axis=0), 1, atol=1e-3)
        fits[0]["from"] = str(folder / "out")
        with pytest.raises(OutputError, match=r"fit: s: from: .* serves no vectors of this"):
            embedjob.plan({**other, "output": {"path": str(tmp_path / "more"), "chunk_rows": 10}})


def test_what_cannot_be_fitted_is_refused_before_ray_starts(model: Path, tmp_path: Path) -> None:
    source = shards(tmp_path / "in", "a")
    few = job(source, tmp_path / "out", model, fit=[{**WHITEN, "sample": 6}])
    with pytest.raises(FitError, match="fit: w: got 6 of 75 rows, and it needs 7 at least"):
        embedjob.plan(few)
    wide = job(source, tmp_path / "out", model, fit=[{**WHITEN, "dimensions": 6000}])
    with pytest.raises(ConfigError, match="whiten: w of dimensions: 6000, but the embedding is"):
        embedjob.plan(wide)
    flow = job(source, tmp_path / "out", model, fit=[{"kind": "flow", "name": "f", "levels": 9}])
    flow["encoder"]["finish"] = [{"flow": "f"}]
    with pytest.raises(FitError, match=r"fit: f: got vectors of width .* cannot be halved 9"):
        embedjob.plan(flow)
    with pytest.raises(ConfigError, match="whiten: w is fitted on a corpus: run a job"):
        Encoder.from_config({"model": str(model), "finish": STEPS})
    ran = running.run(job(source, tmp_path / "out", model, fit=[]), tmp_path, "--address", NOWHERE)
    assert (ran.code, "whiten: got w, but fit: makes none" in ran.err) == (2, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_method_brings_its_flow(cluster: Cluster, model: Path, tmp_path: Path) -> None:
    source = shards(tmp_path / "in", "a")
    encoder = {"method": "bert_flow", "templates": ["{text}"], "layer": [1, -1]}
    fits = [{"kind": "flow", "name": "flow", "sample": 60, "levels": 2, "hidden": 4, "epochs": 2}]
    document = {**running.job(source, tmp_path / "out", model, encoder=encoder), "fit": fits}
    ran = running.run(document, tmp_path, "--address", cluster.address)
    assert ran.code == 0, ran.err
    fitted = artefact(tmp_path / "out", "flow")
    assert fitted.rows == 60
    plain = {**document["encoder"], "finish": []}
    raw = Encoder.from_config(plain).encode(texts(75))
    wanted = flowed(fitted, raw)
    answers = Encoder.from_output(str(tmp_path / "out")).encode(texts(75))
    for row, (_, vector) in enumerate(sorted(vectors(tmp_path / "out").items())):
        assert cosine(vector, wanted[row]) > 0.9999
        assert cosine(vector, answers[row]) > 0.99999


@pytest.mark.slow
def test_ranges_of_int8_are_those_of_every_row(
    cluster: Cluster, model: Path, tmp_path: Path
) -> None:
    """And one set holds: a run that would have others is refused."""
    source = shards(tmp_path / "in", "a")
    fits = [{"kind": "calibrate", "name": "r", "sample": None}]
    document = {
        **running.job(source, tmp_path / "out", model, encoder={"vector_dtype": "int8"}),
        "fit": fits,
    }
    ran = running.run(document, tmp_path, "--address", cluster.address)
    assert ran.code == 0, ran.err
    [claim] = read_claims(str(tmp_path / "out"))
    assert claim.calibration is not None
    assert claim.calibration.vectors == 75
    encoder = Encoder.from_output(str(tmp_path / "out"))
    alone = ranges_of(encoder.encode(texts(75)))
    np.testing.assert_allclose(claim.calibration.array, alone, rtol=0, atol=1e-5)
    stored = np.stack([*vectors(tmp_path / "out").values()])
    codes = encoder.encode_stored(texts(75)).astype(np.float32)
    assert (np.abs(stored - codes) <= 1).all()
    assert running.command("verify", str(tmp_path / "out"), "--json").summary["problems"] == []
    again = running.run(document, tmp_path, "--address", NOWHERE)
    assert (again.code, again.summary["chunks_written"]) == (0, 0), again.err
    other = {**document, "fit": [{**fits[0], "sample": 50}]}
    ran = running.run(other, tmp_path, "--address", NOWHERE)
    assert (ran.code, "was begun with other ranges" in ran.err) == (2, True)


@pytest.mark.slow
class TestBesideTheEmbeddings:
    """Fits that serve no step: made of what was published, and nothing is embedded for them."""

    @pytest.fixture(scope="class")
    def outs(
        self, cluster: Cluster, model: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> tuple[Job, Path]:
        """Two outputs of one input by two recipes; the second has centroids and a rotation."""
        folder = tmp_path_factory.mktemp("beside")
        source = shards(folder / "in", "a", "b")
        old = running.job(source, folder / "old", model, encoder={"layer": 1})
        ran = running.run(old, folder, "--address", cluster.address)
        assert ran.code == 0, ran.err
        fits = [
            {"kind": "kmeans", "name": "k", "clusters": 4, "spherical": True, "sample": None},
            {"kind": "align", "name": "a", "from": str(folder / "old")},
        ]
        document = {**running.job(source, folder / "new", model), "fit": fits}
        log = folder / "log"
        result = running.run_with(document, Options(address=cluster.address), counting(log))
        assert result.faults == ()
        assert texts_encoded(log) == 150
        assert list_files(f"{folder}/new/fits") == []
        return document, folder

    def test_centroids_are_near_the_vectors(self, outs: tuple[Job, Path]) -> None:
        _, folder = outs
        found = np.stack([*vectors(folder / "new").values()])
        fitted = artefact(folder / "new", "kmeans")
        assert (fitted.rows, fitted.tensors["centroids"].shape) == (150, (4, found.shape[1]))
        nearest = nearest_centroids(fitted, found)
        distances = np.linalg.norm(found - fitted.tensors["centroids"][nearest], axis=1)
        # Nearer than to the one mean, or any centroids would do.
        assert (distances**2).mean() < 0.9 * ((found - found.mean(axis=0)) ** 2).sum(axis=1).mean()

    def test_queries_of_the_new_recipe_are_given_in_the_old_space(
        self, outs: tuple[Job, Path]
    ) -> None:
        _, folder = outs
        new, old = (np.stack([*vectors(folder / name).values()]) for name in ("new", "old"))
        fitted = artefact(folder / "new", "align")
        assert fitted.rows + fitted.facts["measured_rows"] == 150
        encoder = Encoder.from_output(str(folder / "new"), aligned_to=str(folder / "old"))
        queries = encoder.encode(texts(75, seed=0))
        np.testing.assert_allclose(queries, new[:75] @ fitted.tensors["rotation"], atol=1e-4)
        before = np.einsum("rd,rd->r", new[:75], old[:75]).mean()
        after = np.einsum("rd,rd->r", queries, old[:75]).mean()
        assert after > before
        assert 1 - after == pytest.approx(fitted.facts["loss"], abs=0.1)
        with pytest.raises(ConfigError, match="encode_stored gives what this output holds"):
            encoder.encode_stored(["a text"])
        with pytest.raises(OutputError, match="no fit has made a rotation to the space of"):
            Encoder.from_output(str(folder / "new"), aligned_to=str(folder / "elsewhere"))

    def test_a_further_run_has_nothing_to_make(self, outs: tuple[Job, Path]) -> None:
        document, folder = outs
        ran = running.run(document, folder, "--address", NOWHERE)
        assert (ran.code, ran.summary["chunks_written"]) == (0, 0), ran.err

    def test_what_cannot_be_aligned_is_refused_before_ray_starts(
        self, outs: tuple[Job, Path]
    ) -> None:
        document, folder = outs
        for source, words in (
            (folder / "nowhere", "serves no snapshot"),
            (folder / "out", "is the job's own output"),
        ):
            fit = {"kind": "align", "name": "b", "from": str(source)}
            output = {**document["output"], "path": str(folder / "out")}
            with pytest.raises(OutputError, match=words):
                embedjob.plan({**document, "output": output, "fit": [fit]})


def artefact(out: Path, kind: str) -> Fitted:
    """What the one fit of this kind left."""
    [record] = [one for one in read_records(str(out)).values() if one.kind == kind]
    return read_artefact(str(out), kind, record.artefact)
