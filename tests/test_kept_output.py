"""An output that an earlier commit wrote: it resumes, verifies and answers queries as it did then.

`outputs_kept/make.py` made it, and says with which commit.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from embedjob.encoder.encoder import Encoder
from embedjob.output.snapshot import newest_snapshot, open_snapshot
from embedjob.storage.objects import create, delete, list_files
from tests import running
from tests.cluster import Cluster
from tests.connection import NOWHERE
from tests.running import Job
from tests.seaweed import S3Server

KEPT = Path(__file__).parent / "outputs_kept"
# What the output was made with: its name is part of file names, and of what the claim holds.
BUCKET = "embedjob-kept"
OUT = f"s3://{BUCKET}/out"
# Runs add to these folders; whatever lies in the others stands as it is.
OF_RUNS = (f"{OUT}/leases/", f"{OUT}/runs/")


@pytest.fixture(scope="module")
def kept_bucket(s3: S3Server) -> str:
    return s3.make_bucket(BUCKET)


@pytest.fixture
def job(kept_bucket: str, ray_settings: dict[str, str]) -> Job:
    """The job whose output lies in the bucket, as it was kept, whatever a test did to it."""
    for file in list_files(kept_bucket):
        delete(file.url)
    folder = KEPT / "bucket"
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        assert create(f"{kept_bucket}/{path.relative_to(folder)}", path.read_bytes())
    document: Job = json.loads((KEPT / "job.json").read_text())
    return document


def standing() -> dict[str, str]:
    """The etags of all that a run leaves alone unless it has work, by url."""
    files = list_files(f"s3://{BUCKET}")
    return {file.url: file.etag for file in files if not file.url.startswith(OF_RUNS)}


def rows() -> pa.Table:
    return open_snapshot(OUT).to_table()


def test_a_run_finds_nothing_to_do(job: Job, tmp_path: Path) -> None:
    before = standing()
    ran = running.run(job, tmp_path, "--address", NOWHERE)
    assert ran.code == 0, ran.err
    assert (ran.summary["chunks_done_before"], ran.summary["chunks_written"]) == (4, 0)
    assert standing() == before


def test_it_verifies(job: Job) -> None:
    ran = running.command("verify", OUT, "--json")
    assert (ran.code, ran.summary["problems"]) == (0, [])
    assert (ran.summary["files"], ran.summary["rows"]) == (4, 33)


@pytest.mark.ray
@pytest.mark.slow
def test_a_lost_chunk_alone_is_made_again(job: Job, cluster: Cluster, tmp_path: Path) -> None:
    snapshot, table, before = newest_snapshot(OUT), rows(), standing()
    assert snapshot is not None
    lost = f"{OUT}/{snapshot.files[1].path}"
    delete(lost)
    ran = running.run(job, tmp_path, "--address", cluster.address)
    assert ran.code == 0, ran.err
    assert (ran.summary["chunks_done_before"], ran.summary["chunks_written"]) == (3, 1)
    epoch = snapshot.epoch + 1
    after, published = standing(), f"{OUT}/snapshots/{epoch:08d}"
    # A name never holds two contents: the chunk has the run's epoch in its new name.
    made = {lost.replace(".parquet", f"-{epoch:08d}.parquet"), f"{published}.json"}
    made |= {f"{published}/{part}.parquet" for part in ("files-00000", "shards")}
    assert after.keys() == before.keys() - {lost} | made
    assert {url for url in before.keys() - {lost} if after[url] != before[url]} == set()
    again = rows()
    assert again.drop_columns("embedding").equals(table.drop_columns("embedding"))
    vectors, kept = (np.stack(one["embedding"].to_pylist()) for one in (again, table))
    assert np.einsum("rd,rd->r", vectors, kept).min() >= 0.99999
    # Other rows have other vectors, or the line above would say little.
    assert np.einsum("rd,rd->r", vectors[1:], kept[:-1]).max() < 0.9999
    verified = running.command("verify", OUT, "--json")
    assert (verified.code, verified.summary["problems"]) == (0, [])


def test_its_queries_have_the_vectors_that_they_had(job: Job) -> None:
    answers = json.loads((KEPT / "queries.json").read_text())
    vectors = Encoder.from_output(OUT).encode(list(answers), role="query")
    np.testing.assert_allclose(vectors, list(answers.values()), rtol=0, atol=1e-5)
    # By the role's own template: as a document each text has another vector.
    documents = Encoder.from_output(OUT).encode(list(answers), role="document")
    assert np.einsum("rd,rd->r", vectors, documents).max() < 0.9999
