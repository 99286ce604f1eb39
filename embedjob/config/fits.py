"""Fits: what is computed from a corpus' vectors before its run, one section for each kind.

A fit that serves a finishing step is named there: `finish: [{whiten: w}]`. The others leave an
artefact beside the embeddings.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from embedjob.config.pooling import FitStep, WordWeights
from embedjob.config.tables import FIT_NAME
from embedjob.config.types import Positive, Section

# A recipe: its module is above the job's, which imports this module.
AnyRecipe = Any


def _pattern(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"got {pattern!r}, which is no regular expression ({error})") from error
    if groups > 1:
        raise ValueError(f"got {pattern!r} with {groups} groups, allowed is one at most")
    return pattern


class FitSection(Section):
    """What all fits have: a name, and the vectors that they are computed from.

    `source`, in a job `from`, is an output whose vectors are read in place of this job's own;
    `sample` is the number of rows, None for every row, and `seed` chooses them.
    """

    name: Annotated[str, Field(pattern="^[a-z0-9][a-z0-9_-]*$")]
    source: str | None = Field(default=None, alias="from")
    sample: Positive | None = 100_000
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 17


class Whiten(FitSection):
    """BERT-whitening: uncorrelated dimensions of unit variance, by falling variance before it."""

    kind: Literal["whiten"]
    dimensions: Positive | None = None


class Pca(FitSection):
    """Principal components: uncorrelated dimensions by falling variance, the mean taken away."""

    kind: Literal["pca"]
    dimensions: Positive | None = None


class Standardize(FitSection):
    """The z-score: each dimension with mean 0 and variance 1."""

    kind: Literal["standardize"]


class Kmeans(FitSection):
    """Centroids of clusters of vectors, or of directions where `spherical` says so.

    There are at most so many passes over all vectors; fewer where the centroids move by less than
    `tolerance`, as a share of the mean square of their length.
    """

    kind: Literal["kmeans"]
    clusters: Positive
    spherical: bool = False
    iterations: Positive = 25
    tolerance: Annotated[float, Field(ge=0)] = 1e-4


class Calibrate(FitSection):
    """The ranges of int8 and uint8: the smallest and the largest value of each dimension."""

    kind: Literal["calibrate"]


class Align(FitSection):
    """The rotation from this job's space to that of the output `from`, of the same texts.

    Queries of the new model then search the old vectors, as long as a migration runs.
    """

    kind: Literal["align"]
    source: str = Field(alias="from")


class Flow(FitSection):
    """BERT-flow: an invertible map to a normal distribution, trained on the sample.

    `levels` of `depth` steps, couplings with two layers of `hidden` numbers; it is trained for at
    most so many `epochs`, fewer where the loss on a tenth that is held out no longer falls.
    """

    kind: Literal["flow"]
    sample: Positive = 100_000
    levels: Annotated[int, Field(ge=1, le=10)] = 3
    depth: Annotated[int, Field(ge=1, le=100)] = 3
    hidden: Positive = 32
    epochs: Positive = 10
    batch_size: Positive = 64
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3


class VocabularyFit(FitSection):
    """The terms of all texts, and in how many texts each is: the model of `tfidf` and `bow`.

    `min_df` and `max_df` bound the texts of a term, as a number or as a share of all texts;
    `max_features` keeps the terms that are there most often. As scikit-learn's TfidfVectorizer, but
    for terms that are there equally often, of which the first in order are kept.
    """

    kind: Literal["vocabulary"]
    source: None = Field(default=None, alias="from")
    sample: None = None
    lowercase: bool = True
    token_pattern: Annotated[str, AfterValidator(_pattern)] = r"(?u)\b\w\w+\b"
    min_df: Positive | Annotated[float, Field(ge=0, le=1)] = 1
    max_df: Positive | Annotated[float, Field(gt=0, le=1)] = 1.0
    max_features: Positive | None = None


class WordCounts(FitSection):
    """Of each word of a static table: in how many texts it is, and how often in all of them."""

    kind: Literal["word_counts"]
    source: None = Field(default=None, alias="from")
    sample: None = None


class CommonComponent(FitSection):
    """The direction that all vectors have most in common, which is taken out of each (SIF).

    The first right singular vector of the matrix of vectors, no mean taken away (Arora, Liang and
    Ma, ICLR 2017).
    """

    kind: Literal["common_component"]


class SampledContinuations(FitSection):
    """What the model goes on with after texts: the continuations by which all texts are compared.

    After each of `sample` distinct texts, under the job's template, `count` sequences of up to
    `max_new_tokens` tokens are drawn from all tokens of the model by their probabilities, without a
    limit by rank, and cut after the first token that ends a text (Liu et al., arXiv:2310.18348).
    """

    kind: Literal["continuations"]
    source: None = Field(default=None, alias="from")
    sample: Positive = 40
    count: Positive = 1
    max_new_tokens: Positive = 20

    @property
    def number(self) -> int:
        """How many continuations it samples."""
        return self.sample * self.count


Fit = Any


@dataclass(frozen=True)
class FitKind:
    """One kind of fit.

    Args:
        section: what a job writes.
        is_step: whether a finishing step of the same key applies it; else no step may name it.
        fewest: the fewest vectors that it can be computed from, by its section and their width.
        before: whether it is made before the first vector is written, without a step of its own.
        is_model: whether `encoder.model: fit:NAME` names it.
        of_texts: whether it is computed from texts, and not from vectors.
        pairs: whether `from` is another space: the vectors of both are read, row by row.
        misfit: why vectors of a width cannot be fitted, by the section and the width; None if they
            can.
        advice: what to do where there are fewer than `fewest`.
    """

    section: type[FitSection]
    is_step: bool
    fewest: Callable[[Any, int], int]
    before: bool = False
    is_model: bool = False
    of_texts: bool = False
    pairs: bool = False
    misfit: Callable[[Any, int], str | None] = lambda section, width: None
    advice: str = "set fewer dimensions or a larger sample"


def halving_problem(width: int, levels: int) -> str | None:
    """Return why a width cannot be halved once for each level of a flow; None where it can."""
    if width % 2**levels == 0:
        return None
    if width % 2:
        return f"got vectors of odd width {width}, which a flow cannot halve; truncate them before"
    most = next(level for level in range(levels, 0, -1) if width % 2**level == 0)
    return (
        f"got vectors of width {width}, which cannot be halved {levels} times; set levels: {most}"
        " or fewer"
    )


def _one_more(section: Whiten | Pca, width: int) -> int:
    return (section.dimensions or width) + 1


FITS: Mapping[str, FitKind] = {
    "whiten": FitKind(Whiten, is_step=True, fewest=_one_more),
    "pca": FitKind(Pca, is_step=True, fewest=_one_more),
    "standardize": FitKind(Standardize, is_step=True, fewest=lambda section, width: 2),
    "flow": FitKind(
        Flow,
        is_step=True,
        fewest=lambda section, width: 40,
        misfit=lambda section, width: halving_problem(width, section.levels),
    ),
    "calibrate": FitKind(Calibrate, is_step=False, fewest=lambda section, width: 2, before=True),
    "vocabulary": FitKind(
        VocabularyFit,
        is_step=False,
        fewest=lambda section, width: 1,
        before=True,
        is_model=True,
        of_texts=True,
    ),
    "word_counts": FitKind(
        WordCounts, is_step=False, fewest=lambda section, width: 1, before=True, of_texts=True
    ),
    "common_component": FitKind(CommonComponent, is_step=True, fewest=lambda section, width: 1),
    "continuations": FitKind(
        SampledContinuations,
        is_step=False,
        fewest=lambda section, width: section.sample,
        before=True,
        of_texts=True,
        advice="set a smaller sample",
    ),
    "kmeans": FitKind(Kmeans, is_step=False, fewest=lambda section, width: section.clusters),
    "align": FitKind(Align, is_step=False, fewest=lambda section, width: width, pairs=True),
}


def _kind_of(written: Any) -> str | None:
    kind = written.get("kind") if isinstance(written, dict) else getattr(written, "kind", None)
    return kind if kind in FITS else None


if not TYPE_CHECKING:
    Fit = Annotated[
        reduce(or_, (Annotated[one.section, Tag(kind)] for kind, one in FITS.items())),
        Discriminator(
            _kind_of,
            custom_error_type="fit",
            custom_error_message="an object whose kind is one of " + ", ".join(FITS),
        ),
    ]
Fits = tuple[Fit, ...]


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
