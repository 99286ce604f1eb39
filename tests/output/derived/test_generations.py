"""Files of generations: what was put is read again, whatever call of storage was the last."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedjob.errors import ChunkError
from embedjob.input.chunks import Chunk, Shard
from embedjob.job.options import Options
from embedjob.output import cleanup
from embedjob.output.derived.generations import GENERATIONS_SCHEMA, GenerationFiles
from embedjob.reports.verify import verify
from embedjob.storage import objects
from embedjob.storage.objects import delete
from embedjob.text.conversations import Variant, text_hash
from tests.output.job_worlds import JobWorld

TEXTS = ["a fox", "", "ein Fuchs é"]
MADE = [
    (Variant("shorter", 0, f"{text}!", 3), Variant("shorter", 1, None, 0)) if text else ()
    for text in TEXTS
]
SHARD = Shard("/in/a.parquet", 10, "etag")
CHUNK = Chunk(SHARD, 0, 3, (0, 1), 0, "name.parquet", 30, 100)


@pytest.fixture
def files(out: str) -> GenerationFiles:
    return GenerationFiles(out, "f" * 64, "text")


def test_what_is_put_is_read_again(any_out: str) -> None:
    files = GenerationFiles(any_out, "f" * 64, "text")
    assert files.read(CHUNK, TEXTS) is None
    assert files.put(CHUNK, TEXTS, MADE) == MADE
    assert [tuple(one) for one in files.read(CHUNK, TEXTS) or ()] == MADE
    assert [tuple(one) for one in files.read(CHUNK, TEXTS[::-1]) or ()] == MADE[::-1]
    assert files.url(CHUNK).startswith(f"{any_out}/generations/ffffffffffff/in_a-")


def test_a_file_says_who_made_what_of_which_text(files: GenerationFiles) -> None:
    files.put(CHUNK, TEXTS, MADE)
    table = pq.read_table(files.url(CHUNK))
    assert table.schema.equals(GENERATIONS_SCHEMA)
    assert table.schema.metadata[b"embedjob.generator"] == b"f" * 64
    assert table["text_hash"].to_pylist()[::2] == [text_hash(text) for text in TEXTS if text]
    assert table["text"].to_pylist() == ["a fox!", None, "ein Fuchs é!", None]
    assert table["tokens"].to_pylist() == [3, 0, 3, 0]


def test_generations_of_some_texts_lie_apart_from_those_of_all(files: GenerationFiles) -> None:
    """Of the others the vectors are there: a file of all texts is made by a run that needs all."""
    some = files.of_some(CHUNK, TEXTS[:1])
    some.put(CHUNK, TEXTS[:1], MADE[:1])
    assert files.read(CHUNK, TEXTS) is None
    assert files.of_some(CHUNK, TEXTS[2:]).read(CHUNK, TEXTS[2:]) is None
    assert [
        tuple(one) for one in files.of_some(CHUNK, TEXTS[:1]).read(CHUNK, TEXTS[:1]) or ()
    ] == MADE[:1]


def test_what_was_there_first_stands(files: GenerationFiles) -> None:
    files.put(CHUNK, TEXTS, MADE)
    other = [tuple(Variant(one.kind, one.number, "other", 1) for one in made) for made in MADE]
    assert [tuple(one) for one in files.put(CHUNK, TEXTS, other)] == MADE


def test_another_generator_text_or_shard_has_other_files(out: str) -> None:
    chunk = Chunk(Shard("/in/a.parquet", 10, "etag 2"), 0, 3, (0, 1), 0, "n.parquet", 30, 100)
    part = Chunk(SHARD, 0, 2, (0, 1), 0, "n.parquet", 30, 100)
    files = GenerationFiles(out, "f" * 64, "text")
    urls = {
        files.url(CHUNK),
        files.url(chunk),
        files.url(part),
        GenerationFiles(out, "e" * 64, "text").url(CHUNK),
        GenerationFiles(out, "f" * 64, "title").url(CHUNK),
    }
    assert len(urls) == 5


def test_no_texts_have_a_file_too(files: GenerationFiles) -> None:
    assert files.put(CHUNK, [], []) == []
    assert files.read(CHUNK, []) == []


def test_a_file_of_other_texts_or_of_something_else_is_a_fault(files: GenerationFiles) -> None:
    files.put(CHUNK, TEXTS[:1], MADE[:1])
    with pytest.raises(ChunkError, match="has no generations for 1 of the chunk's 3 texts"):
        files.read(CHUNK, TEXTS)
    Path(files.url(CHUNK)).write_bytes(b"no Parquet")
    with pytest.raises(ChunkError, match="cannot be read"):
        files.read(CHUNK, TEXTS)
    delete(files.url(CHUNK))
    pq.write_table(pa.table({"text": ["a"]}), files.url(CHUNK))
    with pytest.raises(ChunkError, match="cannot be read"):
        files.read(CHUNK, TEXTS)


class Crash(BaseException):
    """The end of a process."""


class Dying:
    """A backend at whose call number `at`, counted before and after each, the process ends."""

    def __init__(self, backend: Any, moments: Iterator[int], at: int) -> None:
        self._backend, self._moments, self._at = backend, moments, at

    def __getattr__(self, name: str) -> Any:
        return partial(self._call, name)

    def _call(self, name: str, *arguments: Any) -> Any:
        self._moment()
        answer = getattr(self._backend, name)(*arguments)
        self._moment()
        return answer

    def _moment(self) -> None:
        if next(self._moments) == self._at:
            raise Crash


def made_once(files: GenerationFiles, generated: list[str]) -> list[Sequence[Variant]]:
    """What the stage does: read, or else generate and put."""
    standing = files.read(CHUNK, TEXTS)
    if standing is not None:
        return standing
    generated += TEXTS
    return files.put(CHUNK, TEXTS, MADE)


def test_a_process_may_end_at_any_call_of_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run after it has the same generations, and makes none that were put."""
    located, ended = objects.locate, 0
    for at in range(100):
        files = GenerationFiles(str(tmp_path / str(at)), "f" * 64, "text")
        generated: list[str] = []
        moments = iter(range(10_000))

        def dying(url: str, moments: Iterator[int] = moments, at: int = at) -> Any:
            backend, path, prefix = located(url)
            return Dying(backend, moments, at), path, prefix

        with monkeypatch.context() as patch:
            patch.setattr(objects, "locate", dying)
            try:
                made_once(files, generated)
            except Crash:
                ended += 1
        there = files.read(CHUNK, TEXTS) is not None
        before = len(generated)
        assert [tuple(one) for one in made_once(files, generated)] == MADE
        assert len(generated) - before == (0 if there else len(TEXTS))
        if ended <= at:
            break
    assert ended >= 4


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Here alone: transformers would cost the tests that need no model five seconds.
    from tests.encoder.tiny import save_chat

    return save_chat(tmp_path_factory.mktemp("chat-model"))


