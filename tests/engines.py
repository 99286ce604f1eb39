"""Engines that fail, or count what they encode; workers import this module for them."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from embedjob.config.job import Job
from embedjob.errors import ModelError
from embedjob.stages.claiming import PROBE_TEXTS
from embedjob.stages.engine import Engine, RecipeEngine, recipe_engine
from embedjob.text.tokenizing import ViewTokenizer
from embedjob.text.views import TokenViews

# A byte that only begins characters of four bytes: no text but those with an emoji has it.
MARKER = "\N{GRINNING FACE}"
MARKER_TOKEN = "<0xF0>"


@dataclass(frozen=True)
class FailingEngine:
    """A real engine, its model hooked: a batch with the marker raises, or ends the process.

    The second time that it would, it loses the device instead: then the actor has to end it. Each
    time is one line in `log`.
    """

    inner: RecipeEngine
    token: int
    how: Literal["raise", "exit"]
    log: str

    @property
    def long_text(self) -> str:
        return self.inner.long_text

    def load_tokenizer(self) -> ViewTokenizer:
        return self.inner.load_tokenizer()

    def load_encoder(self) -> Any:
        encoder = self.inner.load_encoder()
        encoder.backbone.model.register_forward_pre_hook(self._fail, with_kwargs=True)
        return encoder

    def _fail(self, _model: Any, _args: Any, inputs: dict[str, Any]) -> None:
        if not (inputs["input_ids"] == self.token).any():
            return
        with Path(self.log).open("a") as log:
            log.write(f"{os.getpid()}\n")
        if self.how == "exit" and len(Path(self.log).read_text().splitlines()) == 2:
            _lose_device()
        if self.how == "exit":
            os._exit(1)
        raise RuntimeError("this model cannot bear that token")


def _lose_device() -> None:
    """Raises as torch does once a GPU is lost, which then answers nothing more to this process."""

    def synchronize(device: Any = None) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    torch.cuda.device_count = lambda: 1
    torch.cuda.synchronize = synchronize
    synchronize()


@dataclass(frozen=True)
class LateEngine:
    """A real engine whose second load fails, once a chunk was written; loads are lines in `log`."""

    inner: RecipeEngine
    log: str
    out: str

    @property
    def long_text(self) -> str:
        return self.inner.long_text

    def load_tokenizer(self) -> ViewTokenizer:
        return self.inner.load_tokenizer()

    def load_encoder(self) -> Any:
        # Appending is atomic: whoever finds its own line second is the second to load.
        with Path(self.log).open("a") as log:
            log.write(f"{os.getpid()}\n")
        if Path(self.log).read_text().splitlines().index(str(os.getpid())) == 1:
            while not list(Path(self.out).rglob("data/*/*.parquet")):
                time.sleep(0.05)
            raise OSError("no space left on this node")
        return self.inner.load_encoder()


class _Counting:
    """A real encoder that notes how many texts it is given each time, before it encodes them."""

    def __init__(self, inner: Any, log: str) -> None:
        self.inner, self.log = inner, log

    def encode_views(self, views: TokenViews, **more: Any) -> Any:
        with Path(self.log).open("a") as log:
            log.write(f"{len(views.text_views) - 1}\n")
        return self.inner.encode_views(views, **more)


@dataclass(frozen=True)
class CountingEngine:
    """A real engine whose encoders note in `log` how many texts they are given each time."""

    inner: RecipeEngine
    log: str

    @property
    def long_text(self) -> str:
        return self.inner.long_text

    def load_tokenizer(self) -> ViewTokenizer:
        return self.inner.load_tokenizer()

    def load_encoder(self) -> Any:
        return _Counting(self.inner.load_encoder(), self.log)


def counting(log: Path) -> Callable[[Job, int], Engine]:
    """What `embed` takes as `engine_of`."""

    def engine_of(config: Job, threads: int) -> Engine:
        inner = recipe_engine(config, threads)
        assert isinstance(inner, RecipeEngine)
        return CountingEngine(inner, str(log))

    return engine_of


@dataclass(frozen=True)
class SlowEngine:
    """A real engine whose model sleeps so long for each token; counts as CountingEngine does."""

    inner: RecipeEngine
    token_seconds: float
    log: str

    @property
    def long_text(self) -> str:
        return self.inner.long_text

    def load_tokenizer(self) -> ViewTokenizer:
        return self.inner.load_tokenizer()

    def load_encoder(self) -> Any:
        encoder = self.inner.load_encoder()
        encoder.backbone.model.register_forward_pre_hook(self._sleep, with_kwargs=True)
        return _Counting(encoder, self.log)

    def _sleep(self, _model: Any, _args: Any, inputs: dict[str, Any]) -> None:
        time.sleep(self.token_seconds * inputs["input_ids"].numel())


def slow(token_seconds: float, log: Path) -> Callable[[Job, int], Engine]:
    """What `embed` takes as `engine_of`."""

    def engine_of(config: Job, threads: int) -> Engine:
        inner = recipe_engine(config, threads)
        assert isinstance(inner, RecipeEngine)
        return SlowEngine(inner, token_seconds, str(log))

    return engine_of


class _CountingGenerator:
    """A real generator that notes the texts of which it makes others, before it does.

    Where `ends` exists it ends its process instead, once, when it has made them.
    """

    def __init__(self, inner: Any, log: str, ends: str) -> None:
        self.inner, self.log, self.ends = inner, log, Path(ends)

    def generate(self, texts: Sequence[str], **more: Any) -> Any:
        with Path(self.log).open("a") as log:
            log.writelines(f"{json.dumps(text)}\n" for text in texts)
        made = self.inner.generate(texts, **more)
        if self.ends.exists():
            self.ends.unlink()
            os._exit(1)
        return made


@dataclass(frozen=True)
class GeneratingEngine:
    """A real engine whose generators note in `log` what they are given."""

    inner: RecipeEngine
    log: str
    ends: str

    @property
    def long_text(self) -> str:
        return self.inner.long_text

    def load_tokenizer(self) -> ViewTokenizer:
        return self.inner.load_tokenizer()

    def load_encoder(self) -> Any:
        return self.inner.load_encoder()

    def load_generator(self, *, threads: int) -> Any:
        generator = self.inner.load_generator(threads=threads)
        return _CountingGenerator(generator, self.log, self.ends)


def generating(log: Path) -> Callable[[Job, int], Engine]:
    """What `embed` takes as `engine_of`; a file `ends` beside the log ends one process."""

    def engine_of(config: Job, threads: int) -> Engine:
        inner = recipe_engine(config, threads)
        assert isinstance(inner, RecipeEngine)
        return GeneratingEngine(inner, str(log), str(log.with_name("ends")))

    return engine_of


@dataclass(frozen=True)
class UnloadableEngine:
    """A real engine whose generator does not load."""

    inner: RecipeEngine

    @property
    def long_text(self) -> str:
        return self.inner.long_text

    def load_tokenizer(self) -> ViewTokenizer:
        return self.inner.load_tokenizer()

    def load_encoder(self) -> Any:
        return self.inner.load_encoder()

    def load_generator(self, *, threads: int) -> Any:
        raise ModelError("generate.model: there are no such weights")


def unloadable(config: Job, threads: int) -> Engine:
    """What `embed` takes as `engine_of`."""
    inner = recipe_engine(config, threads)
    assert isinstance(inner, RecipeEngine)
    return UnloadableEngine(inner)


def texts_generated(log: Path) -> list[str]:
    """The texts that were given to generators, one after the other."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def texts_encoded(log: Path) -> int:
    """How many texts of a corpus were given to counting encoders; probes are no corpus."""
    given = [int(line) for line in log.read_text().splitlines()]
    return sum(count for count in given if count != len(PROBE_TEXTS))


