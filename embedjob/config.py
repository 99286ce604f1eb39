"""The job as frozen values: what is read, how it is encoded, where it goes, and on what."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from embedjob.segments import Demonstration, Section, Segment

Role = Literal["query", "document", "symmetric"]
SpanRule = Literal[
    "all", "text", "last_text", "from_text", "last_token", "first_token", "tail", "pooled"
]
Pooling = Literal["mean", "weighted_mean", "max", "latent_attention"]
Aggregation = Literal["mean", "mean_of_normalized", "weighted", "max", "concat", "keep"]
VectorDtype = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

_OUTPUT_COLUMNS_WORDS = """
row shard id embedding text_hash tokens truncated part char_start char_stop sparse_indices
sparse_values
"""
OUTPUT_COLUMNS = frozenset(_OUTPUT_COLUMNS_WORDS.split())
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}

# What the config can say and no engine does yet: refused, never accepted and ignored.
_NOT_YET: dict[str, frozenset[Any]] = {
    "pooling": frozenset({"latent_attention"}),
    "aggregation": frozenset({"keep"}),
    "vector_dtype": frozenset({"int8", "uint8", "binary", "ubinary"}),
    "long_text": frozenset({"chunk_mean", "late_chunk"}),
}
_EMPTY_UNTIL_BUILT = ("adapters", "interventions", "heads")


class Input(Section):
    """Which Parquet shards are read, and what of them."""

    path: str | tuple[str, ...]
    text: str | tuple[str, ...]
    separator: str = "\n"
    id: str | None = None
    keep: tuple[str, ...] = ()
    filter: tuple[Any, ...] | None = None
    on_bad_row: Literal["quarantine", "fail", "null"] = "quarantine"


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


class Fitted(Section):
    """A finishing step that a fit made before the run."""

    standardize: str | None = None
    whiten: str | None = None
    flow: str | None = None


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
    prepare: Literal["none", "eol", "fullstop", "strip"] = "none"
    templates: tuple[str | WeightedTemplate | tuple[Segment, ...], ...] = ("{text}",)
    special_tokens: SpecialTokens = SpecialTokens()
    attention: Literal["causal", "bidirectional"] = "causal"
    layer: int | tuple[int, ...] = -1
    span: SpanRule | SpanOffset | SpanTag = "all"
    pooling: Pooling = "mean"
    aggregation: Aggregation = "mean"
    interventions: tuple[Any, ...] = ()
    heads: tuple[Any, ...] = ()
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
        return self

    @property
    def normalized(self) -> bool:
        """Whether the embeddings are of unit norm when finished."""
        return bool(self.finish) and isinstance(self.finish[-1], Normalize)


class ActorRange(Section):
    """How far the pool may shrink and grow."""

    min: Positive = 1
    max: Positive


class Pool(Section):
    """The actors that host the encoder."""

    actors: Literal["auto"] | Positive | ActorRange = "auto"
    gpus_per_actor: Annotated[float, Field(ge=0)] = 1
    cpus_per_actor: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    tokens_per_microbatch: Literal["auto"] | Positive = "auto"

    @property
    def cpus(self) -> float:
        """CPUs one actor asks Ray for: on CPU a half, or no read task would ever be scheduled."""
        if self.cpus_per_actor != "auto":
            return float(self.cpus_per_actor)
        return 1.0 if self.gpus_per_actor else 0.5


class Output(Section):
    """Where the embedding shards go."""

    path: str
    chunk_rows: Positive = 16384
    compression: Literal["zstd", "snappy", "gzip", "lz4", "none"] = "zstd"
    reuse_from: tuple[str, ...] = ()

    @field_validator("reuse_from")
    @classmethod
    def _is_not_built(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value:
            raise ValueError("not available in this version; leave it empty")
        return value


class Run(Section):
    """How long, how far, and how much may go wrong."""

    limit: Positive | None = None
    max_quarantined: Fraction = 0.01
    wait_for_resources: str = "30m"
    stall_seconds: Positive = 1800

    @field_validator("wait_for_resources")
    @classmethod
    def _is_a_duration(cls, value: str) -> str:
        if not re.fullmatch(r"\d+(\.\d+)?[smh]", value):
            raise ValueError("allowed is a number with s, m or h, such as 90s, 30m or 2h")
        return value

    @property
    def resource_wait_seconds(self) -> float:
        """`wait_for_resources` in seconds."""
        return float(self.wait_for_resources[:-1]) * _SECONDS[self.wait_for_resources[-1]]


class Job(Section):
    """One job file, resolved."""

    input: Input
    encoder: Recipe
    generate: Any = None
    fit: Any = None
    pool: Pool = Pool()
    output: Output
    run: Run = Run()

    @field_validator("generate", "fit")
    @classmethod
    def _is_not_built(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError("not available in this version; leave it out")
        return value

    @model_validator(mode="after")
    def _columns_do_not_collide(self) -> "Job":
        taken = sorted(OUTPUT_COLUMNS.intersection(self.input.keep))
        if taken:
            raise ValueError(
                f"input.keep: {', '.join(taken)} would collide with the output's own columns"
                f" ({', '.join(sorted(OUTPUT_COLUMNS))}); rename them in the input"
            )
        return self
