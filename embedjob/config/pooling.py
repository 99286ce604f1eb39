"""Pooling as config values: which tokens count, how their states become a vector, how it ends."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from embedjob.config.types import Positive, Section, keyed_union

SpanRule = Literal[
    "all",
    "text",
    "last_text",
    "from_text",
    "after_prompt",
    "last_token",
    "first_token",
    "tail",
    "pooled",
]
# Span rules under which every part of a long text has tokens of its own that count.
DIVISIBLE_SPANS = ("all", "text", "from_text", "after_prompt")


@dataclass(frozen=True)
class PoolingKind:
    """One pooling: where it may stand, and where its arithmetic is.

    Args:
        single: whether a recipe may name it by itself.
        in_list: whether it may be one of several poolings whose vectors are concatenated.
        divisible: whether `long_text: late_chunk` may pool every part of a text by it.
        function: its function in `vectors/poolers.py`; that of its own name if None.
        weights: whether it has weights; its loader is then in `encoder/outputs/pool_and_heads.py`.
    """

    single: bool = True
    in_list: bool = True
    divisible: bool = True
    function: str | None = None
    weights: bool = False


# First and last are tokens of the span: alone they are span rules, one spelling for each meaning.
POOLINGS: Mapping[str, PoolingKind] = {
    "mean": PoolingKind(),
    "weighted_mean": PoolingKind(),
    "max": PoolingKind(function="maximum"),
    "mean_sqrt_len": PoolingKind(),
    "latent_attention": PoolingKind(in_list=False, divisible=False, weights=True),
    "first": PoolingKind(single=False),
    "last": PoolingKind(single=False),
}
if TYPE_CHECKING:
    Pooling = str
    PoolingPart = str
else:
    Pooling = Literal[tuple(name for name, kind in POOLINGS.items() if kind.single)]
    PoolingPart = Literal[tuple(name for name, kind in POOLINGS.items() if kind.in_list)]


class WeightedFrom(Section):
    """The mean weighted n + 1, n + 2 and so on along the span: n tokens before it count as well."""

    weighted_mean: Positive


PoolingParts = Annotated[tuple[PoolingPart | WeightedFrom, ...], Field(min_length=1)]


class SpanOffset(Section):
    """A span rule whose first token is moved by `offset`.

    With `alone` the pooled segments are tokenized by themselves too, and as many last tokens count
    as they have then: some authors find a text so, and blanks at a seam may make a difference.
    """

    rule: SpanRule
    offset: int = 0
    alone: bool = False


class SpanTag(Section):
    """The segments of a tag, their first token moved by `offset`."""

    tag: str
    offset: int = 0


class Normalize(Section):
    """Scale to unit L2 norm: a finishing step, or a head."""

    normalize: Literal[True]


class Truncate(Section):
    """Keep the first `truncate` dimensions (Matryoshka)."""

    truncate: Positive


class WordWeights(Section):
    """The mean of the vectors of a text's words, each times a weight of the word in the corpus.

    Under its key is the name of a `word_counts` fit, in a recipe that is settled the sha256 of its
    artefact. `idf` is ln((1 + texts) / (1 + texts with the word)) + 1, `sif` is a / (a + p), p the
    word's share of all words (Arora, Liang and Ma, ICLR 2017).
    """

    idf: str | None = None
    sif: str | None = None
    a: Annotated[float, Field(gt=0)] = 1e-3

    @model_validator(mode="after")
    def _has_one_key(self) -> "WordWeights":
        if (self.idf is None) == (self.sif is None):
            raise ValueError("got both or none of idf and sif; give one, with the name of a fit")
        return self

    @property
    def name(self) -> str:
        """The name of the fit, or the sha256 of its artefact."""
        return str(self.idf or self.sif)

    def settled(self, sha256: str) -> "WordWeights":
        """Return the weights by an artefact."""
        return self.model_copy(update={"idf" if self.idf else "sif": sha256})


class FitStep(Section):
    """A finishing step that applies what a fit left: under its kind, the fit's name.

    In a recipe that is settled, the name is the sha256 of the fit's artefact.
    """

    standardize: str | None = None
    whiten: str | None = None
    pca: str | None = None
    flow: str | None = None
    common_component: str | None = None

    @property
    def given(self) -> tuple[str, ...]:
        """The keys that are written."""
        return tuple(name for name in FitStep.model_fields if getattr(self, name) is not None)

    @property
    def kind(self) -> str:
        """The kind of the fit; a step has exactly one key."""
        return self.given[0]

    @property
    def name(self) -> str:
        """The name of the fit, or the sha256 of its artefact."""
        return str(getattr(self, self.kind))

    def settled(self, sha256: str) -> "FitStep":
        """Return the step that names an artefact."""
        return self.model_copy(update={self.kind: sha256})


if TYPE_CHECKING:
    FinishingStep = Normalize | Truncate | FitStep
else:
    FinishingStep = keyed_union(
        {
            "normalize": Normalize,
            "truncate": Truncate,
            **dict.fromkeys(FitStep.model_fields, FitStep),
        },
        name="step",
    )