def late(log: Path, out: Path) -> Callable[[Job, int], Engine]:
    """What `embed` takes as `engine_of`."""

    def engine_of(config: Job, threads: int) -> Engine:
        inner = recipe_engine(config, threads)
        assert isinstance(inner, RecipeEngine)
        return LateEngine(inner, str(log), str(out))

    return engine_of


def losing(file: Path) -> Callable[[Job, int], Engine]:
    """An `engine_of` before which a committed file is deleted by somebody else."""

    def engine_of(config: Job, threads: int) -> Engine:
        file.unlink(missing_ok=True)
        return recipe_engine(config, threads)

    return engine_of


def failing(how: Literal["raise", "exit"], token: int, log: Path) -> Callable[[Job, int], Engine]:
    """What `embed` takes as `engine_of`."""

    def engine_of(config: Job, threads: int) -> Engine:
        inner = recipe_engine(config, threads)
        assert isinstance(inner, RecipeEngine)
        return FailingEngine(inner, token, how, str(log))

    return engine_of


def replacing(file: Path, content: bytes) -> Callable[[Job, int], Engine]:
    """An `engine_of` before which a file gets another content: the plan is made by then."""

    def engine_of(config: Job, threads: int) -> Engine:
        file.unlink()
        file.write_bytes(content)
        return recipe_engine(config, threads)

    return engine_of
