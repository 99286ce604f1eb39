"""What interventions need of the tokens: where a template's slot is, and the auxiliary view."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from embedjob.errors import ConfigError
from embedjob.interventions import Prepend, Prepending
from embedjob.recipe import Recipe


def slot_position(rows: Sequence[Sequence[int]], slot: int, *, name: str, template: str) -> int:
    """Where the slot is in the ids of one template's views, whatever their text; else ConfigError.

    After the text it would be at another place in every view.
    """
    found = {tuple(at for at, token in enumerate(row) if token == slot) for row in rows}
    places = next(iter(found))
    if len(found) > 1 or len(places) != 1:
        raise ConfigError(
            f"encoder.interventions: prepend.slot: the template {template} must have {name} once,"
            " and before the text; put it there, or leave the intervention out"
        )
    return places[0]


def standing_in(tokenizer: Tokenizer, prepend: Prepend | None) -> int | None:
    """The id whose embedding the slot has, None where it is drawn; ConfigError if not a token."""
    if prepend is None or prepend.embedding is None:
        return None
    ids: list[int] = tokenizer.encode(prepend.embedding, add_special_tokens=False).ids
    if len(ids) != 1:
        raise ConfigError(
            f"encoder.interventions: prepend.embedding: got {prepend.embedding!r}, which are"
            f" {len(ids)} tokens; allowed is one token of the model's own"
        )
    return ids[0]


def auxiliary_recipe(recipe: Recipe) -> Recipe | None:
    """The recipe of the views that contrastive prompting takes away; None where none does.

    What is prepended to is a slot, so that it is left out where the template has none.
    """
    if recipe.contrast is None:
        return None
    template = recipe.contrast.template
    kept = tuple(
        one
        for one in recipe.interventions
        if isinstance(one, Prepending) and one.prepend.slot in template
    )
    # Words and sparse weights are of the main views alone.
    ours = {"templates": (template,), "span": "last_token", "interventions": kept, "heads": ()}
    return recipe.model_copy(update=ours)
