"""Finishing steps of an embedding, in the recipe's order.

Shapes: R rows, D width.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from embedjob.config.pooling import FitStep, Normalize, Truncate
from embedjob.config.recipe import Recipe
from embedjob.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


def finish(embeddings_RD: "Tensor", steps: Sequence[Normalize | Truncate | FitStep]) -> "Tensor":
    """Return the embeddings after every step, in float32."""
    finished = embeddings_RD.float()
    for step in steps:
        if isinstance(step, Truncate):
            finished = finished[..., : step.truncate]
        elif isinstance(step, Normalize):
            finished = normalize(finished)
        else:
            raise _not_available(step)
    return finished


def normalize(vectors: "Tensor") -> "Tensor":
    """Scale to unit vectors along the last dimension, in float32; a zero vector stays zero."""
    # Here alone: the driver asks this module for a width, and must not wait for torch.
    import torch

    vectors = vectors.float()
    tiny = torch.finfo(torch.float32).tiny
    # By the largest value first: squares of very large or small values leave float32.
    vectors = vectors / vectors.abs().amax(dim=-1, keepdim=True).clamp(min=tiny)
    norm: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / norm.clamp(min=tiny)


def width(vector: int, *, views: int, recipe: Recipe) -> int:
    """Return the width of a finished embedding, given the width of one view's vector."""
    width_now = vector * views if recipe.aggregation == "concat" else vector
    for step in recipe.finish:
        if isinstance(step, FitStep):
            raise _not_available(step)
        if isinstance(step, Truncate):
            if step.truncate > width_now:
                raise ConfigError(
                    f"encoder.finish: got truncate: {step.truncate}, but the embedding is"
                    f" {width_now} wide there; set it to {width_now} or less, or leave it out"
                )
            width_now = step.truncate
    return width_now


def _not_available(step: FitStep) -> ConfigError:
    return ConfigError(
        f"encoder.finish: {step.model_dump(exclude_none=True)} is not available in this version;"
        " allowed are normalize and truncate"
    )
