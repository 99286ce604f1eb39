"""The encoder section of a job as frozen values: every knob that decides a vector."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from embedjob.beside import Decode, RouterHead, SparseHead, require_sound, sparse_in
from embedjob.segments import Demonstration, Section, Segment

Role = Literal["query", "document", "symmetric"]
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
Aggregation = Literal["mean", "mean_of_normalized", "weighted", "max", "concat", "keep"]
VectorDtype = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
Positive = Annotated[int, Field(ge=1)]

# What the config can say and no engine does yet: refused, never accepted and ignored.
_NOT_YET: dict[str, frozenset[Any]] = {
    "aggregation": frozenset({"keep"}),
    "long_text": frozenset({"chunk_mean", "late_chunk"}),
}
_EMPTY_UNTIL_BUILT = ("adapters", "interventions")
_MODULE_PATH = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")


def _inside(path: str) -> str:
    if not _MODULE_PATH.fullmatch(path):
        raise ValueError(f"got {path!r}, allowed is a directory inside the model folder: 2_Dense")
    return path


ModulePath = Annotated[str, AfterValidator(_inside)]


class SpecialTokens(Section):
    """Which tokens frame a view; EOS is appended by id, after truncation.

    `bos: literal` is none from the tokenizer, and requires that every template begins with one.
    """

    bos: Literal["auto", "none", "literal"] = "auto"
    eos: Literal["none", "append"] = "none"
    eos_id: int | None = None
    add: tuple[str, ...] = ()


class WeightedTemplate(Section):
    """A template, its weight under `aggregation: weighted`, and how its segments are joined.

    Joint segments are tokenized as one string; separate ones each alone, their ids joined.
    """

    template: str | tuple[Segment, ...]
    weight: float = 1.0
    join: Literal["joint", "separate"] = "joint"

    @model_validator(mode="after")
    def _has_what_it_joins(self) -> "WeightedTemplate":
        if self.join == "separate" and isinstance(self.template, str):
            raise ValueError("join: separate is of a list of segments; got a string")
        return self


class SpanOffset(Section):
    """A span rule whose first token is moved by `offset`."""

    rule: SpanRule
    offset: int = 0


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


_HEADS = ("pooler", "dense", "layer_norm", "normalize", "sparse_lm", "router")


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
    | Annotated[RouterHead, Tag("router")],
    Discriminator(
        _head_kind,
        custom_error_type="head",
        custom_error_message="an object with one of the keys " + ", ".join(_HEADS),
    ),
]


class Fitted(Section):
    """A finishing step that a fit made before the run."""

    standardize: str | None = None
    whiten: str | None = None
    flow: str | None = None


PoolingParts = Annotated[tuple[PoolingPart | WeightedFrom, ...], Field(min_length=1)]


class Recipe(Section):
    """The `encoder` section, resolved: every knob that decides a vector's value."""

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    adapters: tuple[str, ...] = ()
    method: str | None = None
    role: Role = "document"
    instruction: str | None = None
    demonstrations: tuple[str | Demonstration, ...] = ()
    demonstration: str | None = None
    prepare: Literal["none", "eol", "moee", "fullstop", "strip"] = "none"
    templates: tuple[str | WeightedTemplate | tuple[Segment, ...], ...] = ("{text}",)
    special_tokens: SpecialTokens = SpecialTokens()
    attention: Literal["causal", "bidirectional"] = "causal"
    layer: int | tuple[int, ...] = -1
    span: SpanRule | SpanOffset | SpanTag = "all"
    pooling: Pooling | WeightedFrom | PoolingParts = "mean"
    aggregation: Aggregation = "mean"
    interventions: tuple[Any, ...] = ()
    heads: tuple[Head, ...] = ()
    decode: Decode | None = None
    finish: tuple[Normalize | Truncate | Fitted, ...] = (Normalize(normalize=True),)
    vector_dtype: VectorDtype = "float32"
    max_tokens: Positive = 512
    long_text: Literal["truncate", "chunk_mean", "late_chunk", "bad"] = "truncate"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    similarity: Similarity = "cosine"

    @model_validator(mode="after")
    def _engine_exists(self) -> "Recipe":
        for key, missing in _NOT_YET.items():
            if getattr(self, key) in missing:
                raise ValueError(f"{key}: {getattr(self, key)} is not available in this version")
        for key in _EMPTY_UNTIL_BUILT:
            if getattr(self, key):
                raise ValueError(f"{key} is not available in this version; leave it empty")
        if any(isinstance(step, Fitted) for step in self.finish):
            raise ValueError("finish: fitted steps are not available in this version")
        require_sound(self)
        return self

    @property
    def vector_heads(self) -> tuple[Head, ...]:
        """The heads that change the vector itself, in order."""
        return tuple(head for head in self.heads if not isinstance(head, SparseHead | RouterHead))

    @property
    def reads_logits(self) -> bool:
        """Whether anything asks for the language-model head."""
        return sparse_in(self.heads) is not None or self.decode is not None

    @property
    def normalized(self) -> bool:
        """Whether the embeddings are of unit norm when finished."""
        return bool(self.finish) and isinstance(self.finish[-1], Normalize)
