"""Changes of vectors between releases: why an output that was made before is no longer one's own.

A fingerprint says that vectors differ, and not why. Where a release changes a method, or the way in
which a model folder is read, an entry of `CHANGES` recognises the outputs made before, and its
reason is part of their refusal. CHANGELOG.md says the same for people who have not met it yet.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Side:
    """An output's claim or a job: its recipes as JSON, by role, and the digests of its model."""

    recipes: Mapping[str, Mapping[str, Any]]
    digests: Mapping[str, str]


@dataclass(frozen=True)
class Change:
    """One change: whether it is between an output and a job, and the reason for people."""

    between: Callable[[Side, Side], bool]
    reason: str


def reasons(then: Side, now: Side) -> list[str]:
    """Return the reasons of all changes between an output and a job, in the order of the table."""
    return [change.reason for change in CHANGES if change.between(then, now)]


def of_method(method: str, key: str, before: Any, after: Any) -> Callable[[Side, Side], bool]:
    """Return what tells whether a method's file gave `before` for a key, and gives `after` now."""

    def between(then: Side, now: Side) -> bool:
        pairs = [(then.recipes.get(role, {}), recipe) for role, recipe in now.recipes.items()]
        return any(
            old.get("method") == new.get("method") == method
            and old.get(key) == before
            and new.get(key) == after
            for old, new in pairs
        )

    return between


def slot_is_normalized(then: Side, now: Side) -> bool:
    """Return whether a slot that was a special token is one that the normalizer sees."""
    pairs = [(then.recipes.get(role, {}), recipe) for role, recipe in now.recipes.items()]
    return any(_normalized(new) and not _normalized(old) for old, new in pairs if _slots(old))


def files_beside_count(then: Side, now: Side) -> bool:
    """Return whether only the job's ids depend on the files beside tokenizer.json."""
    names = {name.rpartition("/")[2] for name in {*now.digests} - {*then.digests}}
    whole = any(name.rpartition("/")[2] == "tokenizer.json" for name in then.digests)
    beside = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    return whole and bool(names & beside)


def cut_on_the_left(then: Side, now: Side) -> bool:
    """Return whether a job cuts texts on the left, by a key that was not there before."""
    pairs = [(then.recipes.get(role, {}), recipe) for role, recipe in now.recipes.items()]
    return any(
        new.get("truncation_side") == "left" and "truncation_side" not in old for old, new in pairs
    )


def _slots(recipe: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    settings = [one for section in recipe.get("interventions", ()) for one in section.values()]
    return [one for one in settings if one.get("slot")]


def _normalized(recipe: Mapping[str, Any]) -> bool:
    return any(one.get("normalized") for one in _slots(recipe))


CHANGES: tuple[Change, ...] = (
    Change(
        of_method(
            "bge_en_icl",
            "templates",
            ["{demonstrations}<instruct>{instruction}\n<query>{text}\n<response>"],
            ["{demonstrations}<instruct> {instruction}\n<query> {text}\n<response>"],
        ),
        "bge_en_icl's queries and symmetric texts have a blank after <instruct> and after <query>,"
        " as those that the model was trained with; documents are the same as before",
    ),
    Change(
        of_method(
            "bge_en_icl",
            "instruction",
            "Given a web search query, retrieve relevant passages that answer the query",
            "Given a web search query, retrieve relevant passages that answer the query.",
        ),
        "bge_en_icl's instruction for queries ends in a full stop, as its authors'",
    ),
    *(
        Change(
            of_method(
                method,
                "instruction",
                "Retrieve semantically similar text.",
                "Retrieve semantically similar text",
            ),
            f"{method}'s instruction for `role: symmetric` no longer ends in a full stop, as its"
            " authors' does not; queries and documents are the same as before",
        )
        for method in ("nv_embed", "qwen3_embedding")
    ),
    Change(
        slot_is_normalized,
        "token_prepending adds its slot to this model's tokenizer as its authors do, an ordinary"
        " token that the normalizer sees, which leaves out two blanks beside it; under tokenizers"
        " that put no blank before each piece of text, vectors are the same as before",
    ),
    Change(
        files_beside_count,
        "the model folder's tokenizer_config.json, special_tokens_map.json or added_tokens.json say"
        " other than its tokenizer.json, and texts are tokenized as transformers does it with all"
        " of these; before, tokenizer.json was read alone",
    ),
    Change(
        cut_on_the_left,
        "the model folder says truncation_side: left, so that a long text loses its beginning and"
        " no longer its end; encoder.truncation_side: right keeps what was",
    ),
)
