"""The recipe: the `encoder` section of a job as frozen values, every knob that decides a vector."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, model_validator

from embedjob.config.checks import check_rules
from embedjob.config.generation import Generation
from embedjob.config.heads import (
    EMBEDDING,
    Continuation,
    Decode,
    Head,
    Measure,
    WeightedSum,
    kinds_of,
)
from embedjob.config.interventions import Intervention
from embedjob.config.pooling import (
    FinishingStep,
    Normalize,
    Pooling,
    PoolingParts,
    SpanOffset,
    SpanRule,
    SpanTag,
    WeightedFrom,
    WordWeights,
)
from embedjob.config.segments import Demonstration, Templates
from embedjob.config.types import NotEmpty, Positive, Section

Role = Literal["query", "document", "symmetric"]
Aggregation = Literal["mean", "mean_of_normalized", "weighted", "max", "concat", "keep"]
VectorDtype = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]

# In a validation's context: a missing key may yet come from a method or a model folder.
PARTIAL = "partial"


class HubModel(Section):
    """A model or an adapter on the hub, at a commit."""

    id: str
    revision: str | None = None


class SpecialTokens(Section):
    """Which tokens frame a view; EOS is appended by id, after truncation.

    With `bos: literal` the tokenizer adds none, and every template must begin with a BOS token.
    """

    bos: Literal["auto", "none", "literal"] = "auto"
    eos: Literal["none", "append"] = "none"
    eos_id: int | None = None
    add: tuple[str, ...] = ()


class Split(Section):
    """How `long_text: split` cuts texts into passages.

    A passage has at most `max_tokens` tokens, counted without a template. The columns `carry` stand
    before each of them, and count; so do whole sentences of the passage before it, of at most
    `overlap` tokens. `borders` is the rule that chooses where passages end, for the record.
    """

    max_tokens: Positive = 400
    overlap: Annotated[int, Field(ge=0)] = 0
    carry: tuple[str, ...] = ()
    borders: Literal["landmarks"] = "landmarks"


class Recipe(Section):
    """The `encoder` section, resolved: every knob that decides a vector's value.

    `base` is where the weights are if `model` is an adapter, by default the model that the adapter
    names; `adapters` are merged into the weights in order. With `demonstrations_count: false`
    demonstrations are over and above `max_tokens`. `word_cut` drops whole words of a text that has
    more tokens than that, before it is prepared and put into a template; tokens are counted up to
    `max_tokens`. `truncation_side` is the side on which `long_text: truncate` cuts a text.
    `generate` is the job's section of that name, resolved; no job writes it here.
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
    layer: int | Annotated[tuple[int, ...], NotEmpty] = -1
    span: SpanRule | SpanOffset | SpanTag = "all"
    pooling: Pooling | WeightedFrom | PoolingParts | WordWeights = "mean"
    aggregation: Aggregation = "mean"
    interventions: tuple[Intervention, ...] = ()
    heads: tuple[Head, ...] = ()
    decode: Decode | None = None
    finish: tuple[FinishingStep, ...] = (Normalize(normalize=True),)
    vector_dtype: VectorDtype = "float32"
    max_tokens: Positive = 512
    long_text: Literal["truncate", "chunk_mean", "late_chunk", "split", "bad"] = "truncate"
    split: Split = Split()
    truncation_side: Literal["right", "left"] = "right"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Literal["none", "int8", "float8"] = "none"
    similarity: Measure | WeightedSum = "cosine"
    generate: Generation | None = None

    @model_validator(mode="after")
    def _goes_together(self, info: ValidationInfo) -> "Recipe":
        partial = bool((info.context or {}).get(PARTIAL))
        check_rules(self, "as written", *(() if partial else ("with folder",)))
        if not partial or self.method is None:
            check_rules(self, "with method")
        return self

    @property
    def multi_vector(self) -> bool:
        """Whether a row may have several lines in the output."""
        return self.aggregation == "keep" or self.long_text in ("late_chunk", "split")

    @property
    def headings(self) -> tuple[str, ...]:
        """The columns that stand before every passage; none where texts are not split."""
        return self.split.carry if self.long_text == "split" else ()

    @property
    def vector_heads(self) -> tuple[Head, ...]:
        """The heads that change the vector itself, in order."""
        return tuple(head for _, kind, head in kinds_of(self.heads) if kind.reads == "pooled")

    @property
    def head_columns(self) -> frozenset[str]:
        """The columns that heads write besides the embedding."""
        written = (kind.writes(head) for _, kind, head in kinds_of(self.heads))
        return frozenset(column for columns in written for column in columns) - {EMBEDDING}

    @property
    def continuations(self) -> tuple[Continuation, ...]:
        """What makes further views of every template, strings or ids; none in most recipes."""
        each = (kind.continuations(head) for _, kind, head in kinds_of(self.heads))
        return tuple(one for several in each for one in several)

    @property
    def continuations_fit(self) -> str | None:
        """The name of the fit that is to sample the continuations; None where none is."""
        named = (kind.fit(head) for _, kind, head in kinds_of(self.heads))
        return next((name for name in named if name is not None), None)

    @property
    def reads_text_words(self) -> bool:
        """Whether a head needs the ids of each text's own words."""
        return any(kind.text_words(head) for _, kind, head in kinds_of(self.heads))

    @property
    def views(self) -> int:
        """The number of views of a text: one per template, or per template and continuation."""
        return len(self.templates) * max(1, len(self.continuations))

    @property
    def measure(self) -> Measure:
        """The measure by which two embeddings are compared."""
        given = self.similarity
        return given.embedding if isinstance(given, WeightedSum) else given

    @property
    def reads_logits(self) -> bool:
        """Whether a head or decoding needs the language-model head."""
        heads = any(kind.reads == "logits" for _, kind, _ in kinds_of(self.heads))
        return heads or self.decode is not None

    @property
    def reads_routers(self) -> bool:
        """Whether a head needs the scores of routers."""
        return any(kind.reads == "router_logits" for _, kind, _ in kinds_of(self.heads))

    @property
    def normalized(self) -> bool:
        """Whether finished embeddings have unit norm."""
        return bool(self.finish) and isinstance(self.finish[-1], Normalize)
