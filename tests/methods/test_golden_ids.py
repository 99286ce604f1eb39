"""Ids that are written out: of a few methods in golden_ids.yaml, of all authors beside it.

What the references cannot see is held here: a change in the tiny tokenizers, or one that moves the
library and the references alike. golden_authors.json has what the authors' own tokenization gives
for ten texts, by method, role and family of tokenizers; `authors.py` made it.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from embedjob.methods.catalogue import names, read_method
from tests.fakes import EOS, tiny_tokenizer
from tests.methods import authors
from tests.methods.making import Setting
from tests.methods.settings import MERGED, TABLES, S

TEXT = 'A "café" by the river'
FAMILIES = ("llama", "mistral", "llama3", "qwen", "gpt2", "opt", "bert")
SPECIALS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TOKENS = {"llara": S, "promptreps": SPECIALS}
GOLDEN = yaml.safe_load(Path(__file__).with_name("golden_ids.yaml").read_text(encoding="utf-8"))


def setting(method: str, family: str) -> Setting:
    if method != "e5_mistral":
        return Setting(method, "document", "-", family, TOKENS.get(method, ()))
    eos = tiny_tokenizer(family).token_to_id(EOS[family])
    knobs = {"instruction": "Find", "special_tokens": {"eos_id": eos}}
    return Setting(method, "query", "-", family, knobs=knobs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["prompteol", "e5_mistral", "llara", "promptreps"])
def test_the_ids_are_what_they_were(method: str, family: str) -> None:
    ids = setting(method, family).views().views([TEXT]).full_ids(0)
    assert ids.tolist() == [int(token) for token in GOLDEN[method][family].split()]


PINNED = authors.golden()
ON = [(case, family) for case in authors.CASES for family in case.families]
ON_NAMES = [authors.name_of(case, family) for case, family in ON]
# What a job says to run a method on a tiny model of the family.
KNOBS: dict[str, dict[str, Any]] = {
    "llm2vec": MERGED,
    "repllama": MERGED,
    "trajectories": {"heads": [{"anchors": [[*authors.TRAJECTORY]]}]},
    "qwen3_embedding": {
        "special_tokens": {"eos_id": tiny_tokenizer("qwen").token_to_id("<|endoftext|>")}
    },
    # With a drawn embedding the slot has its own id.
    "token_prepending": {"interventions": [{"prepend": {"slot": "<PST>", "start": 1, "exit": 3}}]},
}


@pytest.mark.parametrize(("case", "family"), ON, ids=ON_NAMES)
def test_the_ids_and_the_pooled_places_are_the_authors(case: authors.Case, family: str) -> None:
    knobs = {"max_tokens": 2000, **KNOBS.get(case.method, {})}
    made = Setting(case.method, case.role, "-", family, case.tokens, case.ends, knobs)  # type: ignore[arg-type]
    views = made.views().views(list(authors.TEXTS))
    found = [
        authors.written(views.full_ids(view).tolist(), range(*views.span[view].tolist()))
        for view in range(len(views.prefix))
    ]
    assert found == [view for text in PINNED[authors.name_of(case, family)] for view in text]


def test_what_is_pinned_is_what_the_authors_procedures_give() -> None:
    assert dict(authors.pinned()) == PINNED


def test_every_method_is_pinned_in_every_role_of_its_own() -> None:
    for name in set(names()) - TABLES:
        own = {"document", *(read_method(name).roles or {})}
        assert own <= {case.role for case in authors.CASES if case.method == name}, name
