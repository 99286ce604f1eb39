"""Stages that a shard's name brings into trouble; they travel to workers, which import this module.

A shard is named by what befalls its one chunk: `encode-hangs.parquet`.
"""

import ctypes
import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa

from embedjob.config.job import Job
from embedjob.input.chunks import Chunk
from embedjob.input.reading import read_pass
from embedjob.job.output import output_spec
from embedjob.job.planning import JobPlan
from embedjob.output.chunk_file import Committed
from embedjob.stages.chunk_state import ChunkState
from embedjob.stages.encode import encode
from embedjob.stages.engine import Engine, RecipeEngine, recipe_engine
from embedjob.stages.read import ReadRows, read
from embedjob.stages.reuse.merging import Reuse
from embedjob.stages.tokenize import tokenize
from embedjob.stages.write import Committer, write
from embedjob.storage.local import LocalBackend

BUSY_SECONDS = 12.0
# An encoder sees no shard: the number of its texts tells which it is.
ROWS = {"encode-dies": 3, "encode-hangs": 4, "encode-memory": 5}


def _die() -> NoReturn:
    os._exit(1)


def _hang() -> None:
    ctypes.PyDLL(None).sleep(10_000)


def _run_out() -> NoReturn:
    raise MemoryError("no room for this chunk")


HOWS: dict[str, Callable[[], None]] = {"dies": _die, "hangs": _hang, "memory": _run_out}


def strike(stage: str, name: str) -> None:
    """Let happen what the name says of this stage."""
    its_stage, _, how = name.partition("-")
    if its_stage == stage and how in HOWS:
        HOWS[how]()


def _name(chunk: Chunk) -> str:
    return Path(chunk.shard.url).stem


def _is_busy(log: Path) -> bool:
    """Whether storage is still in trouble, which lasts from the first time that it is asked."""
    if not log.exists():
        log.write_text(str(time.time()))
    return time.time() - float(log.read_text()) < BUSY_SECONDS


@dataclass(frozen=True)
class Reads:
    """`read_pass` of a job, or trouble."""

    rows_of: ReadRows
    log: Path

    def __call__(self, chunks: Sequence[Chunk]) -> Iterator[pa.Table]:
        for chunk in chunks:
            strike("read", _name(chunk))
            if _name(chunk) == "read-busy" and _is_busy(self.log / "read"):
                raise OSError(errno.ESTALE, "the disk is away for a while")
        return self.rows_of(chunks)


@dataclass(frozen=True)
class Writes:
    """A commit, or trouble."""

    commit: Callable[[ChunkState], Committed]
    log: Path

    def __call__(self, state: ChunkState) -> Committed:
        strike("write", _name(state.chunk))
        if _name(state.chunk) != "write-busy":
            return self.commit(state)
        with _busy_disk(self.log / "write"):
            return self.commit(state)


@contextmanager
def _busy_disk(log: Path) -> Iterator[None]:
    create = LocalBackend.create
    _take_disk_away(log)
    try:
        yield
    finally:
        LocalBackend.create = create  # type: ignore[method-assign]


def _take_disk_away(log: Path) -> None:
    """Let this process put nothing, from its first try on and for a while."""
    create = LocalBackend.create

    def fail_for_a_while(backend: LocalBackend, path: str, data: bytes) -> bool:
        if _is_busy(log):
            raise OSError(errno.ESTALE, "the disk is away for a while")
        return create(backend, path, data)

    LocalBackend.create = fail_for_a_while  # type: ignore[method-assign]


class _Tokenizer:
    """A real tokenizer, but for texts that say what befalls them."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.splitter = inner, inner.splitter

    def views(self, texts: Sequence[str]) -> Any:
        for name in {text.split()[0] for text in texts if text.split()}:
            strike("tokenize", name)
        return self.inner.views(texts)


class _Encoder:
    """A real encoder, but for chunks of so many texts."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def encode_views(self, views: Any, **more: Any) -> Any:
        encoded = self.inner.encode_views(views, **more)
        for name, rows in ROWS.items():
            if len(encoded.embeddings) == rows:
                strike("encode", name)
        return encoded


class _Generator:
    """A real generator, but for texts that say what befalls them."""

    def __init__(self, inner: Any, log: Path) -> None:
        self.inner, self.log = inner, log

    def generate(self, texts: Sequence[str], **more: Any) -> Any:
        for name in {text.split()[0] for text in texts if text.split()}:
            strike("generate", name)
            if name == "generate-busy":
                _take_disk_away(self.log / "generate")
        return self.inner.generate(texts, **more)


@dataclass(frozen=True)
class TroubledEngine:
    """A real engine whose tokenizer, encoder and generator meet trouble."""

    inner: RecipeEngine
    log: str = ""

    @property
    def long_text(self) -> str:
        return self.inner.long_text

    def load_tokenizer(self) -> Any:
        return _Tokenizer(self.inner.load_tokenizer())

    def load_encoder(self) -> Any:
        return _Encoder(self.inner.load_encoder())

    def load_generator(self, *, threads: int) -> Any:
        return _Generator(self.inner.load_generator(threads=threads), Path(self.log))


def troubled(config: Job, threads: int) -> Engine:
    """What `embed` takes as `engine_of`."""
    inner = recipe_engine(config, threads)
    assert isinstance(inner, RecipeEngine)
    return TroubledEngine(inner)


def generating(log: Path) -> Callable[[Job, int], Engine]:
    """What `embed` takes as `engine_of`, where generators are."""

    def engine_of(config: Job, threads: int) -> Engine:
        inner = recipe_engine(config, threads)
        assert isinstance(inner, RecipeEngine)
        return TroubledEngine(inner, str(log))

    return engine_of


def flow(log: Path) -> Callable[..., None]:
    """The pipeline's own flow, but that it reads and writes with trouble."""

    def run(
        plan: JobPlan, engine: Engine, *, reuse: Reuse, pool: Any, claim: Any, ledger: Any
    ) -> None:
        config = plan.job.config
        reads = Reads(partial(read_pass, job_input=config.input), log)
        tokenized = partial(tokenize, engine=engine, files=claim.files, ledger=ledger)
        rows = partial(read, plan.left, reads, ledger=ledger, reuse=reuse)
        views = rows(tokenized, actors=pool.largest)
        embeddings = encode(views, engine, pool=pool, claim=claim, ledger=ledger)
        committer = Committer(claim.lease, output_spec(plan), config.encoder.vector_dtype)
        write(embeddings, Writes(committer, log), ledger=ledger)

    return run
