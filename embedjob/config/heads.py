"""What a recipe may ask for beside its vector, or in its place.

Sparse weights, router scores, words said first; the likelihood of anchors.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from embedjob.config.segments import Section

Measure = Literal["cosine", "dot", "euclidean", "manhattan"]
Positive = Annotated[int, Field(ge=1)]


class SparseLm(Section):
    """Weights over the vocabulary: the language-model head's logits over the span, log(1 + relu).

    `words: text` keeps the ids of the text's own words (PromptReps), the ten heaviest of all where
    it has none. `log1p_relu` takes the logarithm twice. With `scale` a weight is rint(scale * it).
    """

    words: Literal["all", "text"] = "all"
    pooling: Literal["max", "sum"] = "max"
    activation: Literal["relu", "log1p_relu"] = "relu"
    top_k: Positive | None = None
    scale: Annotated[float, Field(gt=0)] | None = None


class SparseHead(Section):
    """The columns `sparse_indices` and `sparse_values`."""

    sparse_lm: SparseLm


class RouterScores(Section):
    """What the routers of a mixture of experts give each expert, all layers one after the other.

    They are averaged over the span and over views; with `join: concat` they end the vector itself.
    """

    scores: Literal["logits", "softmax"] = "logits"
    join: Literal["column", "concat"] = "column"


class RouterHead(Section):
    """The column `router`, or the last dimensions of the embedding."""

    router: RouterScores


class Decode(Section):
    """Greedy words after the prompt: up to `max_tokens`, or until a token that contains `until`.

    The span is the states from which they were said; one alone, if the first token ends it.
    """

    max_tokens: Positive = 10
    until: Annotated[str, Field(min_length=1)] = '"'


class Anchors(Section):
    """Of each of these continuations the mean log-probability after the view, as its vector.

    Every anchor makes a view of every template, with the anchor after it (after Liu et al. 2023,
    arXiv:2310.18348, who sample the continuations of each pair of texts anew).
    """

    anchors: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]


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


def anchors_in(heads: Iterable[Any]) -> tuple[str, ...]:
    """The anchors among a recipe's heads; none where it has no such head."""
    return next((head.anchors for head in heads if isinstance(head, Anchors)), ())


def sparse_in(heads: Iterable[Any]) -> SparseLm | None:
    """The sparse head among a recipe's heads."""
    return next((head.sparse_lm for head in heads if isinstance(head, SparseHead)), None)


def router_in(heads: Iterable[Any]) -> RouterScores | None:
    """The router head among a recipe's heads."""
    return next((head.router for head in heads if isinstance(head, RouterHead)), None)


def check_heads(recipe: Any) -> None:
    """ValueError where what is asked for beside the vector does not go with the rest."""
    for kind, name in ((SparseHead, "sparse_lm"), (RouterHead, "router")):
        asked = sum(isinstance(head, kind) for head in recipe.heads)
        if asked > 1:
            raise ValueError(f"heads: got {asked} times {name}; allowed is one")
        if asked:
            _require_whole(recipe, f"heads: {name}")
    if recipe.decode is not None:
        _require_whole(recipe, "decode")
        _require_decodes(recipe)
        if router_in(recipe.heads):
            raise ValueError("heads: router is of the prompt; leave decode out")
    if anchors_in(recipe.heads):
        _require_whole(recipe, "heads: anchors")
        _require_anchored(recipe)
    if (sparse_in(recipe.heads) or recipe.decode) and len(recipe.templates) > 1:
        what = "decode" if recipe.decode else "heads: sparse_lm"
        raise ValueError(f"{what} goes with one template; got {len(recipe.templates)}")


def _require_whole(recipe: Any, what: str) -> None:
    if recipe.layer not in (-1, (-1,)):
        raise ValueError(f"{what} reads the last layer; got layer: {recipe.layer}, allowed is -1")
    if recipe.long_text not in ("truncate", "bad") or recipe.aggregation == "keep":
        raise ValueError(f"{what} gives one line per text; allowed is long_text: truncate or bad")


def check_summands(recipe: Any) -> None:
    """ValueError where a weighted sum names a column that no head of the recipe writes."""
    if not isinstance(recipe.similarity, WeightedSum):
        return
    router = router_in(recipe.heads)
    there = {
        "sparse": sparse_in(recipe.heads) is not None,
        "router": router is not None and router.join == "column",
    }
    named = [name for name in there if getattr(recipe.similarity, name) is not None]
    if not named:
        raise ValueError(
            "similarity: a sum needs a weight for sparse or router; for the embedding alone name"
            f" its measure: {recipe.similarity.embedding}"
        )
    if lacking := [name for name in named if not there[name]]:
        raise ValueError(
            f"similarity: got a weight for {lacking[0]}, but no head writes that column; add the"
            f" head, or set similarity: {recipe.similarity.embedding}"
        )


# What anchors are read with: a number per view says nothing else.
_ANCHORED: Mapping[str, Any] = {
    "attention": "causal",
    "span": "all",
    "pooling": "mean",
    "aggregation": "concat",
    "interventions": (),
    "decode": None,
}


def _require_anchored(recipe: Any) -> None:
    if len(recipe.heads) > 1:
        raise ValueError("heads: anchors stand alone; leave the other heads out")
    for key, allowed in _ANCHORED.items():
        if getattr(recipe, key) != allowed:
            raise ValueError(
                f"heads: anchors are scored one by one, by their own tokens; got {key}:"
                f" {getattr(recipe, key)}, allowed is {allowed or 'none'}"
            )
    if recipe.special_tokens.eos != "none":
        raise ValueError("heads: anchors end their views; set special_tokens.eos: none")


def _require_decodes(recipe: Any) -> None:
    if recipe.attention != "causal":
        raise ValueError(
            "decode needs attention: causal; a model whose tokens see later ones says no next word"
        )
    if recipe.span != "last_token":
        raise ValueError(f"decode goes on from the last token; got span: {recipe.span}")
