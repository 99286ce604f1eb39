"""Keys that a job sets and nothing of it would read: refused, never ignored."""

from collections.abc import Collection

from embedjob.config.job_file import JobSource
from embedjob.config.recipe import Recipe, WeightedTemplate
from embedjob.config.templates import slots_read
from embedjob.errors import ConfigError

# Each key that is read where a slot of that name is, in the templates of some role.
_SLOTS = {
    "instruction": "instruction",
    "demonstrations": "demonstrations",
    "demonstration": "demonstrations",
    "demonstrations_count": "demonstrations",
}


def require_slots_for(draft: JobSource, recipes: Collection[Recipe]) -> None:
    """ConfigError if the job fills a slot that no template of its recipes has."""
    read = frozenset[str]().union(*map(slots_read, recipes))
    for key, slot in _SLOTS.items():
        given = draft.get(f"encoder.{key}")
        if (given or given is False) and slot not in read:
            raise ConfigError(
                f"encoder.{key}: is set, but no template of any role has a slot for it, so that it"
                f" would change nothing; write {{{slot}}} into encoder.templates, or remove it"
            )


def require_weights_read(recipe: Recipe) -> None:
    """ConfigError if a template has a weight that the recipe's aggregation does not read."""
    weights = [one.weight for one in recipe.templates if isinstance(one, WeightedTemplate)]
    other = next((weight for weight in weights if weight != 1), None)
    if other is not None and recipe.aggregation != "weighted":
        raise ConfigError(
            f"encoder.aggregation: got {recipe.aggregation}, but a template has weight: {other},"
            " which only weighted reads; set aggregation: weighted, or leave the weight out"
        )
