"""Heads: what a recipe reads off a model beside the pooled states, one table entry for each kind.

`HEADS` answers what other rooms ask of a head: what it reads, which columns it writes, how wide it
makes the vector, which views it adds, and what it requires of the other keys.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, model_validator

from embedjob.config.pooling import Normalize
from embedjob.config.tables import FIT_NAME
from embedjob.config.types import NonEmptyStr, Positive, Section, keyed_union

Measure = Literal["cosine", "dot", "euclidean", "manhattan"]

# Of drawn tokens, where none is written.
_SEED = 42
_MODULE_PATH = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")


def _inside(path: str) -> str:
    if not _MODULE_PATH.fullmatch(path):
        raise ValueError(
            f"got {path!r}, allowed is a directory inside the model folder, such as 2_Dense"
        )
    return path


ModulePath = Annotated[str, AfterValidator(_inside)]


class Pooler(Section):
    """The model's own layer over a pooled vector, as BERT and RoBERTa have it: tanh(W h + b)."""

    pooler: Literal[True]


class Dense(Section):
    """The sentence-transformers Dense module in this directory of the model folder."""

    dense: ModulePath


class LayerNorm(Section):
    """The sentence-transformers LayerNorm module in this directory of the model folder."""

    layer_norm: ModulePath


class SparseLm(Section):
    """Weights over the vocabulary: the language-model head's logits over the span, log(1 + relu).

    `words: text` keeps the ids of the text's own words (PromptReps), or the ten heaviest ids where
    the text has none. `log1p_relu` takes the logarithm twice. With `scale` each weight w becomes
    rint(scale * w).
    """

    words: Literal["all", "text"] = "all"
    pooling: Literal["max", "sum"] = "max"
    activation: Literal["relu", "log1p_relu"] = "relu"
    top_k: Positive | None = None
    scale: Annotated[float, Field(gt=0)] | None = None


class SparseHead(Section):
    """The columns `sparse_indices` and `sparse_values`."""

    sparse_lm: SparseLm


class TermWeights(Section):
    """Weights of a text's terms: their counts, 1 for each (`binary`), or counts times idf.

    `sublinear_tf` takes 1 + ln(count) in place of the count, and `norm` scales a row to unit
    length: as in scikit-learn's TfidfVectorizer, whose defaults these are.
    """

    weights: Literal["tfidf", "counts", "binary"] = "tfidf"
    sublinear_tf: bool = False
    smooth_idf: bool = True
    norm: Literal["l2", "none"] = "l2"


class BagOfWords(Section):
    """The columns `sparse_indices` and `sparse_values`, by a vocabulary that a fit has made."""

    bag_of_words: TermWeights


class RouterScores(Section):
    """The scores that the routers of a mixture of experts give each expert, layer after layer.

    They are averaged over the span and over views; with `join: concat` they end the vector itself.
    """

    scores: Literal["logits", "softmax"] = "logits"
    join: Literal["column", "concat"] = "column"


class RouterHead(Section):
    """The column `router`, or the last dimensions of the embedding."""

    router: RouterScores


TokenIds = tuple[int, ...]
# A string is tokenized with its template; ids follow the ids of the whole view.
Continuation = str | TokenIds
_FIT = re.compile(f"{FIT_NAME}[a-z0-9][a-z0-9_-]*")


def _written(given: Any) -> Any:
    """Return continuations as tuples; ValueError where they are none, or the name of no fit."""
    if isinstance(given, str) and _FIT.fullmatch(given):
        return given
    several = given if isinstance(given, list | tuple) else ()
    if not several or not all(_is_continuation(one) for one in several):
        raise ValueError(
            f"got {given!r}, allowed is {FIT_NAME}NAME, or a list of at least 1 item: strings of at"
            " least 1 character, or lists of token ids"
        )
    return tuple(one if isinstance(one, str) else tuple(one) for one in several)


def _is_continuation(given: Any) -> bool:
    if isinstance(given, list | tuple):
        return bool(given) and all(type(one) is int and one >= 0 for one in given)
    return isinstance(given, str) and given != ""


class Continuations(Section):
    """The mean log-probability of each of these continuations after the view, as its vector.

    Every continuation makes a view of every template, with the continuation after it (after Liu et
    al. 2023, arXiv:2310.18348, who sample the continuations of each pair of texts anew). In a job
    `fit:NAME` may stand for them: a `continuations` fit samples them, and its token ids take the
    place of the name. The key may also be written `anchors`, its first name, under which recipes
    are recorded and hashed.
    """

    anchors: Annotated[str | tuple[Continuation, ...], BeforeValidator(_written)] = Field(
        validation_alias=AliasChoices("continuations", "anchors")
    )

    @property
    def fit(self) -> str | None:
        """The name of the fit that is to sample the continuations; None once they are there."""
        return self.anchors.removeprefix(FIT_NAME) if isinstance(self.anchors, str) else None

    def settled(self, ids: Sequence[TokenIds]) -> "Continuations":
        """Return the head with what its fit has sampled."""
        return self.model_copy(update={"anchors": tuple(ids)})


