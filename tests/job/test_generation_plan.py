"""What a plan says of the generations that are left, before anything is generated."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from embedjob.config.job_file import JobSource
from embedjob.input.reading import read_chunk
from embedjob.job.generation_plan import generation_files, planned_generation, taken_over
from embedjob.job.options import Options
from embedjob.output.file_names import parse_name
from embedjob.storage.objects import list_files
from embedjob.text.conversations import Variant, text_hash
from tests.encoder.tiny import save_chat
from tests.output.job_worlds import JobWorld
from tests.shards import job_of


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat(tmp_path_factory.mktemp("chat-model"))


@pytest.fixture
def world(tmp_path: Path, chat: Path) -> Iterator[JobWorld]:
    """Two shards of three chunks and of one, and a job that generates two texts of each."""
    kinds = {"shorter": {"instruction": "Say less."}, "longer": {"instruction": "Say more."}}
    sections: dict[str, Any] = {
        "encoder": {"model": str(chat)},
        "generate": {"kinds": kinds, "max_new_tokens": 7, "max_prompt_tokens": 200},
        "pool": {"actors": 1, "gpus_per_actor": 0},
    }
    made = JobWorld(tmp_path, sections, inputs=tmp_path / "inputs")
    with made.running():
        made.write("in/a", 23, 1)
        made.write("in/b", 7, 1)
        yield made


def planned(world: JobWorld) -> Any:
    """The plan of the world's job, outside of any run."""
    return world.operate(lambda: world._planned(JobSource(()))).result


def test_a_plan_says_how_many_texts_and_tokens_are_left_at_most(world: JobWorld) -> None:
    generation = planned(world).generation
    assert generation.as_dict() == {"texts": 60, "tokens": 420}
    assert list_files(world.out) == []
    assert world.run(Options()).code == 0
    assert len(world.generated) * 2 <= 60
    assert planned(world).generation.as_dict() == {"texts": 0, "tokens": 0}
    # A shard that is new is all that is left.
    world.write("in/c", 9, 1)
    assert planned(world).generation.as_dict() == {"texts": 18, "tokens": 126}


def test_what_was_put_before_a_crash_is_not_left(world: JobWorld) -> None:
    total = world.run(Options()).calls
    world.out += "-again"
    seen = set()
    for moment in range(total // 3, total, total // 9):
        world.run(Options(), stop_at=moment, how="die")
        put = [parse_name(file.name) for file in list_files(f"{world.out}/generations")]
        seen.add(len(put))
        texts = planned(world).generation.texts
        assert texts == 60 - 2 * sum(name.stop - name.start for name in put)
    assert len(seen) > 1


def test_summaries_are_texts_too(world: JobWorld) -> None:
    world.sections["generate"] = {**world.sections["generate"], "summaries": True, "count": 3}
    assert planned(world).generation.texts == 30 * 2 * 3 * 2


def test_a_job_that_generates_nothing_says_so(world: JobWorld) -> None:
    del world.sections["generate"]
    assert planned(world).generation is None


def test_files_of_other_outputs_are_known_by_the_names_of_chunks(
    world: JobWorld, tmp_path: Path
) -> None:
    plan = planned(world)
    files = generation_files(plan.job)
    assert files is not None
    [first, *rest] = plan.left
    texts = read_chunk(first, plan.job.config.input)["text"].drop_null().to_pylist()
    other = type(files)(str(tmp_path / "other"), files.fingerprint, files.projection)
    made = [(Variant("shorter", 0, "less", 1),) for _ in texts[:2]]
    other.put(first, texts[:2], made)
    found = taken_over(files, [other.out, str(tmp_path / "nowhere")], plan.left)
    assert found == {files.name(first): [other.url(first)]}
    both = type(files)(files.out, files.fingerprint, files.projection, found)
    assert both.known(first) == dict(zip(map(text_hash, texts[:2]), map(list, made), strict=True))
    assert both.known(rest[0]) == {}
    # What is pruned meanwhile, or damaged, is made again.
    Path(other.url(first)).write_bytes(b"no Parquet")
    assert both.known(first) == {}
    Path(other.url(first)).unlink()
    assert both.known(first) == {}
    assert planned_generation(job_of(plan.job.config.input), plan.left) is None
