"""Nights on a real Ray: what changed is embedded, the rest takes over vectors that are there.

A corpus of yesterday is embedded once for this file, and copied for each night.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import embedjob
from embedjob.job.options import Options
from embedjob.job.result import Result
from embedjob.output import cleanup
from embedjob.output.claim import read_claims
from embedjob.output.snapshot import Snapshot, newest_snapshot, publish
from embedjob.stages.reuse import take_over
from tests import running
from tests.cluster import Cluster
from tests.engines import counting, texts_encoded
from tests.outputs import clone, published
from tests.running import Job, texts, write_shard

pytestmark = pytest.mark.ray
SHARDS, ROWS = 3, 40
NEW = 6


@dataclass(frozen=True)
class Yesterday:
    """A corpus that was embedded, and the address of the cluster."""

    folder: Path
    model: Path
    address: str

    @property
    def bodies(self) -> list[str]:
        return [text for shard in range(SHARDS) for text in texts(ROWS, seed=shard)]

    def document(self, source: Path, out: str | Path, **sections: Job) -> Job:
        keep = {"input": {"keep": ["stars"]}, "run": {"max_quarantined": 0.1}}
        return running.job(source, out, self.model, **{**keep, **sections})

    def night(self, source: Path, out: str | Path, log: Path, **sections: Job) -> Result:
        """A run whose encoders count the texts that they are given."""
        document = self.document(source, out, **sections)
        options = Options(address=self.address, new_input=True, allow_shrink=True)
        return running.run_with(document, options, counting(log))


def write_rows(path: Path, bodies: Sequence[str | None], first: int = 0) -> None:
    stars = [first + number for number in range(len(bodies))]
    write_shard(path, bodies, stars=stars)


@pytest.fixture(scope="module")
def yesterday(cluster: Cluster, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Yesterday:
    folder = tmp_path_factory.mktemp("yesterday")
    made = Yesterday(folder, model, cluster.address)
    for shard in range(SHARDS):
        write_rows(folder / "in" / f"{shard}.parquet", made.bodies[shard * ROWS :][:ROWS])
    result = made.night(folder / "in", folder / "out", folder / "log")
    assert (result.faults, result.summary.reused) == ((), 0)
    return made


def encoded(log: Path) -> int:
    """How many texts encoders were given; none where no model was loaded."""
    return texts_encoded(log) if log.exists() else 0


def vectors(table: pa.Table) -> np.ndarray:
    return np.stack(table["embedding"].to_pylist())


def by_text(out: Path) -> dict[bytes, list[float]]:
    table = published(out)
    return dict(zip(table["text_hash"].to_pylist(), table["embedding"].to_pylist(), strict=True))


def test_a_night_embeds_the_new_texts_alone_and_equals_a_full_run(
    yesterday: Yesterday, tmp_path: Path
) -> None:
    """Other files and other cuts; texts edited, deleted, new, twice and null; another column.

    Of the new ones, some are in several chunks.
    """
    tonight: list[str | None] = [*yesterday.bodies]
    for number in range(0, 3 * NEW, 3):
        tonight[number] = f"{tonight[number]} edited"
    del tonight[50:58]
    tonight[60:60] = [f"a new text of number {number}" for number in range(NEW)]
    tonight[20], tonight[90] = None, tonight[4]
    tonight[95], tonight[100] = tonight[0], tonight[60]
    for part, start in enumerate(range(0, len(tonight), 26)):
        write_rows(
            tmp_path / "in" / f"part-{part}.parquet", tonight[start : start + 26], 1000 + start
        )
    out = clone(yesterday.folder / "out", tmp_path / "out")
    before = by_text(out)
    plan = embedjob.plan(yesterday.document(tmp_path / "in", out), reusable=True)
    result = yesterday.night(tmp_path / "in", out, tmp_path / "log")
    assert result.faults == ()
    summary = result.summary.as_dict()
    assert plan.rows_reusable == summary["reused"]
    running.require_sum(summary)
    assert (summary["embedded"], encoded(tmp_path / "log")) == (2 * NEW + 2, 2 * NEW)
    assert (summary["reused"], summary["quarantined"]) == (len(tonight) - 2 * NEW - 3, 1)

    full = yesterday.night(tmp_path / "in", tmp_path / "full", tmp_path / "full-log")
    assert (full.faults, full.summary.reused) == ((), 0)
    ours, theirs = published(out), published(tmp_path / "full")
    columns = [name for name in theirs.column_names if name != "embedding"]
    assert ours.schema == theirs.schema
    assert ours.select(columns) == theirs.select(columns)
    assert (vectors(ours) * vectors(theirs)).sum(axis=1).min() >= 0.99999
    taken = {text: one for text, one in by_text(out).items() if text in before}
    assert len(taken) > 90
    assert taken == {text: before[text] for text in taken}
    assert running.command("verify", str(out), "--json").summary["ok"]


@pytest.mark.slow
def test_a_run_that_takes_over_everything_loads_no_model(
    yesterday: Yesterday, tmp_path: Path
) -> None:
    """Other names, another order and no kept column; the run after it has nothing to do."""
    tonight = yesterday.bodies[::-1]
    write_rows(tmp_path / "in" / "all.parquet", tonight)
    out = clone(yesterday.folder / "out", tmp_path / "out")
    sections: dict[str, Job] = {"input": {"keep": []}}
    result = yesterday.night(tmp_path / "in", out, tmp_path / "log", **sections)
    assert (result.faults, result.summary.reused) == ((), len(tonight))
    assert not (tmp_path / "log").exists()
    assert by_text(out) == by_text(yesterday.folder / "out")
    again = yesterday.night(tmp_path / "in", out, tmp_path / "log", **sections)
    assert again.summary.chunks_written == 0
    done = embedjob.plan(yesterday.document(tmp_path / "in", out, **sections), reusable=True)
    assert (done.left, done.rows_reusable) == ((), 0)
    assert running.command("verify", str(out), "--json").summary["ok"]


@pytest.mark.slow
def test_another_output_gives_its_vectors_to_a_new_one(
    yesterday: Yesterday, tmp_path: Path
) -> None:
    """The new output has a claim of its own, by its own encoder."""
    other = yesterday.folder / "out"
    output: Job = {"path": str(tmp_path / "out"), "reuse_from": [str(other)]}
    result = yesterday.night(
        yesterday.folder / "in", tmp_path / "out", tmp_path / "log", output=output
    )
    assert (result.faults, result.summary.reused) == ((), SHARDS * ROWS)
    assert encoded(tmp_path / "log") == 0
    [claim] = read_claims(str(tmp_path / "out"))
    assert claim.probes.vectors
    assert by_text(tmp_path / "out") == by_text(other)


def test_an_output_of_another_recipe_is_refused_before_a_model_is_loaded(
    yesterday: Yesterday, tmp_path: Path
) -> None:
    other = str(yesterday.folder / "out")
    document = yesterday.document(
        yesterday.folder / "in",
        tmp_path / "out",
        encoder={"max_tokens": 20},
        output={"path": str(tmp_path / "out"), "reuse_from": [other]},
    )
    ran = running.run(document, tmp_path, "--address", yesterday.address)
    assert ran.code == 2
    snapshot = newest_snapshot(other)
    assert snapshot is not None
    assert (
        f"output.reuse_from: {other} has vectors of fingerprint {snapshot.fingerprint[:12]}"
        in ran.err
    )
    assert not (tmp_path / "out").exists()


def _replace_corpus(out: str, kept: int) -> None:
    """Another run has published: of the files that were there, its snapshot lists so many."""
    before = newest_snapshot(out)
    assert before is not None
    files = before.files[:kept]
    publish(out, Snapshot(before.epoch + 1, before.fingerprint, files=files, shards=()))


MOMENTS = {"before keys are read": "_found", "before vectors are gathered": "gather_groups"}


@pytest.mark.slow
@pytest.mark.parametrize("kept", [pytest.param(0, marks=pytest.mark.chaos), 5])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_prune_of_the_other_output_costs_embedding_and_is_no_fault(
    moment: str, kept: int, yesterday: Yesterday, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files go while the night runs, which has them on its list already."""
    other = str(clone(yesterday.folder / "out", tmp_path / "other"))
    asked, pruned = getattr(take_over, MOMENTS[moment]), []

    def prune_before(*given: Any) -> Any:
        _replace_corpus(other, kept)
        pruned.append(cleanup.prune(other, keep=1, grace_seconds=0))
        return asked(*given)

    monkeypatch.setattr(take_over, MOMENTS[moment], prune_before)
    output: Job = {"path": str(tmp_path / "out"), "reuse_from": [other]}
    source, log = yesterday.folder / "in", tmp_path / "log"
    result = yesterday.night(source, tmp_path / "out", log, output=output)
    assert len(pruned) == 1
    assert (result.faults, result.summary.reused) == ((), 10 * kept)
    assert encoded(log) == SHARDS * ROWS - 10 * kept
    ours, full = published(tmp_path / "out"), published(yesterday.folder / "out")
    columns = [name for name in full.column_names if name != "embedding"]
    assert ours.select(columns) == full.select(columns)
    assert (vectors(ours) * vectors(full)).sum(axis=1).min() >= 0.99999
    assert running.command("verify", str(tmp_path / "out"), "--json").summary["ok"]


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_codes_are_taken_over_under_equal_ranges_alone(
    yesterday: Yesterday, tmp_path: Path
) -> None:
    """Within an output always; of another output, if it has the same ranges."""
    int8: Job = {"encoder": {"vector_dtype": "int8"}}
    source, logs = yesterday.folder / "in", iter(tmp_path / f"log-{n}" for n in range(9))

    def night(source: Path, out: Path, *others: Path) -> tuple[int, int]:
        log = next(logs)
        output: Job = {"path": str(out), "reuse_from": [*map(str, others)]}
        result = yesterday.night(source, out, log, output=output, **int8)
        assert result.faults == ()
        assert running.command("verify", str(out), "--json").summary["ok"]
        # The sample of the ranges counts apart.
        return result.summary.reused, result.summary.embedded

    def ranges(out: Path) -> Any:
        [claim] = read_claims(str(out))
        assert claim.calibration is not None
        return claim.calibration.array

    first, equal, apart = (tmp_path / name for name in ("first", "equal", "apart"))
    every = SHARDS * ROWS
    assert night(source, first) == (0, every)
    tonight = [f"{body} edited" if n < NEW else body for n, body in enumerate(yesterday.bodies)]
    write_rows(tmp_path / "in" / "all.parquet", tonight[::-1])
    codes = by_text(first)
    assert night(tmp_path / "in", first) == (every - NEW, NEW)
    assert [codes.get(one, row) for one, row in by_text(first).items()] == [
        *by_text(first).values()
    ]

    # A new output finds its ranges first; they are equal where the corpus is.
    assert night(source, equal, first) == (0, every)
    assert (ranges(equal) == ranges(first)).all()
    assert night(tmp_path / "in", equal, first) == (every, 0)
    assert by_text(equal) == by_text(first)

    write_rows(tmp_path / "few" / "a.parquet", yesterday.bodies[:ROWS])
    assert night(tmp_path / "few", apart, first) == (0, ROWS)
    assert (ranges(apart) != ranges(first)).any()
    own = by_text(apart)
    assert night(tmp_path / "in", apart, first) == (ROWS - NEW, every - ROWS + NEW)
    after = by_text(apart)
    taken = {one: row for one, row in after.items() if one in own}
    assert taken == {one: own[one] for one in taken}
    assert any(after[one] != row for one, row in by_text(first).items() if one not in own)
