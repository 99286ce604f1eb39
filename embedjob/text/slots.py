"""Slots of interventions: their tokens, their positions in views, and the views beside them."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer

from embedjob.config.interventions import Given, auxiliary_templates, given, slotted
from embedjob.config.recipe import Recipe
from embedjob.errors import ConfigError
from embedjob.text.fitting import template_fitter

# Texts that have no token in common: ids that all their views share belong to the template.
TEMPLATE_PROBES = ("a", "The", "zebra", "Oh", "7", "Éa", "日本", "не")


def slot_position(rows: Sequence[Sequence[int]], slot: int, *, of: Given, template: str) -> int:
    """Return where the slot of an intervention is in the ids of all views of a template.

    Raises:
        ConfigError: it is not there exactly once, or after the text, where every view would have
            it at another position.
    """
    positions = {tuple(at for at, token in enumerate(row) if token == slot) for row in rows}
    places = next(iter(positions))
    if len(positions) > 1 or len(places) != 1:
        raise ConfigError(
            f"encoder.interventions: {of.key}.{of.kind.slot}: the template {template} must have"
            f" {of.slot} once, and before the text; put it there, or leave the intervention out"
        )
    return places[0]


def add_tokens(tokenizer: Tokenizer, recipe: Recipe) -> None:
    """Add the recipe's special tokens and the slot of its interventions to its tokenizer."""
    slots = [
        AddedToken(one.slot, normalized=one.normalized, special=True)
        for one in given(recipe.interventions)
        if one.slot is not None
    ]
    tokenizer.add_special_tokens([*recipe.special_tokens.add, *slots])


def as_normalized(recipe: Recipe, tokenizer: Tokenizer) -> Recipe:
    """Return the recipe with a slot that the normalizer sees, where that gives other ids.

    Its authors add it so. Where a normalizer puts a blank before each piece of text, a special
    token has one on both sides, and theirs has none after it.
    """
    one = slotted(recipe.interventions)
    if one is None:
        return recipe
    special, normalized = (
        recipe.model_copy(
            update={
                "interventions": tuple(
                    one.seen(seen) if section is one.section else section
                    for section in recipe.interventions
                )
            }
        )
        for seen in (False, True)
    )
    same = _probe_ids(special, tokenizer) == _probe_ids(normalized, tokenizer)
    return special if same else normalized


def _probe_ids(recipe: Recipe, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the ids of two probes under every template, under a copy of the tokenizer."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    add_tokens(copy, recipe)
    fitter = template_fitter(copy, recipe)
    return [fitter.whole(n, probe) for n in range(recipe.views) for probe in TEMPLATE_PROBES[:2]]


def stand_in_id(tokenizer: Tokenizer, one: Given | None) -> int | None:
    """Return the id of the token whose embedding the slot has, None where it is drawn.

    Raises:
        ConfigError: the name is not a single token.
    """
    name = None if one is None else one.value(one.kind.stand_in)
    if one is None or name is None:
        return None
    ids: list[int] = tokenizer.encode(name, add_special_tokens=False).ids
    if len(ids) != 1:
        raise ConfigError(
            f"encoder.interventions: {one.key}.{one.kind.stand_in}: got {name!r}, which is"
            f" {len(ids)} tokens; allowed is a single token of this tokenizer"
        )
    return ids[0]


def auxiliary_recipe(recipe: Recipe) -> Recipe | None:
    """Return the recipe of auxiliary views; None if no intervention has an auxiliary template.

    Other interventions change these views too; one with a slot only if the template has the slot.
    """
    template = next(iter(auxiliary_templates(recipe.interventions).values()), None)
    if template is None:
        return None
    kept = tuple(
        one.section
        for one in given(recipe.interventions)
        if one.template is None and (one.slot is None or one.slot in template)
    )
    # Words and sparse weights belong to the main views.
    ours = {"templates": (template,), "span": "last_token", "interventions": kept, "heads": ()}
    return recipe.model_copy(update=ours)
