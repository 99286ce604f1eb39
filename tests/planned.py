"""The model's files as a plan finds them, for tests that make no plan."""

from embedjob.config.recipe import Recipe
from embedjob.models.components import components_of
from embedjob.models.digests import model_digests
from embedjob.stages.engine import PlannedFiles


def files_of(recipe: Recipe) -> PlannedFiles:
    """The digests of a recipe's files as they are now."""
    digests = model_digests(components_of(recipe))
    return PlannedFiles(recipe.model_dump_json(), tuple(digests.items()))
