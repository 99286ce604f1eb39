"""What turns texts into vectors, as a small value that travels to every worker and loads there."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from embedjob.config.job import Job
from embedjob.config.recipe import Recipe
from embedjob.models.architecture import config_of
from embedjob.models.source import materialize, source_of
from embedjob.models.tokenizer import load_tokenizer
from embedjob.text.tokenizing import ViewTokenizer
from embedjob.text.views import TokenViews
from embedjob.vectors.encoded import Encoded

if TYPE_CHECKING:
    from embedjob.encoder.encoder import Encoder


# transformers imports these wherever they are installed, for tasks other than embedding: a third
# of the seconds that an actor's imports take. torchao also prints.
_UNUSED = ("scipy", "sklearn", "torchao")


class EncodesViews(Protocol):
    """Something that turns token views into one embedding per text."""

    def encode_views(
        self,
        views: TokenViews,
        *,
        stop: Callable[[], bool],
        on_progress: Callable[[int, int], None],
    ) -> Encoded:
        """Float32 embeddings [texts, width] and the texts that failed."""
        ...


class Engine(Protocol):
    """Hashable and equal by value, so that a worker loads it once and keeps it."""

    def __hash__(self) -> int:
        """Equal for equal values."""
        ...

    @property
    def long_text(self) -> str:
        """The config's `encoder.long_text`."""
        ...

    def load_tokenizer(self) -> ViewTokenizer:
        """The tokenizer, on a CPU worker."""
        ...

    def load_encoder(self) -> EncodesViews:
        """The encoder, inside one actor of the pool."""
        ...


@dataclass(frozen=True)
class RecipeEngine:
    """The engine of a resolved recipe (kept as JSON: a recipe holds unhashable values)."""

    recipe_json: str
    tokens_per_microbatch: Literal["auto"] | int = "auto"
    threads: int = 1
    gpus: int = 1

    @property
    def recipe(self) -> Recipe:
        """The recipe that this engine follows."""
        return Recipe.model_validate_json(self.recipe_json)

    @property
    def long_text(self) -> str:
        """The config's `encoder.long_text`."""
        return self.recipe.long_text

    def load_tokenizer(self) -> ViewTokenizer:
        """The recipe's tokenizer, from files that are fetched once per node."""
        return load_tokenizer(self.recipe)

    def load_encoder(self) -> "Encoder":
        """The recipe's encoder, on this actor's GPU or GPUs if it has any."""
        # Here alone: torch and transformers would cost every read worker seconds and memory.
        with _left_out(_unused(self.recipe)):
            from embedjob.encoder.encoder import Encoder

        return Encoder.from_recipe(
            self.recipe,
            tokens_per_microbatch=self.tokens_per_microbatch,
            gpus=self.gpus,
            threads=self.threads,
        )


def recipe_engine(config: Job, threads: int) -> Engine:
    """Return the engine of a job's own recipe, with so many torch threads to an actor."""
    pool = config.pool
    gpus = max(1, int(pool.gpus_per_actor))
    return RecipeEngine(config.encoder.model_dump_json(), pool.tokens_per_microbatch, threads, gpus)


def _unused(recipe: Recipe) -> tuple[str, ...]:
    """Return the packages to leave out; a model's own code or quantised weights may need them."""
    config = config_of(materialize(source_of(recipe), tokenizer_only=True))
    return () if recipe.trust_remote_code or "quantization_config" in config else _UNUSED


@contextmanager
def _left_out(names: Sequence[str]) -> Iterator[None]:
    """Let packages that were not imported yet count as not installed inside the block."""
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None: not importable
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
