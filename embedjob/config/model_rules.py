"""What a recipe asks of its model: tests for the rules that are decided once the model is known."""

from collections.abc import Mapping
from typing import Any, Protocol

from embedjob.config.heads import kinds_of
from embedjob.config.interventions import given
from embedjob.config.pooling import WordWeights
from embedjob.config.tables import looked_up
from embedjob.config.types import AnyRecipe

# What a test finds for the message: nothing where the rule is kept.
Breach = Mapping[str, Any] | bool


class ModelSizes(Protocol):
    """What the rules ask of a model."""

    @property
    def causal(self) -> bool:
        """Whether its tokens attend to earlier tokens only."""

    @property
    def layers(self) -> int:
        """Its number of blocks."""

    @property
    def max_positions(self) -> int | None:
        """The longest input; None where there is no limit."""

    @property
    def length_bound(self) -> bool:
        """Whether a longer input would change the positions of others."""

    @property
    def static(self) -> bool:
        """Whether it is a table of vectors, without blocks."""

    @property
    def kind(self) -> str:
        """What it is, for people."""

    @property
    def counts_terms(self) -> bool:
        """Whether it is a vocabulary, whose terms are counted."""


def first_other(recipe: AnyRecipe, allowed: Mapping[str, Any]) -> Breach:
    """Return the first key that has another value than the allowed one."""
    return next(
        (
            {"key": key, "got": getattr(recipe, key), "allowed": value or "none"}
            for key, value in allowed.items()
            if getattr(recipe, key) != value
        ),
        False,
    )


def _layers(recipe: AnyRecipe) -> tuple[int, ...]:
    return (recipe.layer,) if isinstance(recipe.layer, int) else tuple(recipe.layer)


def lacking_layer(recipe: AnyRecipe, model: ModelSizes) -> Breach:
    """Return the first layer that the model does not have."""
    lowest = -model.layers - 1
    lacking = (layer for layer in _layers(recipe) if not lowest <= layer <= model.layers)
    return next(({"got": layer, "lowest": lowest} for layer in lacking), False)


def lacking_block(recipe: AnyRecipe, model: ModelSizes) -> Breach:
    """Return the first block of an intervention that changes nothing that is read."""
    lowest = min(layer % (model.layers + 1) for layer in _layers(recipe))
    limits = {"before what is read": lowest - 1, "of the model": model.layers}
    blocks = (
        (f"{one.key}.{key}", one.value(key), limits[limit])
        for one in given(recipe.interventions)
        for key, limit in one.kind.blocks.items()
    )
    return next(
        (
            {"key": key, "got": got, "most": most, "lowest": lowest}
            for key, got, most in blocks
            if got > most
        ),
        False,
    )


def too_long(recipe: AnyRecipe, model: ModelSizes) -> Breach:
    """Return how many tokens the model reads, where the recipe has more."""
    decoded = recipe.decode.max_tokens - 1 if recipe.decode else 0
    if model.max_positions is None or recipe.max_tokens + decoded <= model.max_positions:
        return False
    bound = ": a longer text would change the positions of all texts in its micro-batch (longrope)"
    return {"why": bound if model.length_bound else "", "most": model.max_positions - decoded}


def unread_by_table(recipe: AnyRecipe, model: ModelSizes) -> Breach:
    """Return the first key that a static table cannot follow."""
    if model.static:
        return first_other(recipe, looked_up(recipe, counts_terms=model.counts_terms))
    weighted = isinstance(recipe.pooling, WordWeights)
    return weighted and {"key": "pooling", "got": "weights of words", "allowed": "no weight"}


def lacks_terms(recipe: AnyRecipe, model: ModelSizes) -> Breach:
    """Return what is there, where only one of a `bag_of_words` head and a vocabulary is."""
    asked = any(kind.reads == "terms" for _, kind, _ in kinds_of(recipe.heads))
    return asked != model.counts_terms and {"got": "" if asked else "no "}
