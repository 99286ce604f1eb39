"""The generating actor in this process, with a real generator and a ledger that is no actor."""

import errno
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from embedjob.config.job_file import job_source
from embedjob.input.chunks import Chunk, Shard
from embedjob.job.resolve import identify, resolve
from embedjob.output.derived.generations import GenerationFiles
from embedjob.output.lease import acquire
from embedjob.stages.chunk_state import ChunkState, from_block, to_block
from embedjob.stages.encode import PoolSize
from embedjob.stages.engine import PlannedFiles, recipe_engine
from embedjob.stages.language import generate
from embedjob.stages.language.generate import GenerateActor, GeneratorHost
from embedjob.stages.ledger import Attempt, LedgerState
from embedjob.stages.tokenize import VARIANTS
from embedjob.storage.local import LocalBackend
from tests.encoder.tiny import save_chat

KINDS = {"shorter": {"instruction": "Say less."}, "longer": {"instruction": "Say more."}}


class Here:
    """A ledger's methods as an actor's: what is called remotely is done at once."""

    def __init__(self) -> None:
        self.state = LedgerState(lambda: set())

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.state, name))


@pytest.fixture
def actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[GenerateActor, Here]:
    """An actor over an output in which nothing was generated yet."""
    monkeypatch.setattr(generate, "watch", lambda *_: None)
    monkeypatch.setattr(generate, "begin_parcel", lambda *_, **__: None)
    monkeypatch.setattr(generate, "begin_attempt", lambda *_, **__: Attempt(1, 600.0))
    document = {
        "input": {"path": "in", "text": "t"},
        "encoder": {"model": str(save_chat(tmp_path / "chat"))},
        "output": {"path": str(tmp_path / "out")},
        "pool": {"gpus_per_actor": 0},
        "generate": {"kinds": KINDS, "max_new_tokens": 5, "max_prompt_tokens": 200},
    }
    job = identify(resolve(job_source(document)))
    files = GenerationFiles(job.out, "f" * 64, "text")
    planned = PlannedFiles(job.config.encoder.model_dump_json(), tuple(job.digests.items()))
    lease = acquire(job.out, job="job")
    host = GeneratorHost(files, planned, lease, PoolSize(1, 1, 1.0, 0.0), threads=1)
    ledger = Here()
    return GenerateActor(recipe_engine(job.config, 1), lambda one: one, host, ledger), ledger


def states(shard: str, texts: Sequence[str]) -> pa.Table:
    chunk = Chunk(Shard(shard, 10, "etag"), 0, len(texts), (0, 1), 0, f"{shard}.parquet", 30, 100)
    rows = pa.table({"text": pa.array(texts, pa.large_string())})
    return to_block([ChunkState(chunk, rows, stats={"rows": len(texts)})])


def test_a_chunk_is_generated_put_and_told_of(actor: tuple[GenerateActor, Here]) -> None:
    generating, ledger = actor
    [state] = from_block(generating(states("/in/a", ["a fox", "a dog", " ", "a fox"])))
    assert state.failure is None
    assert state.rows is not None
    variants = state.rows[VARIANTS].to_pylist()
    assert [len(one) for one in variants] == [2, 2, 0, 2]
    assert variants[0] == variants[3]
    assert state.stats["generated"] + state.stats["generation_fallbacks"] == 4
    tally = ledger.state.tally()
    assert (tally.answers, tally.chunks_generated) == (4, 1)
    assert tally.answer_tokens == state.stats["generated_tokens"] > 0
    # Another chunk with one of these texts: the other alone is asked about.
    [later] = from_block(generating(states("/in/b", ["a dog", "a cow"])))
    assert later.rows is not None
    assert later.rows[VARIANTS].to_pylist()[0] == variants[1]
    assert later.stats["generations_reused"] + later.stats["generated"] <= 4
    tally = ledger.state.tally()
    assert (tally.answers, tally.chunks_generated) == (8, 2)
    # What was put is read again.
    [again] = from_block(generating(states("/in/a", ["a fox", "a dog", " ", "a fox"])))
    assert (again.stats["generated"], again.stats["generated_tokens"]) == (0, 0)
    assert again.rows is not None
    assert again.rows[VARIANTS].to_pylist() == variants
    assert ledger.state.tally().answers == 8


def test_blank_texts_load_no_generator(
    actor: tuple[GenerateActor, Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    generating, ledger = actor
    monkeypatch.setattr(generating, "_loaded", lambda: pytest.fail("a generator is loaded"))
    [state] = from_block(generating(states("/in/a", [" ", ""])))
    assert state.failure is None
    assert ledger.state.tally().chunks_generated == 1


def test_a_generator_that_runs_out_of_memory_is_the_fault_of_its_chunk_alone(
    actor: tuple[GenerateActor, Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    generating, _ = actor

    class Small:
        def generate(self, texts: Sequence[str], **_: Any) -> Any:
            raise MemoryError("no room for this chunk")

    with monkeypatch.context() as patch:
        patch.setattr(generating, "_loaded", Small)
        [state] = from_block(generating(states("/in/a", ["a fox"])))
    assert state.failure is not None
    assert (state.failure.kind, "MemoryError: no room" in state.failure.detail) == ("fault", True)
    [state] = from_block(generating(states("/in/b", ["a fox"])))
    assert state.failure is None


def test_storage_in_trouble_is_waited_for_and_nothing_is_made_again(
    actor: tuple[GenerateActor, Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    generating, _ = actor
    create, tried = LocalBackend.create, list[str]()

    def fail_twice(backend: LocalBackend, path: str, data: bytes) -> bool:
        tried.append(path)
        if len(tried) < 3:
            raise OSError(errno.ESTALE, "the disk is away for a while")
        return create(backend, path, data)

    monkeypatch.setattr(LocalBackend, "create", fail_twice)
    [state] = from_block(generating(states("/in/a", ["a fox", "a dog"])))
    assert state.failure is None
    assert len(tried) == 3
    assert state.stats["generated"] + state.stats["generation_fallbacks"] == 4
    [again] = from_block(generating(states("/in/a", ["a fox", "a dog"])))
    assert again.stats["generated"] == 0