class Decode(Section):
    """Decoding after the prompt: up to `max_tokens`, or until a token contains `until`.

    The likeliest token is taken; at a `temperature` above 0 a token is drawn from the whole
    distribution (no top_k), and another `seed` draws others. The span is the states from which the
    tokens were predicted; a single state, if the first token ends the decoding.
    """

    max_tokens: Positive = 10
    until: NonEmptyStr = '"'
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    seed: int = _SEED

    @model_validator(mode="after")
    def _draws_what_is_read(self) -> "Decode":
        if not self.temperature and self.seed != _SEED:
            raise ValueError(
                f"seed: got {self.seed}, but at temperature: 0 nothing is drawn; set a temperature"
                " above 0, or leave the seed out"
            )
        if self.temperature and self.max_tokens == 1:
            raise ValueError(
                f"temperature: got {self.temperature}, but with max_tokens: 1 the state before the"
                " first token is all that is read; set max_tokens: 2 or more, or leave the"
                " temperature out"
            )
        return self


Reads = Literal["pooled", "logits", "router_logits", "terms"]
EMBEDDING = "embedding"


def _embedding(head: Any) -> tuple[str, ...]:
    return (EMBEDDING,)


def _sparse(head: SparseHead | BagOfWords) -> tuple[str, ...]:
    return ("sparse_indices", "sparse_values")


def _router(head: RouterHead) -> tuple[str, ...]:
    return ("router",) if head.router.join == "column" else (EMBEDDING,)


def _no_continuations(head: Any) -> tuple[Continuation, ...]:
    return ()


def _continuations(head: Continuations) -> tuple[Continuation, ...]:
    return () if isinstance(head.anchors, str) else head.anchors


@dataclass(frozen=True)
class HeadKind:
    """One kind of head, as all other rooms see it.

    Args:
        section: its config value, whose one field has the key of the kind.
        reads: the pooled vector, the logits of the language-model head, those of routers, or the
            terms of a text.
        writes: the columns that a head of this kind decides.
        width: the width after it: `same` as before it, the model's `hidden` size (before it too),
            that of the `module` in the model folder which it names, or a number.
        continuations: what makes further views of every template.
        fit: the name of the fit that is to sample the continuations; None where they are there.
        text_words: whether a head of this kind needs the ids of each text's own words.
        requires: rules of `config/checks.py` that hold where there is such a head.
        also: another spelling of its key.
    """

    section: type[Section]
    reads: Reads = "pooled"
    writes: Callable[[Any], tuple[str, ...]] = _embedding
    width: Literal["same", "hidden", "module"] | int = "same"
    continuations: Callable[[Any], tuple[Continuation, ...]] = _no_continuations
    fit: Callable[[Any], str | None] = lambda head: None
    text_words: Callable[[Any], bool] = lambda head: False
    requires: tuple[str, ...] = ()
    also: str | None = None


HEADS: Mapping[str, HeadKind] = {
    "pooler": HeadKind(Pooler, width="hidden"),
    "dense": HeadKind(Dense, width="module"),
    "layer_norm": HeadKind(LayerNorm, width="module"),
    "normalize": HeadKind(Normalize),
    "sparse_lm": HeadKind(
        SparseHead,
        reads="logits",
        writes=_sparse,
        text_words=lambda head: head.sparse_lm.words == "text",
        requires=("at most one", "last layer", "one line", "one template"),
    ),
    "bag_of_words": HeadKind(
        BagOfWords,
        reads="terms",
        writes=_sparse,
        requires=("at most one", "one line", "no other head"),
    ),
    "router": HeadKind(
        RouterHead,
        reads="router_logits",
        writes=_router,
        requires=("at most one", "last layer", "one line", "no decode"),
    ),
    "continuations": HeadKind(
        Continuations,
        reads="logits",
        width=1,
        continuations=_continuations,
        fit=lambda head: head.fit,
        requires=("last layer", "one line", "no other head", "scored by its tokens", "no eos"),
        also="anchors",
    ),
}
_BY_SECTION = {kind.section: (key, kind) for key, kind in HEADS.items()}
_SPELLINGS = {kind.also: kind.section for kind in HEADS.values() if kind.also}
if TYPE_CHECKING:
    Head = Section
else:
    Head = keyed_union(
        {key: kind.section for key, kind in HEADS.items()}, name="head", also=_SPELLINGS
    )


def kinds_of(heads: Sequence[Section]) -> Iterator[tuple[str, HeadKind, Any]]:
    """Yield the key, the kind and the config value of each head."""
    for head in heads:
        key, kind = _BY_SECTION[type(head)]
        yield key, kind, head


def module_of(head: Section) -> str | None:
    """Return the directory of a head that is a module in the model folder, else None."""
    key, kind, _ = next(kinds_of([head]))
    path: str | None = getattr(head, key) if kind.width == "module" else None
    return path


class WeightedSum(Section):
    """How two rows compare by all that they have: weight times measure, summed over the columns.

    Sparse weights are compared by their dot product, router scores by cosine. With `minmax` every
    measure is first scaled to between 0 and 1 over the candidates of a query (PromptReps).
    """

    embedding: Measure = "cosine"
    weight: float = 1.0
    sparse: float | None = None
    router: float | None = None
    minmax: bool = False


# The column that each weight of a sum reads.
SUMMANDS: Mapping[str, str] = {"sparse": "sparse_values", "router": "router"}
