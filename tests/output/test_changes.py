"""What an older release wrote is refused with the reason, and nothing else is."""

from collections.abc import Mapping
from typing import Any

import pytest

from embedjob.config.job_file import recipe_from
from embedjob.methods.catalogue import read_method
from embedjob.output.changes import CHANGES, ComparedSide, reasons


def setting(method: str, model: str) -> dict[str, Any]:
    """The keys of a method's file for one model."""
    return (read_method(method).for_models or {})[model].encoder


# What the files of the methods held when the outputs were made, by method and role.
BEFORE: Mapping[tuple[str, str], dict[str, Any]] = {
    ("bge_en_icl", "query"): {
        "instruction": "Given a web search query, retrieve relevant passages that answer the query",
        "templates": ["{demonstrations}<instruct>{instruction}\n<query>{text}\n<response>"],
    },
    ("bge_en_icl", "symmetric"): {
        "templates": ["{demonstrations}<instruct>{instruction}\n<query>{text}\n<response>"],
    },
    ("nv_embed", "symmetric"): {"instruction": "Retrieve semantically similar text."},
    ("qwen3_embedding", "symmetric"): {"instruction": "Retrieve semantically similar text."},
}


INST, CHAT_3 = ([[{"literal": one}, {"text": {"pool": True}}]] for one in ("[INST] ", "<|user|>"))
JOCKEY = {"text": "A jockey riding a horse.", "answer": "Equestrian"}
# What was chosen for other models than a job's, by method: a key, its old value and its new one.
CHOSEN: tuple[tuple[str, str, Any, Any], ...] = (
    (
        "token_prepending",
        "interventions",
        [{"prepend": {"slot": "<PST>", "start": 24, "exit": 26, "seed": 0, "embedding": "!"}}],
        read_method("token_prepending").encoder["interventions"],
    ),
    ("contrastive_prompting", "layer", -2, 27),
    (
        "contrastive_prompting",
        "interventions",
        read_method("contrastive_prompting").encoder["interventions"],
        setting("contrastive_prompting", "Llama-3-8B")["interventions"],
    ),
    ("llm2vec", "templates", INST, CHAT_3),
    *(
        ("prompteol_icl", "demonstrations", [JOCKEY], own.encoder["demonstrations"])
        for own in (read_method("prompteol_icl").for_models or {}).values()
    ),
    (
        "moee",
        "heads",
        read_method("moee").encoder["heads"],
        setting("moee", "DeepSeek-MoE-16B")["heads"],
    ),
)
FILES = [
    ComparedSide({}, {"config.json": "c", "tokenizer.json": "t"}),
    ComparedSide({}, {"config.json": "c", "tokenizer.json": "t", "tokenizer_config.json": "b"}),
]
CUT = [ComparedSide({"query": {}}, {}), ComparedSide({"query": {"truncation_side": "left"}}, {})]
BORDERS = [
    ComparedSide({"document": {"long_text": "split", "split": {"max_tokens": 400, **more}}}, {})
    for more in ({}, {"borders": "landmarks"})
]


def now(method: str, role: str) -> ComparedSide:
    """What a job in this role has from the method's file."""
    found = read_method(method)
    keys = {**found.encoder, **(found.roles or {}).get(role, {}), "method": method}  # type: ignore[call-overload]
    return ComparedSide({role: keys}, {})


@pytest.mark.parametrize(("method", "role"), BEFORE)
def test_an_output_of_an_earlier_release_is_recognised(method: str, role: str) -> None:
    job = now(method, role)
    output = ComparedSide({role: {**job.recipes[role], **BEFORE[method, role]}}, {})
    found = reasons(output, job)
    assert [reason for reason in found if method not in reason] == []
    assert found
    assert reasons(job, job) == reasons(output, output) == []


@pytest.mark.parametrize("method", ["bge_en_icl", "nv_embed", "qwen3_embedding"])
def test_documents_are_as_they_were(method: str) -> None:
    job = now(method, "document")
    assert reasons(job, job) == []


@pytest.mark.parametrize("method", ["nv_embed", "e5_mistral"])
def test_what_a_user_changed_is_no_change_of_ours(method: str) -> None:
    job = now(method, "symmetric").recipes["symmetric"]
    output = {**job, "instruction": "Retrieve semantically similar text."}
    mine = {**job, "instruction": "Find"}
    assert (
        reasons(ComparedSide({"symmetric": output}, {}), ComparedSide({"symmetric": mine}, {}))
        == []
    )


def test_every_change_is_in_the_table_of_this_test() -> None:
    seen = set()
    for (method, role), before in BEFORE.items():
        job = now(method, role)
        seen |= {*reasons(ComparedSide({role: {**job.recipes[role], **before}}, {}), job)}
    chosen = [
        [ComparedSide({"query": {"method": method, key: value}}, {}) for value in values]
        for method, key, *values in CHOSEN
    ]
    for before_and_after in (prepended(False, True), FILES, CUT, BORDERS, *chosen):
        seen |= {*reasons(*before_and_after)}
    assert seen == {change.reason for change in CHANGES}


def prepended(*normalized: bool) -> list[ComparedSide]:
    """Sides whose slot the normalizer sees, or not."""
    sections = [{"slot": "<PST>", **({"normalized": True} if one else {})} for one in normalized]
    return [
        ComparedSide({"document": {"interventions": [{"prepend": one}]}}, {}) for one in sections
    ]


@pytest.mark.parametrize(("method", "key", "before", "after"), CHOSEN)
def test_what_was_chosen_for_another_model_is_recognised(
    method: str, key: str, before: Any, after: Any
) -> None:
    sides = [
        ComparedSide({"query": {"method": method, key: value}}, {}) for value in (before, after)
    ]
    assert len(reasons(*sides)) == 1
    assert method in reasons(*sides)[0]
    assert reasons(*sides[::-1]) == []


@pytest.mark.parametrize(
    ("method", "model"),
    [
        (method, model)
        for method in ("contrastive_prompting", "llm2vec", "moee", "prompteol_icl")
        for model in read_method(method).for_models or {}
    ],
)
def test_what_a_claim_recorded_is_recognised(method: str, model: str) -> None:
    """With every default, as a run writes a recipe down."""

    def recorded(**keys: Any) -> ComparedSide:
        encoder = {**read_method(method).encoder, **keys}
        recipe = recipe_from({"model": "-", "method": method, **encoder}, {})
        return ComparedSide({"document": recipe.model_dump(mode="json")}, {})

    output, job = recorded(), recorded(**setting(method, model))
    assert [method in reason for reason in reasons(output, job)] == [True]
    assert reasons(output, recorded(max_tokens=99)) == []


@pytest.mark.parametrize("sides", [FILES, CUT, BORDERS])
def test_what_the_job_does_not_say_is_recognised(sides: list[ComparedSide]) -> None:
    before, after = sides
    assert len(reasons(before, after)) == 1
    assert reasons(before, before) == reasons(after, after) == reasons(after, before) == []


def test_a_slot_that_the_normalizer_sees_is_recognised() -> None:
    before, after = prepended(False, True)
    assert "slot" in "".join(reasons(before, after))
    assert reasons(before, before) == reasons(after, after) == reasons(after, before) == []
