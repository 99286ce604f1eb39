"""Finishing steps of an embedding, in the recipe's order.

Shapes: R rows, D width.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from embedjob.config.pooling import FinishingStep, Normalize, Truncate
from embedjob.config.recipe import Recipe
from embedjob.errors import ConfigError
from embedjob.vectors.encoded import Vectors
from embedjob.vectors.fits.fit_arithmetic import applied
from embedjob.vectors.fits.fitted import Fitted

if TYPE_CHECKING:
    from torch import Tensor


NO_FITS: Mapping[str, Fitted] = MappingProxyType({})


def finish(
    embeddings_RD: "Tensor",
    steps: Sequence[FinishingStep],
    fitted: Mapping[str, Fitted] = NO_FITS,
) -> "Tensor":
    """Return the embeddings after every step, in float32.

    `fitted` is what fits left, by the sha256 that a step names.
    """
    finished = embeddings_RD.float()
    for step in steps:
        if isinstance(step, Truncate):
            finished = finished[..., : step.truncate]
        elif isinstance(step, Normalize):
            finished = normalize(finished)
        else:
            # Here alone: the driver asks this module for a width, and must not wait for torch.
            import torch

            finished = torch.from_numpy(applied(fitted[step.name], finished.numpy()))
    return finished


def finished(
    vectors_RD: Vectors,
    steps: Sequence[FinishingStep],
    fitted: Mapping[str, Fitted] = NO_FITS,
) -> Vectors:
    """Return vectors after every step, as `finish`, of numpy's arrays and without torch."""
    made = vectors_RD.astype(np.float32, copy=False)
    for step in steps:
        if isinstance(step, Truncate):
            made = made[..., : step.truncate]
        elif isinstance(step, Normalize):
            made = normalize_array(made)
        else:
            made = applied(fitted[step.name], made)
    return made


def normalize_array(vectors: Vectors) -> Vectors:
    """Return what `normalize` does, without torch."""
    tiny = np.finfo(np.float32).tiny
    largest = np.abs(vectors).max(axis=-1, keepdims=True, initial=0)
    vectors = vectors / np.maximum(largest, tiny)
    norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit: Vectors = vectors / np.maximum(norm, tiny)
    return unit


def normalize(vectors: "Tensor") -> "Tensor":
    """Scale to unit vectors along the last dimension, in float32; a zero vector stays zero."""
    import torch  # here alone, as above

    vectors = vectors.float()
    tiny = torch.finfo(torch.float32).tiny
    # By the largest value first: squares of very large or small values leave float32.
    vectors = vectors / vectors.abs().amax(dim=-1, keepdim=True).clamp(min=tiny)
    norm: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / norm.clamp(min=tiny)


def width(
    vector: int,
    *,
    views: int,
    recipe: Recipe,
    fitted: Mapping[str, int | None] = MappingProxyType({}),
) -> int:
    """Return the width of a finished embedding, given the width of one view's vector.

    `fitted` gives the width after a step, by the name that the step has; None where it stays.
    ConfigError where a step gives more dimensions than there are.
    """
    width_now = vector * views if recipe.aggregation == "concat" else vector
    for step in recipe.finish:
        if isinstance(step, Normalize):
            continue
        if isinstance(step, Truncate):
            what, given = "truncate", step.truncate
        else:
            what, given = (
                f"{step.kind}: {step.name} of dimensions",
                fitted.get(step.name) or width_now,
            )
        if given > width_now:
            raise ConfigError(
                f"encoder.finish: got {what}: {given}, but the embedding is {width_now} wide there;"
                f" set it to {width_now} or less, or leave it out"
            )
        width_now = given
    return width_now
