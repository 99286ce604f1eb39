"""The job files and the demo data that ship: valid, complete, and as small as they say."""

import json
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from embedjob.config.job import ActorRange, Job
from embedjob.config.job_file import read_job
from embedjob.job.resolve import config_around, layer_recipes

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "jobs" / "configs"
DEMO = ROOT / "jobs" / "demo"


def _job(name: str) -> Job:
    source = read_job(CONFIGS / name)
    return config_around(layer_recipes(source, {}), source)


def test_quickstart_embeds_the_shipped_abstracts_with_shipped_weights() -> None:
    job = _job("quickstart.yaml")
    package, _, file = job.encoder.model.removeprefix("package:").partition("/")
    spec = find_spec(package)
    assert spec is not None, f"`make venv` installs {package}"
    assert (Path(str(spec.origin)).parent / file).is_file()
    assert (ROOT / str(job.input.path)).is_dir()
    assert (job.encoder.method, job.encoder.max_tokens) == ("prompteol", 64)
    assert job.encoder.templates == ('This sentence : "{text}" means in one word:"',)
    assert job.pool.gpus_per_actor == 0


def test_quickstart_makes_more_chunks_than_two_cores_have_actors() -> None:
    chunk_rows = _job("quickstart.yaml").output.chunk_rows
    for path in sorted((DEMO / "scifact").glob("*.parquet")):
        footer = pq.ParquetFile(path).metadata
        groups = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
        assert groups == [chunk_rows] * len(groups)
        assert len(groups) >= 2


def test_nightly_names_its_bucket_only_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET", "corpus-of-tonight")
    job = _job("nightly.yaml")
    assert job.input.path == "s3://corpus-of-tonight/docs/"
    assert job.output.path == "s3://corpus-of-tonight/embeddings/docs/"
    assert job.pool.actors == ActorRange(min=1, max=32)


def test_demo_data_is_complete_and_small() -> None:
    shards = sorted((DEMO / "scifact").glob("*.parquet"))
    assert sum(path.stat().st_size for path in shards) < 700_000
    rows = [row for path in shards for row in pq.read_table(path).to_pylist()]
    ids = {row["doc_id"] for row in rows}
    assert len(rows) == len(ids) == 600
    assert all(row["title"] and row["abstract"] for row in rows)
    claims = json.loads((DEMO / "queries.json").read_text(encoding="utf-8"))
    assert len(claims) == 3
    assert all(set(claim["relevant"]) <= ids for claim in claims)


def test_demo_data_says_where_it_is_from() -> None:
    text = (DEMO / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert all(word in text for word in ("SciFact", "ODC-By 1.0", "CC BY 4.0", "Semantic Scholar"))
