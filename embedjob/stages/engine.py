"""What turns texts into vectors, as a small value that travels to every worker and loads there."""

import gc
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal, Protocol

from embedjob.config.job import Job
from embedjob.config.pooling import FitStep, WordWeights
from embedjob.config.recipe import Recipe
from embedjob.errors import ModelError
from embedjob.models.architecture import config_of
from embedjob.models.components import ModelComponents, components_of
from embedjob.models.digests import model_digests, tokenizer_digests
from embedjob.models.source import materialize, source_of
from embedjob.models.tables.static_tables import may_be_static
from embedjob.models.tokenizer import load_tokenizer
from embedjob.output.fits.artefacts import read_fitted
from embedjob.static.bag_of_words import static_encoder
from embedjob.storage.objects import absolute
from embedjob.text.conversations import Variant
from embedjob.text.views import TokenizesTexts, TokenViews
from embedjob.vectors.encoded import Encoded

if TYPE_CHECKING:
    from embedjob.encoder.generator import Generator

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
        """Return float32 embeddings [texts, width] and the texts that failed."""
        ...


class Generates(Protocol):
    """Something that makes texts of texts."""

    def generate(
        self,
        texts: Sequence[str],
        *,
        stop: Callable[[], bool],
        moved: Callable[[], None],
        answered: Callable[[int, int], None],
    ) -> Sequence[Sequence[Variant]]:
        """Return what it makes of each text; `moved` is called while it gets on.

        `answered` is told how many answers there are so far, and their tokens.
        """
        ...


class Engine(Protocol):
    """Hashable and equal by value, so that a worker loads it once and keeps it."""

    def __hash__(self) -> int:
        """Return a hash that is equal for equal values."""
        ...

    @property
    def long_text(self) -> str:
        """The config's `encoder.long_text`."""
        ...

    def load_tokenizer(self) -> TokenizesTexts:
        """Load the tokenizer, on a CPU worker."""
        ...

    def load_encoder(self) -> EncodesViews:
        """Load the encoder, inside one actor of the pool."""
        ...

    def load_generator(self, *, threads: int) -> Generates:
        """Load the generator, inside one actor of its pool; only recipes that generate have one."""
        ...


@dataclass(frozen=True)
class RecipeEngine:
    """The engine of a resolved recipe (kept as JSON: a recipe holds unhashable values).

    `artefacts` is the output that has those of its finishing steps; None where it has no such step.
    """

    recipe_json: str
    tokens_per_microbatch: Literal["auto"] | int = "auto"
    threads: int = 1
    gpus: int = 1
    generator_gpus: int = 1
    sequences: Literal["auto"] | int = "auto"
    artefacts: str | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe that this engine follows."""
        return Recipe.model_validate_json(self.recipe_json)

    @property
    def long_text(self) -> str:
        """The config's `encoder.long_text`."""
        return self.recipe.long_text

    def load_tokenizer(self) -> TokenizesTexts:
        """Load the recipe's tokenizer, from files that are fetched once per node."""
        return load_tokenizer(self.recipe)

    def load_encoder(self) -> EncodesViews:
        """Load the recipe's encoder, on this actor's GPU or GPUs if it has any."""
        recipe = self.recipe
        fitted = read_fitted(self.artefacts, [recipe]) if self.artefacts else {}
        if may_be_static(materialize(source_of(recipe), tokenizer_only=True)):
            return static_encoder(recipe, fitted=fitted)
        # Here alone: torch and transformers would cost every read worker seconds and memory.
        from embedjob.encoder.encoder import Encoder

        with _nothing_collected():
            with _left_out(_unused(recipe)):
                import_module("embedjob.encoder.view_encoder")  # all that it runs a model by
            return Encoder.from_recipe(
                recipe,
                fitted=fitted,
                tokens_per_microbatch=self.tokens_per_microbatch,
                gpus=self.gpus,
                threads=self.threads,
            )

    def load_generator(self, *, threads: int) -> "Generator":
        """Load the recipe's generator, on this actor's GPU or GPUs if it has any."""
        from embedjob.encoder.generator import Generator

        return Generator.from_recipe(
            self.recipe, gpus=self.generator_gpus, threads=threads, sequences=self.sequences
        )


@dataclass(frozen=True)
class PlannedFiles:
    """The model as the plan found it: its recipe as JSON, and the digests of its files by name."""

    recipe_json: str
    digests: tuple[tuple[str, str], ...]

    def check(self) -> None:
        """Check all files of this node, once they were loaded; ModelError names one that differs.

        A file is read once per node, and again when it has changed.
        """
        here, planned = model_digests(self._components), dict(self.digests)
        self._compare({**dict.fromkeys(planned), **here})

    def check_tokenizer(self) -> None:
        """Check the files that texts are tokenized by; ModelError names one that differs."""
        self._compare(tokenizer_digests(self._components))

    @property
    def _components(self) -> ModelComponents:
        return components_of(Recipe.model_validate_json(self.recipe_json))

    def _compare(self, here: Mapping[str, str | None]) -> None:
        planned = dict(self.digests)
        for name, sha256 in sorted(here.items()):
            if planned.get(name) != sha256:
                ours, theirs = ((one or "not there")[:12] for one in (sha256, planned.get(name)))
                raise ModelError(
                    f"encoder.model: {name} is another file on node {socket.gethostname()} than in"
                    f" the plan (sha256 {ours}, planned {theirs}); give all nodes the same files,"
                    " and do not change them during a run"
                )


def recipe_engine(config: Job, threads: int) -> Engine:
    """Return the engine of a job's own recipe, with so many torch threads to an actor."""
    pool = config.pool
    fitted = any(
        isinstance(one, FitStep | WordWeights)
        for one in (*config.encoder.finish, config.encoder.pooling)
    )
    return RecipeEngine(
        config.encoder.model_dump_json(),
        pool.tokens_per_microbatch,
        threads,
        gpus=max(1, int(pool.gpus_per_actor)),
        generator_gpus=max(1, int(config.generator_pool.gpus_per_actor)),
        sequences="auto" if config.generate is None else config.generate.pool.sequences,
        artefacts=absolute(config.output.path) if fitted else None,
    )


def _unused(recipe: Recipe) -> tuple[str, ...]:
    """Return the packages to leave out; a model's own code or quantised weights may need them."""
    config = config_of(materialize(source_of(recipe), tokenizer_only=True))
    return () if recipe.trust_remote_code or "quantization_config" in config else _UNUSED


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Let no garbage be looked for inside the block; what was made there is then kept for good.

    Imports and a model make objects by the million, none of which is garbage: to look through them
    again and again takes a fifth of the seconds of the imports.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


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
