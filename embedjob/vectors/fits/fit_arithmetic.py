"""The kinds of fits: how each begins, and how a finishing step applies what it left.

Shapes: R rows, D width, K width afterwards.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from embedjob.errors import FitError
from embedjob.vectors.encoded import Vectors
from embedjob.vectors.fits.clusters import SeedPass
from embedjob.vectors.fits.continuation_ids import continuations_problem
from embedjob.vectors.fits.fitted import Fitted, Pass, Training
from embedjob.vectors.fits.flow import FlowTraining, flow_problem, flowed
from embedjob.vectors.fits.moments import ComponentsPass, StandardizePass, projected, standardized
from embedjob.vectors.fits.procrustes import RotationPass, rotated
from embedjob.vectors.fits.rare_words import (
    CommonComponentPass,
    without_common_component,
    word_counts_problem,
)
from embedjob.vectors.quantizing import CalibratePass
from embedjob.vectors.vocabulary import vocabulary_problem


@dataclass(frozen=True)
class Arithmetic:
    """How a kind of fit is computed and applied.

    Args:
        begin: gives the first pass, or the training, by the fit's section; None where it needs no
            vectors.
        tensors: what it leaves: each tensor's axes, by the letters D, K, and others, or by a digit
            that is the length; None where `check` knows.
        apply: makes vectors [R, K] of vectors [R, D]; None where it makes no vectors.
        check: gives the reason why tensors are not what it leaves; None where they are.
    """

    begin: Callable[[Any], Pass | Training] | None
    tensors: Mapping[str, str] | None
    apply: Callable[[Fitted, Vectors], Vectors] | None = None
    check: Callable[[Fitted], str | None] = lambda fitted: None


ARITHMETIC: Mapping[str, Arithmetic] = {
    "whiten": Arithmetic(
        lambda fit: ComponentsPass("whiten", fit.dimensions),
        {"mean": "D", "matrix": "DK"},
        projected,
    ),
    "pca": Arithmetic(
        lambda fit: ComponentsPass("pca", fit.dimensions), {"mean": "D", "matrix": "DK"}, projected
    ),
    "standardize": Arithmetic(
        lambda fit: StandardizePass(), {"mean": "D", "scale": "D"}, standardized
    ),
    "flow": Arithmetic(
        lambda fit: FlowTraining(
            levels=fit.levels,
            depth=fit.depth,
            hidden=fit.hidden,
            epochs=fit.epochs,
            batch_size=fit.batch_size,
            learning_rate=fit.learning_rate,
            seed=fit.seed,
        ),
        None,
        flowed,
        check=flow_problem,
    ),
    "calibrate": Arithmetic(lambda fit: CalibratePass(), {"ranges": "2D"}),
    # It is counted in texts, by stages/fits/term_counts.py.
    "vocabulary": Arithmetic(None, None, check=vocabulary_problem),
    # The same, of the rows of a table.
    "word_counts": Arithmetic(None, None, check=word_counts_problem),
    # They are sampled after texts, by stages/fits/continuations.py.
    "continuations": Arithmetic(None, None, check=continuations_problem),
    "common_component": Arithmetic(
        lambda fit: CommonComponentPass(), {"direction": "D"}, without_common_component
    ),
    "kmeans": Arithmetic(
        lambda fit: SeedPass(
            fit.clusters, fit.spherical, fit.iterations, fit.tolerance, seed=fit.seed
        ),
        {"centroids": "CD"},
    ),
    "align": Arithmetic(lambda fit: RotationPass(), {"rotation": "DK"}, rotated),
}


def first_pass(fit: Any) -> Pass | Training:
    """Return the first pass of a fit, or its training, given its section in the config."""
    begin = ARITHMETIC[fit.kind].begin
    assert begin is not None, f"{fit.kind} is not computed from vectors"
    return begin(fit)


def applied(fitted: Fitted, vectors_RD: Vectors) -> Vectors:
    """Return vectors to which what a fit left is applied [R, K].

    FitError where the vectors are not as wide as those of the fit.
    """
    apply = ARITHMETIC[fitted.kind].apply
    assert apply is not None, f"{fitted.kind} makes no vectors"
    if vectors_RD.shape[1] != fitted.width:
        raise FitError(
            f"{fitted.kind} was fitted on vectors of width {fitted.width}, got"
            f" {vectors_RD.shape[1]}; fit it again on the vectors that it is applied to"
        )
    return apply(fitted, vectors_RD)


def width_after(fitted: Fitted) -> int:
    """Return the width of a vector to which the fit was applied."""
    axes = ARITHMETIC[fitted.kind].tensors or {}
    wide = [fitted.tensors[name].shape[at.index("K")] for name, at in axes.items() if "K" in at]
    return wide[0] if wide else fitted.width


def problem_of(fitted: Fitted) -> str | None:
    """Return why tensors are not what a fit of this kind leaves; None where they are."""
    sizes = {"D": fitted.width}
    axes = ARITHMETIC[fitted.kind].tensors
    if axes is None:
        return ARITHMETIC[fitted.kind].check(fitted)
    if fitted.tensors.keys() != axes.keys():
        return f"it holds {', '.join(fitted.tensors) or 'nothing'}, and not {', '.join(axes)}"
    for name, letters in axes.items():
        tensor = fitted.tensors[name]
        if tensor.dtype.kind != "f" or tensor.ndim != len(letters):
            return f"{name} is {tensor.dtype} with {tensor.ndim} axes"
        for letter, size in zip(letters, tensor.shape, strict=True):
            length = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
            if length != size:
                return f"{name} has {size} numbers along an axis of {length}"
        if not np.isfinite(tensor).all():
            return f"{name} has a number that is not finite"
    return None
