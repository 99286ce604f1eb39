"""Files of generations: what was put is read again, whatever call of storage was the last."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedjob.errors import ChunkError
from embedjob.input.chunks import Chunk, Shard
from embedjob.input.reading import read_chunk
from embedjob.job.options import Options
from embedjob.job.planning import JobPlan
from embedjob.job.result import Outcome
from embedjob.output.derived.generations import SCHEMA, GenerationFiles
from embedjob.output.fingerprint import text_projection
from embedjob.storage import objects
from embedjob.storage.objects import delete
from embedjob.text.conversations import Variant, text_hash
from tests.output.worlds import World

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
    assert table.schema.equals(SCHEMA)
    assert table.schema.metadata[b"embedjob.generator"] == b"f" * 64
    assert table["text_hash"].to_pylist()[::2] == [text_hash(text) for text in TEXTS if text]
    assert table["text"].to_pylist() == ["a fox!", None, "ein Fuchs é!", None]
    assert table["tokens"].to_pylist() == [3, 0, 3, 0]


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


class Generated(World):
    """A world whose runs generate before they commit, as GENERATE does."""

    generated: list[str]

    def _chunk(self, plan: JobPlan, chunk: Chunk, fails: bool) -> Outcome:
        rows = read_chunk(chunk, plan.job.config.input)
        texts = list(dict.fromkeys(text for text in rows["text"].to_pylist() if text))
        files = GenerationFiles(self.out, "f" * 64, text_projection(plan.job.config.input))
        if files.read(chunk, texts) is None:
            self.generated += texts
            files.put(chunk, texts, [(Variant("shorter", 0, text[::-1], 1),) for text in texts])
        return super()._chunk(plan, chunk, fails)

    def made(self) -> dict[str, bytes]:
        """The generations that are there, by their place."""
        places = Path(self.out, "generations").rglob("*.parquet")
        return {str(place): place.read_bytes() for place in places}


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_a_run_that_ends_at_any_moment_leaves_the_next_one_less_to_generate(
    stride: int, tmp_path: Path
) -> None:
    """And what was put is never made again, nor deleted by a prune."""
    for moment in range(1, 2000, stride):
        world = Generated(tmp_path / str(moment))
        world.generated = []
        with world.running():
            world.write("in/a", 12, 1)
            world.write("in/b", 7, 1)
            first = world.run(Options(), stop_at=moment, how="die")
            put, before = world.made(), len(world.generated)
            assert world.run(Options()).code == 0
            after = world.made()
            assert put.items() <= after.items()

            assert len(after) == 3
            left = sum(pq.read_metadata(place).num_rows for place in after.keys() - put.keys())
            assert len(world.generated) - before == left
            world.prune()
            assert world.made() == after
        if first.calls < moment:
            break
    else:
        pytest.fail("a run has more moments than this")
