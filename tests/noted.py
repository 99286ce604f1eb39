"""Engines that note each text that they are given, and a command line whose runs have such engines.

    python -m tests.noted LOG SECONDS run JOB.yaml ...

Workers import this module for them.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedjob.cli import main
from embedjob.config.job import Job
from embedjob.stages import session
from embedjob.stages.engine import Engine, RecipeEngine, recipe_engine
from embedjob.text.arrays import Ids
from embedjob.text.views import TokenizesTexts, TokenViews


@dataclass(frozen=True)
class Note:
    """What was done with which texts, for which output.

    Texts are known by the ids of their first view where they were embedded.
    """

    what: str
    place: str
    texts: list[str]


@dataclass(frozen=True)
class Notebook:
    """A file with a line for each call of an engine, which is kept waiting before it."""

    log: str
    place: str
    seconds: float

    def add(self, what: str, texts: list[str]) -> None:
        line = json.dumps([what, self.place, texts])
        with Path(self.log).open("a") as log:
            log.write(f"{line}\n")
        time.sleep(self.seconds)


def notes(log: Path) -> list[Note]:
    """What engines have noted."""
    return (
        [Note(*json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []
    )


def known_by(ids: Ids) -> str:
    """The name of a text that is embedded."""
    return hashlib.blake2b(ids.astype("<u4").tobytes(), digest_size=8).hexdigest()


class _Encoder:
    def __init__(self, inner: Any, notebook: Notebook) -> None:
        self.inner, self.notebook = inner, notebook

    def encode_views(self, views: TokenViews, **more: Any) -> Any:
        firsts = views.text_views[:-1][np.diff(views.text_views) > 0]
        self.notebook.add("embedded", [known_by(views.full_ids(int(view))) for view in firsts])
        return self.inner.encode_views(views, **more)


class _Generator:
    def __init__(self, inner: Any, notebook: Notebook) -> None:
        self.inner, self.notebook = inner, notebook

    def generate(self, texts: Sequence[str], **more: Any) -> Any:
        self.notebook.add("generated", [*texts])
        return self.inner.generate(texts, **more)


@dataclass(frozen=True)
class NotingEngine:
    """A real engine whose encoders and generators note what they are given, before they begin."""

    inner: RecipeEngine
    notebook: Notebook

    @property
    def long_text(self) -> str:
        return self.inner.long_text

    def load_tokenizer(self) -> TokenizesTexts:
        return self.inner.load_tokenizer()

    def load_encoder(self) -> Any:
        return _Encoder(self.inner.load_encoder(), self.notebook)

    def load_generator(self, *, threads: int) -> Any:
        return _Generator(self.inner.load_generator(threads=threads), self.notebook)


def noting(log: Path, seconds: float = 0.0) -> Callable[[Job, int], Engine]:
    """What `embed` takes as `engine_of`."""

    def engine_of(config: Job, threads: int) -> Engine:
        inner = recipe_engine(config, threads)
        assert isinstance(inner, RecipeEngine)
        return NotingEngine(inner, Notebook(str(log), config.output.path, seconds))

    return engine_of


if __name__ == "__main__":
    # From this module by its name: what is pickled must not belong to __main__.
    from tests import noted

    session.recipe_engine = noted.noting(Path(sys.argv[1]), float(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
