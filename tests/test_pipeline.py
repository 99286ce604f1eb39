"""The job as a whole, folder to folder: real Ray, real Parquet, a tiny real model.

Covers: embedjob.job.options, embedjob.job.output, embedjob.job.publishing, embedjob.stages.encode,
embedjob.stages.engine, embedjob.stages.session
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import ray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import embedjob
from embedjob.encoder.encoder import Encoder
from embedjob.errors import OutputError
from embedjob.job.options import Options
from embedjob.output.claim import read_claims
from embedjob.output.file_names import parse_name, with_generation
from embedjob.output.snapshot import newest_snapshot, open_snapshot, read_snapshot
from embedjob.output.snapshot import published as snapshot_numbers
from tests import running
from tests.cluster import Cluster
from tests.connection import NOWHERE, leave
from tests.engines import MARKER, MARKER_TOKEN, failing, late, losing
from tests.outputs import clone, instead, published, written
from tests.running import Job, Ran, texts, write_shard

pytestmark = pytest.mark.ray
SECONDS_OF_NOTHING = 5.0
INVALID = b"caf\xe9 \xff\xfe"


@dataclass(frozen=True)
class Corpus:
    """An input that was embedded, and how."""

    folder: Path
    document: Job
    ran: Ran

    @property
    def out(self) -> Path:
        return Path(self.document["output"]["path"])

    def to(self, out: Path, **sections: Job) -> Job:
        """The same job with another output."""
        changed = {**sections, "output": {"path": str(out), **sections.get("output", {})}}
        merged = {**self.document, **{k: {**self.document[k], **v} for k, v in changed.items()}}
        return merged


def _many_kinds(path: Path) -> None:
    """50 rows in five row groups: texts twice, one null, one that is no UTF-8, one empty."""
    bodies: list[bytes | None] = [text.encode() for text in texts(50)]
    bodies[3], bodies[14], bodies[20], bodies[33] = None, INVALID, b"", bodies[31]
    bodies[45] = bodies[5]
    raw = pa.array(bodies, pa.binary())
    body = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers(), raw.null_count)
    ids = [f"a-{i}" for i in range(50)]
    table = pa.table({"doc_id": ids, "body": body, "stars": pa.array(range(50), pa.int64())})
    pq.write_table(table, path, row_group_size=10)


@pytest.fixture(scope="module")
def corpus(cluster: Cluster, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Small row groups, no rows at all, one group below and one above eight chunks."""
    folder = tmp_path_factory.mktemp("corpus")
    source = folder / "in"
    source.mkdir()
    _many_kinds(source / "a.parquet")
    write_shard(source / "b.parquet", [], stars=pa.array([], pa.int64()))
    write_shard(source / "c.parquet", texts(25, seed=1), group_rows=25, stars=list(range(25)))
    write_shard(source / "d.parquet", texts(90, seed=2), group_rows=90, stars=list(range(90)))
    document = running.job(
        source,
        folder / "out",
        model,
        input={"keep": ["stars"]},
        run={"max_quarantined": 0.05},
    )
    return Corpus(folder, document, running.run(document, folder, "--address", cluster.address))


def _input_rows(source: Path, name: str) -> list[dict[str, object]]:
    """What the file holds, its text as bytes."""
    table = pq.read_table(source / name)
    body = table["body"].combine_chunks()
    raw = pa.Array.from_buffers(pa.binary(), len(body), body.buffers(), body.null_count)
    rows = table.set_column(table.schema.get_field_index("body"), "body", raw).to_pylist()
    return [{**row, "shard": str(source / name), "row": i} for i, row in enumerate(rows)]


def _good_rows(source: Path) -> list[dict[str, object]]:
    names = sorted(path.name for path in source.glob("*.parquet"))
    rows = [row for name in names for row in _input_rows(source, name)]
    return [row for row in rows if row["body"] not in (None, INVALID)]


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.einsum("rd,rd->r", one, other) / norms


def _vectors(table: pa.Table) -> np.ndarray:
    return np.stack(table["embedding"].to_pylist()).astype(np.float64)


def _reference(document: Job, bodies: list[str]) -> np.ndarray:
    """The embeddings that the encoder gives by itself, without a job."""
    return Encoder.from_output(document["output"]["path"]).encode(bodies)