def generating(folder: Path, chat: Path) -> JobWorld:
    """A world whose job generates."""
    kinds = {"shorter": {"instruction": "Say less."}, "longer": {"instruction": "Say more."}}
    sections = {
        "encoder": {"model": str(chat)},
        "generate": {"kinds": kinds, "max_prompt_tokens": 100},
        "pool": {"actors": 1, "gpus_per_actor": 0},
    }
    return JobWorld(folder, sections, inputs=folder / "inputs")


@pytest.fixture
def world(tmp_path: Path, chat: Path) -> Iterator[JobWorld]:
    """Two shards of three and of one chunk, and a job that generates."""
    made = generating(tmp_path, chat)
    with made.running():
        made.write("in/a", 23, 1)
        made.write("in/b", 7, 1)
        yield made


def ended_well(world: JobWorld, **options: bool) -> None:
    ended = world.run(Options(**options))
    assert ended.code == 0, ended.error or ended.result
    world.look()
    world.check_success(ended)


def another_generator(world: JobWorld) -> None:
    """The same job with another seed, run beside the first."""
    world.sections["generate"] = {**world.sections["generate"], "seed": 1}
    ended_well(world, new_fingerprint=True)


def places(world: JobWorld) -> dict[str, set[str]]:
    """The names of generations, by the folder of their generator."""
    found: dict[str, set[str]] = {}
    for file in objects.list_files(f"{world.out}/generations"):
        found.setdefault(file.url.split("/")[-2], set()).add(file.name)
    return found


