"""`embedjob.plan` lists and reads; nothing is put, and no directory is made."""

from collections import Counter
from pathlib import Path

import pytest

import embedjob
from embedjob.errors import InputError, OutputError
from embedjob.storage.objects import list_files
from embedjob.storage.s3 import S3Backend
from tests.shards import write_shard


def document(tmp_path: Path, model: Path, out: str) -> dict[str, dict[str, object]]:
    write_shard(tmp_path / "in" / "a.parquet", {"t": ["a fox", "a dog", "a cat"]})
    return {
        "input": {"path": str(tmp_path / "in"), "text": "t"},
        "encoder": {"model": str(model), "max_tokens": 24},
        "pool": {"gpus_per_actor": 0},
        "output": {"path": out, "chunk_rows": 2},
    }


def test_a_plan_leaves_the_output_untouched(tmp_path: Path, model: Path, any_out: str) -> None:
    plan = embedjob.plan(document(tmp_path, model, any_out))
    assert (plan.rows, len(plan.left), plan.done, plan.faults) == (3, 1, (), ())
    assert plan.job.out == any_out
    assert list_files(any_out) == []
    assert not Path(any_out).exists()


def test_a_plan_is_made_also_where_nothing_may_be_written(tmp_path: Path, model: Path) -> None:
    """The probe of an output that can be listed is left to `run`."""
    job = document(tmp_path, model, "memory://out")
    assert len(embedjob.plan(job).left) == 1
    with pytest.raises(OutputError, match="memory of one process"):
        embedjob.run(job)


def test_a_plan_of_nothing_is_refused(tmp_path: Path, model: Path) -> None:
    job = document(tmp_path, model, str(tmp_path / "out"))
    job["input"]["path"] = str(tmp_path / "nowhere")
    with pytest.raises(InputError, match="nowhere"):
        embedjob.plan(job)


def test_a_plan_asks_for_the_models_files_once(
    tmp_path: Path, model: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is listed to fetch the texts and for the digests; so is each text read."""
    S3Backend().fs.put(str(model), f"{bucket}/model", recursive=True)
    monkeypatch.setenv("EMBEDJOB_CACHE", str(tmp_path / "cache"))
    job = document(tmp_path, model, str(tmp_path / "out"))
    job["encoder"]["model"] = f"{bucket}/model"
    asked: Counter[str] = Counter()

    def count(params: dict[str, str], **_: object) -> None:
        asked[f"{params['method']} {params['url_path']}"] += 1

    events = S3Backend().fs.s3.meta.events
    events.register("before-call.s3", count)
    try:
        embedjob.plan(job)
    finally:
        events.unregister("before-call.s3", count)
    assert asked.pop("GET ?list-type=2") == 2
    assert max(asked[f"GET /model/{name}"] for name in ("config.json", "tokenizer.json")) == 2
