"""`embedjob.plan` lists and reads; nothing is put, and no directory is made."""

from pathlib import Path

import pytest

import embedjob
from embedjob.errors import InputError, OutputError
from embedjob.storage.objects import list_files
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