def test_a_prune_takes_what_no_kept_recipe_generated(world: JobWorld) -> None:
    ended_well(world)
    [first] = places(world)
    another_generator(world)
    both = places(world)
    assert [len(names) for names in both.values()] == [4, 4]
    assert world.prune(keep=2).result.generations == 0
    recent = world.operate(lambda: cleanup.prune(world.out, keep=1, grace_seconds=3600))
    assert recent.result.generations == 0
    assert places(world) == both
    pruned = world.prune(keep=1).result
    assert (pruned.generations, pruned.snapshots) == (4, 1)
    assert places(world) == {folder: both[folder] for folder in both if folder != first}
    before = len(world.generated)
    ended_well(world)
    assert len(world.generated) == before


def test_a_prune_that_cannot_know_what_generated_takes_nothing(world: JobWorld) -> None:
    ended_well(world)
    another_generator(world)
    both = places(world)
    for path in Path(world.out, "claims").iterdir():
        path.unlink()
    assert world.prune(keep=1).result.generations == 0
    assert places(world) == both


def test_no_file_of_other_names_is_taken_and_none_behind_a_link(tmp_path: Path, chat: Path) -> None:
    world = generating(tmp_path, chat)
    with world.running():
        world.write("in/a", 23, 1)
        ended_well(world)
        [first] = places(world)
        another_generator(world)
    home = Path(world.out).parent / "home"
    home.mkdir()
    name = min(places(world)[first])
    kept = [Path(world.out, "generations", first, "notes.md"), home / name]
    for path in kept:
        path.write_text("mine")
    Path(world.out, "generations", "0" * 12).symlink_to(home)
    # By the storage that knows links, and not that of a world.
    assert cleanup.prune(world.out, keep=1, grace_seconds=0).generations == 3
    assert [path.read_text() for path in kept] == ["mine", "mine"]


@pytest.mark.parametrize("how", ["die", "sleep"])
@pytest.mark.parametrize(
    "stride",
    [pytest.param(5, marks=pytest.mark.chaos), pytest.param(31, marks=pytest.mark.slow), 61],
)
def test_a_prune_that_stops_at_any_moment_takes_nothing_that_is_needed(
    how: str, stride: int, world: JobWorld
) -> None:
    ended_well(world)
    for moment in range(1, 3000, stride):
        seed = world.sections["generate"].get("seed", 42) + 1
        world.sections["generate"] = {**world.sections["generate"], "seed": seed}
        ended_well(world, new_fingerprint=True)
        needed = [*places(world).items()]
        pruned = world.prune(keep=1, stop_at=moment, how=how)
        world.look()
        before = len(world.generated)
        ended_well(world)
        if how == "sleep" and pruned.asleep:
            world.wake(0)
            world.look()
            ended_well(world)
        assert len(world.generated) == before
        world.prune(keep=1)
        assert len(places(world)) == 1
        assert next(iter(places(world).items())) in needed
        if pruned.calls < moment:
            break
    else:
        pytest.fail("a prune has more moments than this")


def damaged(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    table = pq.read_table(path)
    pq.write_table(change(table), path, write_page_checksum=True)


def test_verify_names_each_damage_of_a_generation(world: JobWorld) -> None:
    ended_well(world)
    assert verify(world.out).problems == ()
    [(folder, names)] = places(world).items()
    path = Path(world.out, "generations", folder, min(names))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1
    path.write_bytes(bytes(flipped))
    [problem] = verify(world.out).problems
    assert f"{path}: cannot be read" in problem
    path.write_bytes(whole[: len(whole) // 2])
    [problem] = verify(world.out).problems
    assert f"{path}: cannot be read" in problem
    changes: dict[str, Callable[[pa.Table], pa.Table]] = {
        f"names no generator, and its folder names {folder}": lambda table: (
            table.replace_schema_metadata()
        ),
        "names the generator eeeeeeeeeeee, and its": lambda table: table.replace_schema_metadata(
            {b"embedjob.generator": b"e" * 64}
        ),
        "has an answer twice": lambda table: pa.concat_tables([table, table.slice(0, 1)]),
        "its texts have 1 to 2 answers": lambda table: table.slice(1),
        "cannot be read": lambda table: table.drop_columns("tokens"),
    }
    for said, change in changes.items():
        path.write_bytes(whole)
        damaged(path, change)
        [problem] = verify(world.out).problems
        assert str(path) in problem
        assert said in problem
    # A file that is gone harms no reader, and is made again by the run that needs it.
    path.unlink()
    assert verify(world.out).problems == ()
