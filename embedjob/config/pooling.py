"""How states become a vector, as config values: spans, poolings, heads, and finishing steps."""

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from embedjob.config.heads import Anchors, RouterHead, SparseHead
from embedjob.config.segments import Section

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
Pooling = Literal["mean", "weighted_mean", "max", "mean_sqrt_len", "latent_attention"]
# Of several, one after another: first and last are of the span, and alone they are spans.
PoolingPart = Literal["mean", "weighted_mean", "max", "mean_sqrt_len", "first", "last"]
Positive = Annotated[int, Field(ge=1)]

_MODULE_PATH = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")


def _inside(path: str) -> str:
    if not _MODULE_PATH.fullmatch(path):
        raise ValueError(f"got {path!r}, allowed is a directory inside the model folder: 2_Dense")
    return path


ModulePath = Annotated[str, AfterValidator(_inside)]


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
    """Scale to unit L2 norm."""

    normalize: Literal[True]


class Truncate(Section):
    """Keep the first `truncate` dimensions (Matryoshka)."""

    truncate: Positive


class WeightedFrom(Section):
    """The mean weighted n + 1, n + 2 and so on along the span: n tokens before it count as well."""

    weighted_mean: Positive


class Pooler(Section):
    """The model's own layer over a pooled vector, as BERT and RoBERTa have it: tanh(W h + b)."""

    pooler: Literal[True]


class Dense(Section):
    """The sentence-transformers Dense module in this directory of the model folder."""

    dense: ModulePath


class LayerNorm(Section):
    """The sentence-transformers LayerNorm module in this directory of the model folder."""

    layer_norm: ModulePath


_HEADS = ("pooler", "dense", "layer_norm", "normalize", "sparse_lm", "router", "anchors")


def _head_kind(head: Any) -> str | None:
    keys = head if isinstance(head, dict) else getattr(type(head), "model_fields", ())
    return next((kind for kind in _HEADS if kind in keys), None)


# By its key, or a mistake in one kind of head would be told as a mistake in every kind.
Head = Annotated[
    Annotated[Pooler, Tag("pooler")]
    | Annotated[Dense, Tag("dense")]
    | Annotated[LayerNorm, Tag("layer_norm")]
    | Annotated[Normalize, Tag("normalize")]
    | Annotated[SparseHead, Tag("sparse_lm")]
    | Annotated[RouterHead, Tag("router")]
    | Annotated[Anchors, Tag("anchors")],
    Discriminator(
        _head_kind,
        custom_error_type="head",
        custom_error_message="an object with one of the keys " + ", ".join(_HEADS),
    ),
]


class FitStep(Section):
    """A finishing step that a fit made before the run."""

    standardize: str | None = None
    whiten: str | None = None
    flow: str | None = None


PoolingParts = Annotated[tuple[PoolingPart | WeightedFrom, ...], Field(min_length=1)]


def check_available(finish: Iterable[Any]) -> None:
    """ValueError at a finishing step that this version cannot take."""
    for step in finish:
        if not isinstance(step, FitStep):
            continue
        given = [name for name in FitStep.model_fields if getattr(step, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"finish: a step has exactly one key; got {' and '.join(given) or 'none'}, allowed"
                " is {normalize: true} or {truncate: DIMENSIONS}"
            )
        raise ValueError(
            f"finish: {given[0]} is of fitted steps, which are not available in this version"
        )
