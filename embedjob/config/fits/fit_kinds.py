"""Fits: what is computed from a corpus' vectors before its run, one section for each kind.

A fit that serves a finishing step is named there: `finish: [{whiten: w}]`. The others leave an
artefact beside the embeddings.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from embedjob.config.types import Positive, Section


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
    return kind if isinstance(kind, str) and kind in FITS else None


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