class TestOneRun:
    def test_it_ends_well_and_the_numbers_add_up(self, corpus: Corpus) -> None:
        assert corpus.ran.code == 0, corpus.ran.err
        summary = corpus.ran.summary
        running.require_sum(summary)
        # 5 row groups; one group of 25 rows is one chunk; one of 90 rows is split in nine.
        assert (summary["chunks_planned"], summary["chunks_written"]) == (15, 15)
        assert (summary["rows"], summary["quarantined"]) == (165, 2)
        # Of the two texts that are there twice, those in one chunk are embedded once.
        assert summary["deduplicated"] == 1
        assert summary["snapshot"] == str(corpus.out / "snapshots" / "00000001.json")
        assert sum(summary["time_share"].values()) == pytest.approx(1, abs=0.01)

    def test_its_summary_is_kept_beside_its_snapshot(self, corpus: Corpus) -> None:
        kept = json.loads((corpus.out / "runs" / "00000001.json").read_text())
        assert kept == corpus.ran.summary

    def test_every_row_is_there_once_in_order_with_what_it_carries(self, corpus: Corpus) -> None:
        rows = published(corpus.out).drop_columns(["embedding", "truncated"]).to_pylist()
        wanted = _good_rows(corpus.folder / "in")
        assert [(row["shard"], row["row"], row["id"], row["stars"]) for row in rows] == [
            (row["shard"], row["row"], row["doc_id"], row["stars"]) for row in wanted
        ]
        assert all(0 < row["tokens"] <= 24 for row in rows)

    def test_the_vectors_are_those_of_the_encoder_alone(self, corpus: Corpus) -> None:
        bodies = [row["body"].decode() for row in _good_rows(corpus.folder / "in")]
        vectors = _vectors(published(corpus.out))
        assert _cosines(vectors, _reference(corpus.document, bodies)).min() >= 0.99999
        # And they differ from row to row, or the line above would say little.
        assert _cosines(vectors[:1], vectors[1:2]).max() < 0.9999

    def test_bad_rows_are_set_aside_with_reasons_and_the_empty_string_is_none(
        self, corpus: Corpus
    ) -> None:
        files = sorted((corpus.out / "quarantine").rglob("*.parquet"))
        rows = [row for file in files for row in pq.read_table(file).to_pylist()]
        assert [(row["row"], row["id"], row["reason"]) for row in rows] == [
            (3, "a-3", "null_text"),
            (14, "a-14", "invalid_utf8"),
        ]
        snapshot = newest_snapshot(str(corpus.out))
        assert [str(corpus.out / path) for path in snapshot.quarantine] == list(map(str, files))
        embedded = published(corpus.out).filter(pc.equal(pc.field("id"), "a-20"))
        assert len(embedded) == 1

    def test_the_empty_shard_is_named_in_the_snapshot(self, corpus: Corpus) -> None:
        shards = {shard["url"]: shard for shard in newest_snapshot(str(corpus.out)).shards}
        empty = shards[str(corpus.folder / "in" / "b.parquet")]
        assert (empty["rows"], empty["complete"]) == (0, True)
        assert len(shards) == 4

    def test_readers_need_nothing_of_ours(self, corpus: Corpus) -> None:
        dataset = open_snapshot(str(corpus.out))
        assert dataset.count_rows() == 163
        assert dataset.schema.field("embedding").type.list_size == 32

    def test_it_verifies(self, corpus: Corpus) -> None:
        ran = running.command("verify", str(corpus.out), "--json")
        assert (ran.code, ran.summary["problems"]) == (0, [])
        assert (ran.summary["files"], ran.summary["rows"]) == (15, 163)

    def test_a_second_run_does_nothing_in_seconds_and_starts_no_ray(
        self, corpus: Corpus, tmp_path: Path
    ) -> None:
        leave()
        before, started = written(corpus.out), time.monotonic()
        ran = running.run(corpus.document, tmp_path, "--address", NOWHERE)
        assert ran.code == 0, ran.err
        assert time.monotonic() - started < SECONDS_OF_NOTHING
        assert (ran.summary["chunks_done_before"], ran.summary["chunks_written"]) == (15, 0)
        assert "nothing to do" in ran.err
        assert written(corpus.out) == before
        assert not ray.is_initialized()

    def test_progress_is_told_in_lines(self, corpus: Corpus) -> None:
        lines = [line for line in corpus.ran.err.splitlines() if line.startswith("progress:")]
        assert "165/165 rows, 15/15 chunks" in lines[-1]
        assert "ETA" in lines[-1]


