"""Changes of vectors between releases: why an output that was made before is no longer one's own.

A fingerprint says that vectors differ, and not why. Where a release changes a method, or the way in
which a model folder is read, an entry of `CHANGES` recognises the outputs made before, and its
reason is part of their refusal. CHANGELOG.md says the same for people who have not met it yet.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from embedjob.output.fingerprint import canonical


@dataclass(frozen=True)
class ComparedSide:
    """An output's claim or a job: its recipes as JSON, by role, and the digests of its model."""

    recipes: Mapping[str, Mapping[str, Any]]
    digests: Mapping[str, str]


@dataclass(frozen=True)
class Change:
    """One change: whether it is between an output and a job, and the reason for people."""

    between: Callable[[ComparedSide, ComparedSide], bool]
    reason: str


def reasons(then: ComparedSide, now: ComparedSide) -> list[str]:
    """Return the reasons of all changes between an output and a job, in the order of the table."""
    return [change.reason for change in CHANGES if change.between(then, now)]


def of_method(
    method: str, key: str, before: Any, after: Any
) -> Callable[[ComparedSide, ComparedSide], bool]:
    """Return what tells whether a method's file gave `before` for a key, and gives `after` now."""

    def between(then: ComparedSide, now: ComparedSide) -> bool:
        pairs = _pairs(then, now, method)
        values = [(_written(old.get(key)), _written(new.get(key))) for old, new in pairs]
        return (_written(before), _written(after)) in values

    return between


def _written(value: Any) -> Any:
    """Return a value as a file has it: a recorded recipe has the keys that were left out, too."""
    if isinstance(value, Mapping):
        return {key: _written(one) for key, one in value.items() if one not in (None, False, "")}
    return [_written(one) for one in value] if isinstance(value, list | tuple) else value


def _pairs(
    then: ComparedSide, now: ComparedSide, method: str
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return the recipes of both sides by role, where both follow the method."""
    pairs = [(then.recipes.get(role, {}), recipe) for role, recipe in now.recipes.items()]
    return [(old, new) for old, new in pairs if old.get("method") == new.get("method") == method]


def had_blocks_of_smollm2(then: ComparedSide, now: ComparedSide) -> bool:
    """Return whether only the output has what was chosen for SmolLM2-135M."""
    own = {"start": 24, "exit": 26, "embedding": "!"}
    return any(
        any(own.items() <= slot.items() for slot in _slots(old))
        and not any(own.items() <= slot.items() for slot in _slots(new))
        for old, new in _pairs(then, now, "token_prepending")
    )


def left_the_chat_format_of_llama_2(then: ComparedSide, now: ComparedSide) -> bool:
    """Return whether only the output's LLM2Vec templates are those of Mistral and Llama-2-chat."""
    return any(
        "[INST] " in canonical(old.get("templates"))
        and "[INST] " not in canonical(new.get("templates"))
        for old, new in _pairs(then, now, "llm2vec")
    )


def slot_is_normalized(then: ComparedSide, now: ComparedSide) -> bool:
    """Return whether a slot that was a special token is one that the normalizer sees."""
    pairs = [(then.recipes.get(role, {}), recipe) for role, recipe in now.recipes.items()]
    return any(_normalized(new) and not _normalized(old) for old, new in pairs if _slots(old))


def files_beside_count(then: ComparedSide, now: ComparedSide) -> bool:
    """Return whether only the job's ids depend on the files beside tokenizer.json."""
    names = {name.rpartition("/")[2] for name in {*now.digests} - {*then.digests}}
    whole = any(name.rpartition("/")[2] == "tokenizer.json" for name in then.digests)
    beside = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    return whole and bool(names & beside)


def cut_on_the_left(then: ComparedSide, now: ComparedSide) -> bool:
    """Return whether a job cuts texts on the left, by a key that was not there before."""
    pairs = [(then.recipes.get(role, {}), recipe) for role, recipe in now.recipes.items()]
    return any(
        new.get("truncation_side") == "left" and "truncation_side" not in old for old, new in pairs
    )


def had_other_borders(then: ComparedSide, now: ComparedSide) -> bool:
    """Return whether an output splits texts by the rule of borders that was before landmarks."""
    pairs = [(then.recipes.get(role, {}), recipe) for role, recipe in now.recipes.items()]
    return any(
        old.get("long_text") == new.get("long_text") == "split"
        and "borders" in new.get("split", {})
        and "borders" not in old.get("split", {})
        for old, new in pairs
    )


def _slots(recipe: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    settings = [one for section in recipe.get("interventions", ()) for one in section.values()]
    return [one for one in settings if one.get("slot")]


def _normalized(recipe: Mapping[str, Any]) -> bool:
    return any(one.get("normalized") for one in _slots(recipe))


_ICL = {
    "A man is smoking.": "Smoking",
    "A man is playing on a guitar and singing.": "Music",
    "relating to switzerland or its people.": "Swiss",
    "The man is riding a horse.": "Horseback-riding",
    "meat from a deer.": "Venison",
    "The man is riding a motorcycle down the road.": "Motorcycling",
    "of or relating to tutors or tutoring.": "Tutorial",
}
_IRRELEVANT = {
    "template": 'The irrelevant information of this sentence : "{text}" means in one word:"',
    "mode": "scaled",
}
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
        had_blocks_of_smollm2,
        "token_prepending has its authors' blocks, layer and drawn embedding; blocks 24 and 25 and"
        " the exclamation mark were chosen for SmolLM2-135M, and belong to it alone",
    ),
    Change(
        of_method("contrastive_prompting", "layer", -2, 27),
        "contrastive_prompting reads layer 27 of Llama-2-7B, as its authors' script",
    ),
    Change(
        of_method(
            "contrastive_prompting",
            "interventions",
            [{"contrast": {**_IRRELEVANT, "layer": 4, "alpha": 0.5}}],
            [{"contrast": {**_IRRELEVANT, "layer": 6, "alpha": 0.25}}],
        ),
        "contrastive_prompting has its authors' block and strength for Llama-3-8B",
    ),
    Change(
        left_the_chat_format_of_llama_2,
        "llm2vec has the chat format of Llama-3-8B-Instruct for that model, and none for"
        " Sheared-LLaMA-1.3B, as its authors'",
    ),
    *(
        Change(
            of_method(
                "prompteol_icl",
                "demonstrations",
                [{"text": "A jockey riding a horse.", "answer": "Equestrian"}],
                [{"text": text, "answer": answer}],
            ),
            f"prompteol_icl shows this size of OPT its authors' own example, {text!r}",
        )
        for text, answer in _ICL.items()
    ),
    Change(
        of_method(
            "moee",
            "heads",
            [{"router": {"scores": "logits", "join": "column"}}],
            [{"router": {"scores": "softmax", "join": "column"}}],
        ),
        "moee takes a softmax of DeepSeek's router scores, as its authors' code",
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
    Change(
        had_other_borders,
        "long_text: split ends passages at other sentences, so that an edit changes no more than"
        " three stretches of a text",
    ),
)
