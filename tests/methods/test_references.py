"""Every method gives what its authors' code gives: the same ids, positions and vectors."""

import hashlib

import numpy as np
import pytest

from embedjob.methods.catalogue import names, read_method
from embedjob.text.prompts import prepare
from embedjob.vectors.encoded import Encoded
from tests.methods import references
from tests.methods.making import Setting, model
from tests.methods.settings import CASES, OTHER_ROLES

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "a",
    "Why?",
    'She said "no"',
    " two  blanks ",
    "\nline\nbreak {x} _y_ {{z}}",
    "naïve café owners in Zürich",
    "日本語の文章もここにあります。",
    "how do I get funding for my web based startup idea? " * 3,
]


EVERY = [*CASES, *OTHER_ROLES]


@pytest.mark.parametrize(("setting", "reference"), EVERY, ids=[s.name for s, _ in EVERY])
def test_a_method_equals_its_reference(setting: Setting, reference: references.Reference) -> None:
    tokenizer, theirs = setting.tokenizer(), model(setting.model)
    expected = [reference(tokenizer, theirs, text) for text in TEXTS]
    views = setting.views().views(TEXTS)
    per_text = views.views_per_text
    for text, one in enumerate(expected):
        for view in range(per_text):
            at = text * per_text + view
            assert views.full_ids(at).tolist() == one.ids[view], TEXTS[text]
            assert list(range(*views.span[at].tolist())) == one.pooled[view], TEXTS[text]
        assert len(one.ids) == per_text
    encoded = setting.encode(setting.views(), TEXTS)
    assert not encoded.failed
    vectors = np.stack([one.vector.numpy() for one in expected])
    errors = np.linalg.norm(encoded.embeddings - vectors, axis=1)
    cosines = (encoded.embeddings * vectors).sum(axis=1) / np.linalg.norm(vectors, axis=1)
    assert cosines.min() >= 0.99999
    assert errors.max() <= 1e-4
    require_same_beside(encoded, expected)


def require_same_beside(encoded: Encoded, expected: list[references.Expected]) -> None:
    """The sparse entries and the routers' scores, of those methods that have them."""
    first = expected[0]
    assert (encoded.sparse is None) == (first.sparse is None)
    assert (encoded.routers is None) == (first.router is None)
    for row, one in enumerate(expected):
        if encoded.sparse is not None and one.sparse is not None:
            indices, values = encoded.sparse.row(row)
            assert indices.tolist() == sorted(one.sparse), TEXTS[row]
            assert np.allclose(values, [one.sparse[i] for i in indices.tolist()], atol=1e-5)
        if encoded.routers is not None and one.router is not None:
            assert np.allclose(encoded.routers[row], one.router.numpy(), rtol=1e-4, atol=1e-4)


def test_every_method_has_a_reference() -> None:
    assert {setting.method for setting, _ in CASES} == set(names())


def test_the_prompts_of_metaeol_are_the_authors() -> None:
    text = "\n".join(read_method("metaeol").encoder["templates"])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "9932e15351158a7e"


def test_qwen3_ends_in_endoftext_and_not_in_what_the_model_calls_eos() -> None:
    assert read_method("qwen3_embedding").encoder["special_tokens"]["eos_id"] == 151643


def test_e5_mistral_pools_an_eos_that_its_tokenizer_does_not_add() -> None:
    setting = next(s for s, _ in CASES if s.method == "e5_mistral")
    eos = setting.tokenizer().token_to_id("</s>")
    assert eos not in setting.tokenizer().encode("a fox").ids
    views = setting.views().views(["a fox", "fox " * 99])
    for view in range(2):
        start, stop = views.span[view].tolist()
        assert views.full_ids(view).tolist()[start:stop] == [eos]


@pytest.mark.parametrize("text", [text for text in TEXTS if text])
def test_the_full_stop_is_that_of_the_trajectories_paper(text: str) -> None:
    assert prepare("fullstop")(text) == references.fullstop(text)