class TestWhatChanged:
    def test_a_changed_shard_costs_only_its_own_chunks(
        self, corpus: Corpus, cluster: Cluster, tmp_path: Path
    ) -> None:
        out = clone(corpus.out, tmp_path / "out")
        before = written(out)
        shard = corpus.folder / "in" / "c.parquet"
        fresh = texts(12, seed=9)
        with instead(shard, lambda path: write_shard(path, fresh, stars=list(range(12)))):
            ran = running.run(corpus.to(out), tmp_path, "--address", cluster.address)
            assert ran.code == 0, ran.err
            assert (ran.summary["chunks_done_before"], ran.summary["chunks_written"]) == (14, 2)
            after = written(out)
            # Nothing that was there is touched, and the new snapshot names none of the old.
            assert {name: after[name] for name in before} == before
            table = published(out)
            mine = table.filter(pc.equal(table["shard"], str(shard)))
            assert mine["row"].to_pylist() == list(range(12))
            assert _cosines(_vectors(mine), _reference(corpus.document, fresh)).min() >= 0.99999
            assert len(table) == 163 - 25 + 12
            snapshots = [read_snapshot(str(out), epoch) for epoch in (1, 2)]
            assert {file.path for file in snapshots[0].files} - {
                file.path for file in snapshots[1].files
            } == {f.path for f in snapshots[0].files if f.shard == str(shard)}
            self._prune(out, old=snapshots[0], new=snapshots[1])

    def _prune(self, out: Path, *, old: object, new: object) -> None:
        for spares in (("--keep", "2", "--grace", "0s"), ("--keep", "1")):
            kept = running.command("prune", str(out), *spares)
            assert (kept.code, "0 files and 0 snapshots deleted" in kept.out) == (0, True)
        pruned = running.command("prune", str(out), "--keep", "1", "--grace", "0s")
        assert (pruned.code, "1 file and 1 snapshot deleted" in pruned.out) == (0, True)
        assert {f"data/{path.parent.name}/{path.name}" for path in out.rglob("data/*/*")} == {
            file.path for file in new.files
        }
        assert running.command("verify", str(out)).code == 0
        assert old.epoch not in snapshot_numbers(str(out))

    @pytest.mark.slow
    def test_damage_is_found_and_repaired_and_nothing_else_is_done_again(
        self, corpus: Corpus, cluster: Cluster, tmp_path: Path
    ) -> None:
        out = clone(corpus.out, tmp_path / "out")
        before = written(out)
        damaged = sorted((out / "data").rglob("*.parquet"))[4]
        content = bytearray(damaged.read_bytes())
        content[len(content) // 3] ^= 1
        damaged.write_bytes(content)
        assert running.command("verify", str(out)).code == 1
        ran = running.run(corpus.to(out), tmp_path, "--address", cluster.address, "--repair")
        assert ran.code == 0, ran.err
        assert ran.summary["chunks_written"] == 1
        assert "repair: to be made again: 1 chunk\n" in ran.err
        after = written(out)
        # The damaged file stays as it is: what is made again has a name of its own.
        assert {name: after[name] for name in before} == before | {
            damaged.name: after[damaged.name]
        }
        assert after.keys() - before.keys() == {with_generation(damaged.name, 2)}
        assert running.command("verify", str(out)).code == 0
        assert (
            published(out)
            .drop_columns(["embedding"])
            .equals(published(corpus.out).drop_columns(["embedding"]))
        )

    @pytest.mark.slow
    def test_a_trial_reads_its_rows_exactly_and_filters_after(
        self, corpus: Corpus, cluster: Cluster, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        document = corpus.to(
            out, input={"filter": [["stars", ">=", 2]]}, run={"limit": 23, "max_quarantined": 0.2}
        )
        ran = running.run(document, tmp_path, "--address", cluster.address)
        assert ran.code == 0, ran.err
        rows = published(out)["row"].to_pylist()
        assert rows == [row for row in range(2, 23) if row not in (3, 14)]
        assert (ran.summary["rows"], ran.summary["chunks_written"]) == (21, 3)
        assert running.command("verify", str(out)).code == 0
        # The same rows again are nothing to do; a whole corpus may not be replaced by a trial.
        assert running.run(document, tmp_path, "--address", NOWHERE).code == 0
        to_device = corpus.to(corpus.out, run={"limit": 23})
        refused = running.run(to_device, tmp_path, "--address", NOWHERE)
        assert (refused.code, "run.limit" in refused.err) == (2, True)


class TestOtherRecipes:
    @pytest.mark.slow
    def test_another_recipe_is_refused_then_written_beside_and_switched(
        self, corpus: Corpus, cluster: Cluster, tmp_path: Path
    ) -> None:
        out = clone(corpus.out, tmp_path / "out")
        before, first = written(out), newest_snapshot(str(out))
        other = corpus.to(out, encoder={"pooling": "max"}, input={"path": _one_shard(corpus)})
        refused = running.run(other, tmp_path, "--address", NOWHERE)
        assert refused.code == 2
        assert 'pooling: the output has "mean", this job has "max"' in refused.err
        assert first.fingerprint[:12] in refused.err
        options = ("--address", cluster.address, "--new-fingerprint")
        refused = running.run(other, tmp_path, *options)
        assert (refused.code, "--new-input" in refused.err) == (2, True)
        ran = running.run(other, tmp_path, *options, "--new-input")
        assert ran.code == 0, ran.err
        second = newest_snapshot(str(out))
        assert second.fingerprint == ran.summary["fingerprint"] != first.fingerprint
        assert second.fingerprint[:12] in ran.summary["snapshot"] or second.epoch == 2
        assert {name: written(out)[name] for name in before} == before
        assert all(file.path.split("/")[1] == second.fingerprint[:12] for file in second.files)
        assert running.command("verify", str(out)).code == 0
        # The nights after the switch need no flag, also where there is something to embed.
        both = corpus.to(out, encoder={"pooling": "max"})
        ran = running.run(both, tmp_path, "--address", cluster.address, "--new-input")
        assert (ran.code, ran.summary["chunks_written"] > 0) == (0, True), ran.err
        # Back to the first one: asked for again, and done without a model.
        back = corpus.to(out)
        refused = running.run(back, tmp_path, "--address", NOWHERE)
        assert (refused.code, "--new-fingerprint" in refused.err) == (2, True)
        again = running.run(back, tmp_path, "--address", NOWHERE, "--new-fingerprint")
        assert again.code == 0, again.err
        assert newest_snapshot(str(out)).fingerprint == first.fingerprint

    def test_other_chunk_rows_are_refused_with_their_cost(
        self, corpus: Corpus, tmp_path: Path
    ) -> None:
        document = corpus.to(corpus.out, output={"chunk_rows": 20})
        ran = running.run(document, tmp_path, "--address", NOWHERE)
        assert ran.code == 2
        assert "got 20, but this output was started with 10" in ran.err
        assert "embedded and stored again" in " ".join(ran.err.split())

    def test_the_other_kind_of_lists_is_refused(self, corpus: Corpus, tmp_path: Path) -> None:
        document = corpus.to(corpus.out, output={"vector_list": "variable"})
        ran = running.run(document, tmp_path, "--address", NOWHERE)
        said = " ".join(ran.err.split())
        assert (ran.code, "output.vector_list: got variable" in said) == (2, True)
        assert "started with fixed" in said

    @pytest.mark.slow
    def test_vectors_that_are_not_reproduced_stop_the_run_before_it_writes(
        self, corpus: Corpus, cluster: Cluster, tmp_path: Path
    ) -> None:
        out = clone(corpus.out, tmp_path / "out")
        sorted((out / "data").rglob("*.parquet"))[0].unlink()
        claim = out / "_embedjob.json"
        document = json.loads(claim.read_text())
        document["probes"]["vectors"][1][0] += 0.5
        claim.write_text(json.dumps(document))
        before = written(out)
        ran = running.run(corpus.to(out), tmp_path, "--address", cluster.address)
        assert ran.code == 2
        assert (
            "the model gives other vectors than when this output was started: got a cosine of"
            in ran.err
        )
        assert document["probes"]["texts"][1] in ran.err
        assert "Traceback" not in ran.err
        assert written(out) == before
        # It held the lease, so that its summary says that nothing was written.
        kept = json.loads((out / "runs" / "00000002.json").read_text())
        assert (kept["chunks_written"], kept["snapshot"]) == (0, None)
        assert newest_snapshot(str(out)).epoch == 1


def _one_shard(corpus: Corpus) -> str:
    return str(corpus.folder / "in" / "c.parquet")


class TestAsALibrary:
    @pytest.mark.slow
    def test_a_job_is_a_mapping_planned_and_run(
        self, corpus: Corpus, cluster: Cluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        document = corpus.to(tmp_path / "out", input={"path": _one_shard(corpus)})
        planned = embedjob.plan(document, sets=["run.limit=20"])
        assert (len(planned.left), planned.rows) == (1, 20)
        capfd.readouterr()
        result = embedjob.run(document, sets=["run.limit=20"], address=cluster.address)
        assert capfd.readouterr().err == ""
        assert result.faults == ()
        assert result.summary.rows == embedjob.open_snapshot(result.out).count_rows() == 20
        assert result.summary.fingerprint == planned.job.fingerprint
        again = embedjob.plan(running.job_file(document, tmp_path), sets=["run.limit=20"])
        assert (again.left, again.done) == ((), tuple(chunk.name for chunk in again.chunks))
        with pytest.raises(OutputError, match=r"got 5, but this output was started with 10"):
            embedjob.run(document, sets=["run.limit=20", "output.chunk_rows=5"])


@pytest.mark.slow
class TestQuantised:
    def test_every_run_and_every_query_goes_by_the_ranges_of_the_first(
        self, corpus: Corpus, cluster: Cluster, tmp_path: Path
    ) -> None:
        out, source = tmp_path / "out", tmp_path / "in"
        source.mkdir()
        shutil.copy(corpus.folder / "in" / "c.parquet", source / "c.parquet")
        document = corpus.to(out, input={"path": str(source)}, encoder={"vector_dtype": "int8"})
        ran = running.run(document, tmp_path, "--address", cluster.address)
        assert ran.code == 0, ran.err
        assert "the ranges of int8 come from 25 vectors" in ran.err
        claim, first = read_claims(str(out))[0], published(out)
        assert first.schema.field("embedding").type.value_type == pa.int8()
        # More input, of vectors that the first sample did not see; and a file that was lost.
        shutil.copy(corpus.folder / "in" / "a.parquet", source / "a.parquet")
        next((out / "data").rglob("*.parquet")).unlink()
        again = running.run(document, tmp_path, "--address", cluster.address)
        assert again.code == 0, again.err
        assert again.summary["chunks_written"] == 6
        assert read_claims(str(out)) == (claim,)
        verified = running.command("verify", str(out), "--json")
        assert (verified.code, verified.summary["problems"]) == (0, [])
        self._compare(out, source, first)

    def _compare(self, out: Path, source: Path, first: pa.Table) -> None:
        """With what this process makes by itself, from the output alone."""
        table = published(out)
        encoder = Encoder.from_output(str(out))
        bodies = [row["body"].decode() for row in _good_rows(source)]
        floats, codes = encoder.encode(bodies), encoder.encode_stored(bodies)
        stored = np.stack(table["embedding"].to_pylist()).astype(np.int16)
        assert (codes.dtype, stored.shape) == (np.int8, (73, 32))
        assert np.abs(codes.astype(np.int16) - stored).max() <= 1
        assert (codes == stored).mean() > 0.98  # the last bit of a float decides at the very ends
        mine = table.filter(pc.equal(table["shard"], str(source / "c.parquet")))
        before = np.stack(first["embedding"].to_pylist()).astype(np.int16)
        assert np.abs(np.stack(mine["embedding"].to_pylist()) - before).max() <= 1
        # The sample was the first shard: its ends are the ends, and others go beyond them.
        assert before.min(axis=0).max() <= -127
        assert before.max(axis=0).min() >= 126
        low, high = encoder.ranges
        assert ((floats < low) | (floats > high)).any()


class TestBadRows:
    @pytest.mark.slow
    def test_too_many_fail_the_run_with_everything_committed(
        self, corpus: Corpus, cluster: Cluster, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        source = str(corpus.folder / "in" / "a.parquet")
        document = corpus.to(out, input={"path": source}, run={"max_quarantined": 0.03})
        ran = running.run(document, tmp_path, "--address", cluster.address)
        assert ran.code == 1
        assert "2 of 50 rows are quarantined, allowed is 3.00%" in ran.err
        assert "nothing was published" in ran.err
        assert (ran.summary["chunks_written"], ran.summary["snapshot"]) == (5, None)
        assert json.loads((out / "runs" / "00000001.json").read_text()) == ran.summary
        assert newest_snapshot(str(out)) is None
        problems = running.command("verify", str(out), "--json").summary["problems"]
        assert any("no snapshot is published" in problem for problem in problems)
        files = written(out)
        partial = running.run(document, tmp_path, "--address", NOWHERE, "--publish-partial")
        assert partial.code == 1
        assert len(published(out)) == 48
        assert written(out) == files
        # That they were published once does not make them fewer.
        again = running.run(document, tmp_path, "--address", NOWHERE)
        assert (again.code, "2 of 50 rows are quarantined" in again.err) == (1, True)

    @pytest.mark.slow
    def test_as_null_they_keep_their_place(
        self, corpus: Corpus, cluster: Cluster, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        source = str(corpus.folder / "in" / "a.parquet")
        document = corpus.to(out, input={"path": source, "on_bad_row": "null"})
        ran = running.run(document, tmp_path, "--address", cluster.address)
        assert ran.code == 0, ran.err
        running.require_sum(ran.summary)
        assert (ran.summary["nulls"], ran.summary["quarantined"]) == (2, 0)
        table = published(out)
        assert table["row"].to_pylist() == list(range(50))
        empty = table.filter(pc.is_null(table["embedding"]))
        assert empty["row"].to_pylist() == [3, 14]
        assert not (out / "quarantine").exists()
        assert running.command("verify", str(out)).code == 0


@pytest.fixture(scope="module")
def marker(model: Path) -> int:
    """The id that the marker has in the tiny tokenizer, and no other text."""
    found = Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id(MARKER_TOKEN)
    assert isinstance(found, int)
    return found


class TestTroubleWithTheModel:
    @pytest.mark.slow
    def test_a_row_that_breaks_the_model_is_isolated_and_can_be_retried(
        self, cluster: Cluster, model: Path, marker: int, tmp_path: Path
    ) -> None:
        bodies = texts(40)
        bodies[17] = MARKER + bodies[17]
        write_shard(tmp_path / "in" / "a.parquet", bodies)
        document = running.job(
            tmp_path / "in", tmp_path / "out", model, run={"max_quarantined": 0.1}
        )
        log = tmp_path / "log"
        result = running.run_with(
            document,
            Options(address=cluster.address),
            failing("raise", marker, log),
        )
        assert result.faults == ()
        running.require_sum(result.summary.as_dict())
        assert (result.summary.quarantined, result.summary.chunks_written) == (1, 4)
        rows = pq.read_table(tmp_path / "out" / "quarantine").to_pylist()
        assert [(row["row"], row["reason"]) for row in rows] == [(17, "model_error")]
        assert "cannot bear that token" in rows[0]["detail"]
        assert MARKER in rows[0]["excerpt"]
        assert len(log.read_text().splitlines()) > 2  # ten rows were halved, and one tried again
        self._retry(document, cluster, tmp_path, bodies)

    def _retry(self, document: Job, cluster: Cluster, folder: Path, bodies: list[str]) -> None:
        out = folder / "out"
        before = written(out)
        plain = running.run(document, folder, "--address", NOWHERE)
        assert (plain.code, plain.summary["chunks_written"]) == (0, 0)
        ran = running.run(document, folder, "--address", cluster.address, "--retry-quarantined")
        assert ran.code == 0, ran.err
        assert (ran.summary["chunks_written"], ran.summary["quarantined"]) == (1, 0)
        after = written(out)
        assert {name: after[name] for name in before} == before
        [again] = after.keys() - before.keys()
        assert parse_name(again).chunk in before
        assert newest_snapshot(str(out)).quarantine == ()
        table = published(out)
        assert table["row"].to_pylist() == list(range(40))
        assert _cosines(_vectors(table), _reference(document, bodies)).min() >= 0.99999

    @pytest.mark.slow
    def test_faults_are_named_and_cost_only_their_own_chunks(
        self, cluster: Cluster, model: Path, marker: int, tmp_path: Path
    ) -> None:
        """A truncated shard, one without a column, a bad row, a text that kills its actor."""
        source, out = tmp_path / "in", tmp_path / "out"
        killer = texts(30)
        killer[15] = MARKER + killer[15]
        write_shard(source / "a.parquet", killer, stars=list(range(30)))
        whole = write_shard(source / "b.parquet", texts(40, seed=1), stars=list(range(40)))
        cut = whole.read_bytes()
        whole.write_bytes(cut[: len(cut) // 2])
        write_shard(source / "c.parquet", texts(10, seed=2))
        bad: list[str | None] = [*texts(20, seed=3)]
        bad[12] = None
        write_shard(source / "d.parquet", bad, stars=list(range(20)))
        document = running.job(source, out, model, input={"keep": ["stars"], "on_bad_row": "fail"})
        log = tmp_path / "log"
        options = Options(address=cluster.address)
        result = running.run_with(document, options, failing("exit", marker, log))
        # Also the second time, when the text only lost the device.
        assert len(set(log.read_text().split())) == len(log.read_text().split()) == 3
        told = sorted(result.faults)
        assert len(told) == 4
        wanted = (
            ("a.parquet", "rows 10 to 20", "died 3 times"),
            ("b.parquet", "Parquet"),
            ("c.parquet", "stars"),
            ("d.parquet", "rows 10 to 20", "row 12 is bad: null_text"),
        )
        for fault, words in zip(told, wanted, strict=True):
            assert [word for word in words if word not in fault] == []
        assert (result.summary.chunks_written, result.summary.chunks_failed) == (3, 2)
        assert (len(written(out)), newest_snapshot(str(out))) == (3, None)
        # Mended, a plain run does what is left: the one chunk, the whole shards.
        before = written(out)
        whole.write_bytes(cut)
        write_shard(source / "c.parquet", texts(10, seed=2), stars=list(range(10)))
        (source / "d.parquet").unlink()
        ran = running.run(document, tmp_path, "--address", cluster.address)
        assert ran.code == 0, ran.err
        assert (ran.summary["chunks_done_before"], ran.summary["chunks_written"]) == (2, 6)
        assert {name: written(out)[name] for name in before} == before
        assert published(out)["row"].to_pylist() == [*range(30), *range(40), *range(10)]

    @pytest.mark.slow
    def test_a_file_that_somebody_deletes_meanwhile_is_a_fault(
        self, corpus: Corpus, cluster: Cluster, tmp_path: Path
    ) -> None:
        out = clone(corpus.out, tmp_path / "out")
        unfinished, lost, *_ = sorted((out / "data").rglob("*.parquet"))
        unfinished.unlink()
        options, engine_of = Options(address=cluster.address), losing(lost)
        result = running.run_with(corpus.to(out), options, engine_of)
        assert (result.summary.chunks_written, result.summary.snapshot) == (1, None)
        [fault] = result.faults
        assert f"the file {lost.name} is gone; run again" in fault
        assert unfinished.with_name(with_generation(unfinished.name, 2)).exists()

    @pytest.mark.slow
    def test_an_actor_that_does_not_load_on_a_bad_node_is_started_again(
        self, cluster: Cluster, model: Path, tmp_path: Path
    ) -> None:
        write_shard(tmp_path / "in" / "a.parquet", texts(200))
        out, log = tmp_path / "out", tmp_path / "log"
        document = running.job(tmp_path / "in", out, model, pool={"actors": 2})
        options = Options(address=cluster.address)
        result = running.run_with(document, options, late(log, out))
        assert result.faults == ()
        assert len(log.read_text().splitlines()) >= 2
        assert published(out)["row"].to_pylist() == list(range(200))

    @pytest.mark.slow
    def test_a_model_that_does_not_load_refuses_the_run_in_one_message(
        self, cluster: Cluster, model: Path, tmp_path: Path
    ) -> None:
        broken = tmp_path / "model"
        shutil.copytree(model, broken)
        weights = broken / "model.safetensors"
        whole = load_file(weights)
        part = {name: tensor for name, tensor in whole.items() if "layers.0" not in name}
        save_file(part, weights, {"format": "pt"})
        write_shard(tmp_path / "in" / "a.parquet", texts(30))
        document = running.job(tmp_path / "in", tmp_path / "out", broken)
        ran = running.run(document, tmp_path, "--address", cluster.address)
        assert ran.code == 2
        last = ran.err.strip().splitlines()[-1]
        assert last.startswith("embedjob: the encoder did not load: ")
        assert "Traceback" not in ran.err
        assert not (tmp_path / "out" / "data").exists()
        assert read_claims(str(tmp_path / "out")) == ()
