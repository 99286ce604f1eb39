"""Rules between the fits of a job and its recipe: a name stands for one fit, and each is used."""

from collections.abc import Mapping, Sequence
from typing import Any

from embedjob.config.fits.fit_kinds import FITS, Calibrate, SampledContinuations
from embedjob.config.pooling import FitStep, WordWeights
from embedjob.config.tables import FIT_NAME
from embedjob.config.types import AnyRecipe


def check_fits(fits: Sequence[Any], recipe: AnyRecipe) -> None:
    """Raise ValueError where the fits of a job and the finishing steps of its recipe do not match.

    Each name stands for one fit, each step names one of its kind, and each fit that can serve a
    step serves one.
    """
    names = [fit.name for fit in fits]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"fit: got the name {twice[0]} twice; give each fit a name of its own")
    _check_models([fit.name for fit in fits if FITS[fit.kind].is_model], recipe)
    _check_weights([fit.name for fit in fits if fit.kind == "word_counts"], recipe)
    _check_continuations([fit for fit in fits if fit.kind == "continuations"], recipe)
    steps = [step for step in recipe.finish if isinstance(step, FitStep)]
    for place, step in enumerate(steps):
        _check_step(step, {fit.name: fit.kind for fit in fits})
        if step.name in {earlier.name for earlier in steps[:place]}:
            raise ValueError(
                f"encoder.finish: {step.kind}: got {step.name} twice; give each step its own fit"
            )
    used = {step.name for step in steps}
    for fit in fits:
        if FITS[fit.kind].is_step and fit.name not in used:
            raise ValueError(
                f"fit: {fit.name} is used by no finishing step; add {{{fit.kind}: {fit.name}}} to"
                " encoder.finish, or leave the fit out"
            )
        if fit.kind == "calibrate":
            _check_ranges(fit, fits, recipe)
        if FITS[fit.kind].pairs and recipe.multi_vector:
            raise ValueError(
                f"fit: {fit.name}: {fit.kind} takes one vector of each row, got aggregation:"
                f" {recipe.aggregation} and long_text: {recipe.long_text}; leave the fit out"
            )


def _check_models(models: Sequence[str], recipe: AnyRecipe) -> None:
    """Raise ValueError unless `encoder.model` names the one vocabulary, where there is one."""
    named = recipe.model.removeprefix(FIT_NAME) if recipe.model.startswith(FIT_NAME) else None
    if named is not None and named not in models:
        made = ", ".join(models) or "none"
        raise ValueError(
            f"encoder.model: got {recipe.model}, but the vocabularies that fit: makes are: {made};"
            f" add {{kind: vocabulary, name: {named}}} to fit:"
        )
    if unused := [name for name in models if name != named]:
        raise ValueError(
            f"fit: {unused[0]} is a vocabulary that the encoder does not use; set encoder.model:"
            f" {FIT_NAME}{unused[0]}, or leave the fit out"
        )


def _check_weights(counts: Sequence[str], recipe: AnyRecipe) -> None:
    """Raise ValueError unless `encoder.pooling` names the one fit of word counts, where one is."""
    named = recipe.pooling.name if isinstance(recipe.pooling, WordWeights) else None
    if named is not None and named not in counts:
        raise ValueError(
            f"encoder.pooling: got {named}, but the word_counts that fit: makes are:"
            f" {', '.join(counts) or 'none'}; add {{kind: word_counts, name: {named}}} to fit:"
        )
    if unused := [name for name in counts if name != named]:
        raise ValueError(
            f"fit: {unused[0]} counts words that encoder.pooling does not weigh; set pooling:"
            f" {{sif: {unused[0]}}}, or leave the fit out"
        )


def _check_continuations(fits: Sequence[SampledContinuations], recipe: AnyRecipe) -> None:
    """Raise ValueError unless a head names the one fit of continuations, where there is one."""
    named, made = recipe.continuations_fit, {fit.name: fit for fit in fits}
    if named is not None and named not in made:
        raise ValueError(
            f"encoder.heads: continuations: got {FIT_NAME}{named}, but the continuations that fit:"
            f" samples are: {', '.join(made) or 'none'}; add {{kind: continuations, name: {named}}}"
            " to fit:"
        )
    if unused := [name for name in made if name != named]:
        raise ValueError(
            f"fit: {unused[0]} samples continuations that no head scores; set heads:"
            f" [{{continuations: {FIT_NAME}{unused[0]}}}], or leave the fit out"
        )
    if named is None:
        return
    if len(recipe.templates) > 1:
        raise ValueError(
            f"encoder.templates: got {len(recipe.templates)}, and continuations are sampled after"
            " one: allowed is one template"
        )
    if recipe.max_tokens <= made[named].max_new_tokens:
        raise ValueError(
            f"fit: {named}: got max_new_tokens: {made[named].max_new_tokens}, but a text and a"
            f" continuation have encoder.max_tokens: {recipe.max_tokens} together; lower the one,"
            " or raise the other"
        )


def views_once_fitted(recipe: AnyRecipe, fits: Sequence[Any]) -> int:
    """Return the number of views of a text once the fits of its job are made."""
    named = recipe.continuations_fit
    sampled = next((fit.number for fit in fits if named is not None and fit.name == named), 1)
    views: int = recipe.views * sampled
    return views


def _check_ranges(fit: Calibrate, fits: Sequence[Any], recipe: AnyRecipe) -> None:
    if recipe.vector_dtype not in ("int8", "uint8"):
        raise ValueError(
            f"fit: {fit.name}: calibrate gives the ranges of int8 and uint8, got vector_dtype:"
            f" {recipe.vector_dtype}; leave the fit out"
        )
    if [one.kind for one in fits].count("calibrate") > 1:
        raise ValueError(
            "fit: got calibrate twice, and an output has one set of ranges; leave one out"
        )


def _check_step(step: FitStep, kinds: Mapping[str, str]) -> None:
    if step.name not in kinds:
        made = ", ".join(kinds) or "none"
        raise ValueError(
            f"encoder.finish: {step.kind}: got {step.name}, but fit: makes {made}; add {{kind:"
            f" {step.kind}, name: {step.name}}} to fit:, or leave the step out"
        )
    if kinds[step.name] != step.kind:
        raise ValueError(
            f"encoder.finish: {step.kind}: got {step.name}, which is a fit of the kind"
            f" {kinds[step.name]}; name a fit of the kind {step.kind}"
        )
