"""The encoder section of a job as frozen values: every knob that decides a vector."""

from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from embedjob.config.heads import (
    Anchors,
    Decode,
    Measure,
    RouterHead,
    SparseHead,
    WeightedSum,
    anchors_in,
    check_heads,
    check_summands,
    sparse_in,
)
from embedjob.config.interventions import (
    Contrast,
    Contrasting,
    Intervention,
    Prepend,
    Prepending,
    check_interventions,
)
from embedjob.config.pooling import (
    FitStep,
    Head,
    Normalize,
    Pooling,
    PoolingParts,
    SpanOffset,
    SpanRule,
    SpanTag,
    Truncate,
    WeightedFrom,
    check_available,
)
from embedjob.config.segments import Demonstration, Section, Segment

Role = Literal["query", "document", "symmetric"]
Aggregation = Literal["mean", "mean_of_normalized", "weighted", "max", "concat", "keep"]
VectorDtype = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]
Positive = Annotated[int, Field(ge=1)]
_ItemT = TypeVar("_ItemT")

# In a validation's context: what is missing may yet come from a method or a model folder.
PARTIAL = "partial"

# What late_chunk can share out over the parts of a text, and give true characters of.
_LATE: dict[str, tuple[str, ...]] = {
    "span": ("all", "text", "from_text", "after_prompt"),
    "pooling": ("mean", "weighted_mean", "max", "mean_sqrt_len"),
    "prepare": ("none", "strip"),
}


class HubModel(Section):
    """A model or an adapter on the hub, at a commit."""

    id: str
    revision: str | None = None


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
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    join: Literal["joint", "separate"] = "joint"

    @model_validator(mode="after")
    def _has_what_it_joins(self) -> "WeightedTemplate":
        if self.join == "separate" and isinstance(self.template, str):
            raise ValueError("join: separate is of a list of segments; got a string")
        return self


def _some(given: tuple[_ItemT, ...]) -> tuple[_ItemT, ...]:
    # Not min_length, which is told again of every list with a bad item in it.
    if not given:
        raise ValueError("got [], allowed is a list of at least one")
    return given


Templates = Annotated[
    tuple[str | WeightedTemplate | tuple[Segment, ...], ...], AfterValidator(_some)
]


class Recipe(Section):
    """The `encoder` section, resolved: every knob that decides a vector's value.

    `base` is where the weights lie if `model` is an adapter, and by default what that one names;
    `adapters` are merged into the weights in order. Demonstrations that do not count are over and
    above `max_tokens`. With `word_cut` whole words are dropped of a text with more tokens than
    that, before it is prepared and put into a template; that counts up to `max_tokens` only.
    """

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    base: str | HubModel | None = None
    adapters: tuple[str | HubModel, ...] = ()
    method: str | None = None
    role: Role = "document"
    instruction: str | None = None
    demonstrations: tuple[str | Demonstration, ...] = ()
    demonstration: str | None = None
    demonstrations_count: bool = True
    word_cut: Positive | None = None
    prepare: Literal["none", "eol", "moee", "fullstop", "strip", "rstrip"] = "none"
    templates: Templates = ("{text}",)
    special_tokens: SpecialTokens = SpecialTokens()
    attention: Literal["causal", "bidirectional"] = "causal"
    layer: int | Annotated[tuple[int, ...], AfterValidator(_some)] = -1
    span: SpanRule | SpanOffset | SpanTag = "all"
    pooling: Pooling | WeightedFrom | PoolingParts = "mean"
    aggregation: Aggregation = "mean"
    interventions: tuple[Intervention, ...] = ()
    heads: tuple[Head, ...] = ()
    decode: Decode | None = None
    finish: tuple[Normalize | Truncate | FitStep, ...] = (Normalize(normalize=True),)
    vector_dtype: VectorDtype = "float32"
    max_tokens: Positive = 512
    long_text: Literal["truncate", "chunk_mean", "late_chunk", "bad"] = "truncate"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Literal["none", "int8", "float8"] = "none"
    similarity: Measure | WeightedSum = "cosine"

    @model_validator(mode="after")
    def _goes_together(self, info: ValidationInfo) -> "Recipe":
        check_available(self.finish)
        partial = bool((info.context or {}).get(PARTIAL))
        if not partial:
            check_summands(self)
        if not partial or self.method is None:
            self._require_sound()
        return self

    def _require_sound(self) -> None:
        """ValueError where keys do not go together."""
        check_heads(self)
        check_interventions(
            self.interventions,
            causal=self.attention == "causal",
            long_text=self.long_text,
            decodes=self.decode is not None,
        )
        if self.word_cut is not None and self.long_text not in ("truncate", "bad"):
            raise ValueError(
                f"word_cut drops what long_text: {self.long_text} would embed in parts; leave one"
                " of both out"
            )
        if self.long_text == "late_chunk":
            self._require_poolable_parts()

    def _require_poolable_parts(self) -> None:
        for key, allowed in _LATE.items():
            if getattr(self, key) not in allowed:
                raise ValueError(
                    f"{key}: got {getattr(self, key)}, and with long_text: late_chunk every"
                    f" part of the text is pooled: allowed is {', '.join(allowed)}"
                )
        if len(self.templates) > 1 or not _holds_one_text(self.templates[0]):
            raise ValueError(
                "templates: with long_text: late_chunk allowed is one template, its segments"
                " joined as one string, with one text in it"
            )

    @property
    def multi_vector(self) -> bool:
        """Whether a row may have several lines in the output."""
        return self.aggregation == "keep" or self.long_text == "late_chunk"

    @property
    def prepend(self) -> Prepend | None:
        """The token prepending, if there is one."""
        found = (one.prepend for one in self.interventions if isinstance(one, Prepending))
        return next(found, None)

    @property
    def contrast(self) -> Contrast | None:
        """The contrastive prompting, if there is one."""
        found = (one.contrast for one in self.interventions if isinstance(one, Contrasting))
        return next(found, None)

    @property
    def vector_heads(self) -> tuple[Head, ...]:
        """The heads that change the vector itself, in order."""
        others = SparseHead | RouterHead | Anchors
        return tuple(head for head in self.heads if not isinstance(head, others))

    @property
    def views(self) -> int:
        """How many views a text has: one per template, or per template and anchor."""
        return len(self.templates) * max(1, len(anchors_in(self.heads)))

    @property
    def measure(self) -> Measure:
        """How two embeddings compare."""
        given = self.similarity
        return given.embedding if isinstance(given, WeightedSum) else given

    @property
    def reads_logits(self) -> bool:
        """Whether anything asks for the language-model head."""
        asked = sparse_in(self.heads) is not None or bool(anchors_in(self.heads))
        return asked or self.decode is not None

    @property
    def normalized(self) -> bool:
        """Whether the embeddings are of unit norm when finished."""
        return bool(self.finish) and isinstance(self.finish[-1], Normalize)


def _holds_one_text(template: str | WeightedTemplate | tuple[Segment, ...]) -> bool:
    """Whether a template is tokenized as one string that holds the text once."""
    if isinstance(template, WeightedTemplate):
        return template.join == "joint" and _holds_one_text(template.template)
    return isinstance(template, str) or sum(one.text is not None for one in template) == 1
