"""Checks across keys: the table of rules that a recipe must keep, in the order of evaluation.

A rule names when it can be decided: a job may leave a key to its method, the model's folder may
set others, and the model itself is known last.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from embedjob.config.heads import HEADS, SUMMANDS, WeightedSum, kinds_of
from embedjob.config.interventions import INTERVENTIONS, given
from embedjob.config.model_rules import (
    Breach,
    ModelSizes,
    first_other,
    lacking_block,
    lacking_layer,
    lacks_terms,
    too_long,
    unread_by_table,
)
from embedjob.config.pooling import DIVISIBLE_SPANS, POOLINGS, FitStep
from embedjob.config.segments import WeightedTemplate, holds_one_text
from embedjob.config.tables import OF_ONE_TEXT, WHOLE
from embedjob.config.types import AnyRecipe
from embedjob.errors import ConfigError, ModelError

# `with folder`: all keys are there, those of the model's folder too. `in a job`: a key that is set
# and changes nothing is refused in a job, though a recipe of the library may carry it.
When = Literal["as written", "with method", "with folder", "in a job", "with model"]
_ERRORS: Mapping[When, type[Exception]] = {"in a job": ConfigError, "with model": ModelError}


@dataclass(frozen=True)
class Rule:
    """A rule across keys.

    Args:
        when: the earliest time at which it can be decided.
        broken: what breaks it, by the names that the message uses; nothing where it is kept.
        message: what was got, what is allowed, what to do; a format string over `broken`, the
            `recipe` and the `model` sizes.
    """

    when: When
    broken: Callable[[AnyRecipe, Any], Breach]
    message: str


def check_rules(recipe: AnyRecipe, *when: When, model: ModelSizes | None = None) -> None:
    """Raise at the first broken rule of these times.

    Raises:
        ValueError: the recipe's own keys do not go together.
        ConfigError: a job sets a key that nothing reads.
        ModelError: the model cannot do what the recipe asks.
    """
    for rule in RULES:
        broken = rule.broken(recipe, model) if rule.when in when else False
        if broken:
            values = broken if isinstance(broken, Mapping) else {}
            message = rule.message.format(recipe=recipe, model=model, **values)
            raise _ERRORS.get(rule.when, ValueError)(message)


# A likelihood per view leaves these keys nothing to decide.
_SCORED: Mapping[str, Any] = {
    "attention": "causal",
    "span": "all",
    "pooling": "mean",
    "aggregation": "concat",
    "interventions": (),
    "decode": None,
}


# Rules that kinds of heads, and decoding, require by name; `what` is the key that requires one.
REQUIREMENTS: Mapping[str, tuple[Callable[[AnyRecipe], Breach], str]] = {
    "last layer": (
        lambda recipe: recipe.layer not in (-1, (-1,)),
        "{what} reads the last layer; got layer: {recipe.layer}, allowed is -1",
    ),
    "one line": (
        lambda recipe: recipe.long_text not in OF_ONE_TEXT or recipe.aggregation == "keep",
        "{what} gives one line per text; got long_text: {recipe.long_text} and aggregation:"
        " {recipe.aggregation}, allowed is long_text: truncate, split or bad, and not aggregation:"
        " keep",
    ),
    "one template": (
        lambda recipe: {"number": len(recipe.templates)} if len(recipe.templates) > 1 else False,
        "{what} goes with one template; got {number}",
    ),
    "no decode": (
        lambda recipe: recipe.decode is not None,
        "{what} reads the prompt and cannot be combined with decode; leave one of the two out",
    ),
    "no other head": (
        lambda recipe: len(recipe.heads) > 1,
        "{what} is the whole vector; leave the other heads out",
    ),
    "scored by its tokens": (
        lambda recipe: first_other(recipe, _SCORED),
        "{what} are scored one by one, by their own tokens; got {key}: {got}, allowed is {allowed}",
    ),
    "no eos": (
        lambda recipe: recipe.special_tokens.eos != "none",
        "{what} end their views; set special_tokens.eos: none",
    ),
    "causal attention": (
        lambda recipe: recipe.attention != "causal",
        "{what} needs attention: causal; a model whose tokens attend to later tokens predicts no"
        " next token",
    ),
    "last token": (
        lambda recipe: recipe.span != "last_token",
        "{what} goes on from the last token; got span: {recipe.span}, allowed is last_token",
    ),
}
_DECODE_REQUIRES = ("last layer", "one line", "causal attention", "last token", "one template")


def _required(
    what: str, is_asked: Callable[[AnyRecipe], int], requirements: Sequence[str]
) -> Iterator[Rule]:
    """Yield the rules that hold where a key is asked for."""
    for name in requirements:
        test, message = REQUIREMENTS[name]

        def broken(recipe: AnyRecipe, _: Any, test: Callable[..., Breach] = test) -> Breach:
            found = is_asked(recipe) and test(recipe)
            return (
                {"what": what, **(found if isinstance(found, Mapping) else {})} if found else False
            )

        yield Rule("with method", broken, message)


def _of_heads() -> Iterator[Rule]:
    """Yield the rules that the kinds of heads require."""
    for key, kind in HEADS.items():
        count = partial(_count, section=kind.section)
        if "at most one" in kind.requires:
            yield Rule("with method", partial(_repeated, key=key, count=count), _REPEATED)
        others = [name for name in kind.requires if name != "at most one"]
        yield from _required(f"heads: {key}", count, others)


_REPEATED = "heads: got {key} {number} times; allowed is once"


def _count(recipe: AnyRecipe, *, section: type) -> int:
    return sum(isinstance(head, section) for head in recipe.heads)


def _repeated(recipe: AnyRecipe, _: Any, *, key: str, count: Callable[[AnyRecipe], int]) -> Breach:
    return {"key": key, "number": count(recipe)} if count(recipe) > 1 else False


def _misnamed(recipe: AnyRecipe) -> Breach:
    """Return the keys of the first finishing step that has none, or several."""
    steps = (step for step in recipe.finish if isinstance(step, FitStep))
    wrong = (step.given for step in steps if len(step.given) != 1)
    return next(({"keys": " and ".join(keys) or "none"} for keys in wrong), False)


def _named_summands(recipe: AnyRecipe) -> list[str] | None:
    """Return the columns besides the embedding that a weighted sum weighs; None without a sum."""
    if not isinstance(recipe.similarity, WeightedSum):
        return None
    return [name for name in SUMMANDS if getattr(recipe.similarity, name) is not None]


def _lacking_summand(recipe: AnyRecipe) -> Breach:
    written = {column for _, kind, head in kinds_of(recipe.heads) for column in kind.writes(head)}
    named = _named_summands(recipe) or ()
    return next(({"name": name} for name in named if SUMMANDS[name] not in written), False)


def _indivisible(recipe: AnyRecipe) -> Breach:
    """Return the first key by which the parts of a long text cannot be pooled."""
    divisible = {
        "span": DIVISIBLE_SPANS,
        "pooling": [key for key, kind in POOLINGS.items() if kind.single and kind.divisible],
        "prepare": ("none", "strip"),
    }
    if recipe.long_text != "late_chunk":
        return False
    return next(
        (
            {"key": key, "got": getattr(recipe, key), "allowed": ", ".join(allowed)}
            for key, allowed in divisible.items()
            if getattr(recipe, key) not in allowed
        ),
        False,
    )


def _ungenerated(recipe: AnyRecipe) -> Breach:
    """Return the first key by which a text cannot be averaged with what a generator makes of it."""
    if recipe.generate is None:
        return False
    others = [key for key, kind, _ in kinds_of(recipe.heads) if kind.reads != "pooled"]
    barred: Mapping[str, tuple[bool, str]] = {
        "long_text": (recipe.long_text not in WHOLE, "truncate or bad"),
        "aggregation": (recipe.aggregation == "keep", "any other"),
        "vector_dtype": (recipe.vector_dtype in ("int8", "uint8"), "float32, float16 or binary"),
    }
    wrong = [
        {"key": key, "got": getattr(recipe, key), "allowed": allowed}
        for key, (broken, allowed) in barred.items()
        if broken
    ]
    wrong += [{"key": "heads", "got": one, "allowed": "heads of the vector"} for one in others]
    return wrong[0] if wrong else False


def _idle_split(recipe: AnyRecipe) -> Breach:
    """Return the first key of `split` by which no passage could be cut."""
    split = recipe.split
    if 2 * split.overlap > split.max_tokens:
        half = f"at most half of max_tokens: {split.max_tokens // 2}"
        return {"key": "overlap", "got": split.overlap, "allowed": half}
    twice = [name for name in split.carry if split.carry.count(name) > 1]
    return {"key": "carry", "got": f"{twice[0]} twice", "allowed": "once"} if twice else False


def _unread_weight(recipe: AnyRecipe) -> Breach:
    if recipe.aggregation == "weighted":
        return False
    weights = [one.weight for one in recipe.templates if isinstance(one, WeightedTemplate)]
    return next(({"weight": weight} for weight in weights if weight != 1), False)


RULES: tuple[Rule, ...] = (
    Rule(
        "as written",
        lambda recipe, _: _misnamed(recipe),
        "finish: a step has exactly one key; got {keys}, allowed is {{normalize: true}},"
        " {{truncate: DIMENSIONS}} or {{KIND: NAME}} of a fit",
    ),
    Rule(
        "with folder",
        lambda recipe, _: _named_summands(recipe) == [],
        "similarity: a sum needs a weight for sparse or router; for the embedding alone name its"
        " measure: {recipe.measure}",
    ),
    Rule(
        "with folder",
        lambda recipe, _: _lacking_summand(recipe),
        "similarity: got a weight for {name}, but no head writes that column; add the head, or set"
        " similarity: {recipe.measure}",
    ),
    *_of_heads(),
    *_required("decode", lambda recipe: recipe.decode is not None, _DECODE_REQUIRES),
    Rule(
        "with method",
        lambda recipe, _: len({*map(type, recipe.interventions)}) < len(recipe.interventions),
        "interventions: got a kind twice; allowed is at most one of each kind"
        f" ({', '.join(INTERVENTIONS)})",
    ),
    Rule(
        "with method",
        lambda recipe, _: (
            recipe.attention != "causal"
            and any(one.kind.needs_causal for one in given(recipe.interventions))
        ),
        "interventions need attention: causal; under bidirectional attention every token attends"
        " to the last one already",
    ),
    Rule(
        "with method",
        lambda recipe, _: (
            recipe.interventions
            and (recipe.long_text not in OF_ONE_TEXT or recipe.decode is not None)
            and {"got": recipe.long_text + ("" if recipe.decode is None else ", with decode")}
        ),
        "interventions: got long_text: {got}; allowed is long_text: truncate, split or bad, without"
        " decode",
    ),
    Rule(
        "with method",
        lambda recipe, _: recipe.word_cut is not None and recipe.long_text not in WHOLE,
        "word_cut drops what long_text: {recipe.long_text} would embed in parts; leave one of the"
        " two out",
    ),
    Rule(
        "with method",
        lambda recipe, _: _indivisible(recipe),
        "{key}: got {got}, and with long_text: late_chunk every part of the text is pooled: allowed"
        " is {allowed}",
    ),
    Rule(
        "with method",
        lambda recipe, _: (
            recipe.long_text == "late_chunk"
            and (len(recipe.templates) > 1 or not holds_one_text(recipe.templates[0]))
        ),
        "templates: with long_text: late_chunk allowed is one template, its segments joined as one"
        " string, with one text in it",
    ),
    Rule(
        "with method",
        lambda recipe, _: recipe.long_text == "split" and recipe.aggregation == "keep",
        "aggregation: got keep, but with long_text: split the lines of a row are its passages;"
        " allowed is any other",
    ),
    Rule(
        "with method",
        lambda recipe, _: _idle_split(recipe),
        "split: {key}: got {got}, allowed is {allowed}",
    ),
    Rule(
        "with folder",
        lambda recipe, _: (
            recipe.long_text == "split" and recipe.split.max_tokens > recipe.max_tokens
        ),
        "split: max_tokens: got {recipe.split.max_tokens}, but encoder.max_tokens is"
        " {recipe.max_tokens}; allowed is at most as many",
    ),
    Rule(
        "in a job",
        lambda recipe, _: recipe.long_text != "split" and recipe.split != type(recipe.split)(),
        "encoder.split: only long_text: split reads it, got long_text: {recipe.long_text}; set"
        " long_text: split, or leave split out",
    ),
    Rule(
        "with method",
        lambda recipe, _: _ungenerated(recipe),
        "generate: got encoder.{key}: {got}, and a text is embedded together with what is made of"
        " it: allowed is {allowed}; change one, or leave generate out",
    ),
    Rule(
        "in a job",
        lambda recipe, _: _unread_weight(recipe),
        "encoder.aggregation: got {recipe.aggregation}, but a template has weight: {weight}, which"
        " only weighted reads; set aggregation: weighted, or leave the weight out",
    ),
    Rule(
        "with model",
        unread_by_table,
        "encoder.{key}: got {got}, but {recipe.model} is {model.kind}; allowed is {allowed}. Leave"
        " the key out",
    ),
    Rule(
        "with model",
        lacks_terms,
        "encoder.heads: got {got}bag_of_words with encoder.model: {recipe.model}; the head and a"
        " vocabulary need each other: set {{model: fit:NAME, heads: [{{bag_of_words: {{}}}}]}}",
    ),
    Rule(
        "with model",
        lambda recipe, model: recipe.attention == "causal" and not model.causal,
        "encoder.attention: got causal, but {recipe.model} is an encoder, whose tokens see each"
        " other; allowed is bidirectional. Methods that ask a language model for its next"
        " token need a decoder as encoder.model",
    ),
    Rule(
        "with model",
        lacking_layer,
        "encoder.layer: got {got}, allowed is {lowest} to {model.layers} (0 is the embeddings,"
        " {model.layers} or -1 the last of {recipe.model})",
    ),
    Rule(
        "with model",
        lacking_block,
        "encoder.interventions: {key}: got {got}, allowed is at most {most}: {recipe.model} has"
        " {model.layers} blocks, and the lowest layer that is read is {lowest}",
    ),
    Rule(
        "with model",
        too_long,
        "encoder.max_tokens: got {recipe.max_tokens}, but {recipe.model} has"
        " {model.max_positions} positions{why}; set encoder.max_tokens: {most}",
    ),
)
