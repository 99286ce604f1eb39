"""Every method gives what its authors' code gives: the same ids, positions and vectors."""

import hashlib

import numpy as np
import pytest

from embedjob.config.recipe import Role
from embedjob.config.templates import templates
from embedjob.methods.catalogue import names, read_method
from embedjob.text.prompts import prepare
from embedjob.vectors.encoded import Encoded
from tests.methods import references
from tests.methods.making import Setting, model
from tests.methods.settings import CASES, MERGED, OF_THE_TEXT_ALONE, OTHER_ROLES, TABLES

TEXTS = [
    "",
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
BGE = [(s, r) for s, r in EVERY if s.method == "bge_en_icl" and s.role != "document"]
BLANK_QUERIES = [setting for setting, _ in BGE]
# Tokens of a text alone, where the authors cut it before anything is put around it.
BUDGETS = {
    "echo": 300,
    "echo_finetuned": 300,
    "echo_rewrite": 300,
    "llara": 512,
    "promptreps": 512,
    "promptreps_multi": 512,
}


@pytest.mark.parametrize(("setting", "reference"), EVERY, ids=[s.name for s, _ in EVERY])
def test_a_method_equals_its_reference(setting: Setting, reference: references.Reference) -> None:
    tokenizer, theirs = setting.tokenizer(), model(setting.model)
    # The authors' blank after <query> comes of decoding, and nothing comes after it here.
    texts = TEXTS[1:] if setting in BLANK_QUERIES else TEXTS
    expected = [reference(tokenizer, theirs, text) for text in texts]
    views = setting.views().views(texts)
    per_text = views.views_per_text
    for text, one in enumerate(expected):
        for view in range(per_text):
            at = text * per_text + view
            assert views.full_ids(at).tolist() == one.ids[view], texts[text]
            assert list(range(*views.span[at].tolist())) == one.pooled[view], texts[text]
        assert len(one.ids) == per_text
    encoded = setting.encode(setting.views(), texts)
    # Theirs is then the mean of nothing.
    nothing = [row for row, one in enumerate(expected) if not all(one.pooled)]
    assert [texts[row] for row in nothing] == [""] * (setting.method in OF_THE_TEXT_ALONE)
    assert sorted(encoded.failed) == nothing
    require_same_vectors(encoded, expected, [r for r in range(len(texts)) if r not in nothing])
    require_same_beside(encoded, expected)


def require_same_vectors(
    encoded: Encoded, expected: list[references.Expected], rows: list[int]
) -> None:
    """Cosine and relative error of the embeddings in these rows."""
    found = encoded.embeddings[rows]
    vectors = np.stack([expected[row].vector.numpy() for row in rows])
    norms = np.linalg.norm(vectors, axis=1)
    errors = np.linalg.norm(found - vectors, axis=1) / norms
    cosines = (found * vectors).sum(axis=1) / (np.linalg.norm(found, axis=1) * norms)
    assert cosines.min() >= 0.99999
    assert errors.max() <= 1e-4


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


LONG = "the quick brown fox jumps over 1,234 lazy dogs; " * 40


@pytest.mark.parametrize(
    ("setting", "reference"),
    [(s, r) for s, r in EVERY if s.method in BUDGETS],
    ids=[s.name for s, _ in EVERY if s.method in BUDGETS],
)
def test_a_text_over_its_segments_budget_is_cut_where_the_reference_cuts_it(
    setting: Setting, reference: references.Reference
) -> None:
    budget = BUDGETS[setting.method]
    bare = setting.tokenizer().encode(LONG, add_special_tokens=False).ids
    assert len(bare) > 600 > budget
    expected = reference(setting.tokenizer(), model(setting.model), LONG)
    # A tiny tokenizer has more tokens for what is around the text than the view has room for.
    roomy = setting.with_knobs(max_tokens=2000)
    tokenizer = roomy.views()
    views = tokenizer.views([LONG])
    assert views.truncated.all()
    assert views.full_ids(0).tolist() == expected.ids[0]
    assert list(range(*views.span[0].tolist())) == expected.pooled[0]
    require_same_vectors(roomy.encode(tokenizer, [LONG]), [expected], [0])


@pytest.mark.parametrize(
    ("setting", "reference"), BGE, ids=[f"{s.name}-{len(s.knobs)}" for s, _ in BGE]
)
def test_a_long_query_is_cut_and_its_demonstrations_are_not(
    setting: Setting, reference: references.Reference
) -> None:
    # The characters of all but two are three tokens each, and the cut moves by one.
    long = [LONG, "fox " * 700, *("!" * n + "日本語の文章 " * 90 for n in range(6))]
    views = setting.views().views(long)
    assert views.truncated.all()
    whole = 0
    for row, text in enumerate(long):
        expected = reference(setting.tokenizer(), model(setting.model), text)
        # Theirs has a replacement for a character that the cut divides, ours nothing of it.
        if replaced(expected.ids[0], setting):
            continue
        whole += 1
        assert views.full_ids(row).tolist() == expected.ids[0]
        assert list(range(*views.span[row].tolist())) == expected.pooled[0]
    assert 2 < whole < len(long)
    assert not any(replaced(views.full_ids(row).tolist(), setting) for row in range(len(long)))


def replaced(ids: list[int], setting: Setting) -> bool:
    """Whether the ids hold a replacement character."""
    return "\ufffd" in setting.tokenizer().decode(ids)


@pytest.mark.parametrize(
    ("setting", "reference"), BGE, ids=[f"{s.name}-{len(s.knobs)}" for s, _ in BGE]
)
def test_an_empty_query_has_one_blank_more_than_that_of_the_authors(
    setting: Setting, reference: references.Reference
) -> None:
    tokenizer = setting.tokenizer()
    theirs = reference(tokenizer, model(setting.model), "").ids[0]
    at = len(theirs) - theirs[::-1].index(tokenizer.token_to_id("<query>"))
    blank = tokenizer.token_to_id("▁")
    assert setting.views().views([""]).full_ids(0).tolist() == [*theirs[:at], blank, *theirs[at:]]


LLM2VEC = [(s, r) for s, r in EVERY if s.method == "llm2vec"]


@pytest.mark.parametrize(
    ("setting", "reference"), LLM2VEC, ids=[f"{s.name}-{len(s.knobs)}" for s, _ in LLM2VEC]
)
def test_whole_words_are_dropped_of_a_long_text(
    setting: Setting, reference: references.Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last needs no cut, and the one before has blanks that are kept only then.
    texts = [LONG, "fox " * 700, " two  blanks\n" * 160 + "dogs ", "fox " * 90]
    # A tiny tokenizer has more tokens for what is around the text than 512 leave room for.
    roomy = 1000
    monkeypatch.setattr(references, "LLM2VEC_LENGTH", roomy)
    views = setting.with_knobs(max_tokens=roomy).views().views(texts)
    for row, text in enumerate(texts):
        expected = reference(setting.tokenizer(), model(setting.model), text)
        assert views.full_ids(row).tolist() == expected.ids[0]
        assert list(range(*views.span[row].tolist())) == expected.pooled[0]
    assert views.truncated.tolist() == [True, True, True, False]


@pytest.mark.parametrize(("role", "asked"), [("document", ""), ("query", f"{references.SEARCH}:")])
def test_llm2vec_reads_texts_of_a_model_without_a_chat_format_as_they_are(
    role: Role, asked: str
) -> None:
    setting = (read_method("llm2vec").for_models or {})["Sheared-LLaMA-1.3B"]
    knobs = {**MERGED, **setting.encoder, **(setting.roles or {}).get(role, {})}
    bare = Setting("llm2vec", role, "llama", "llama", knobs=knobs)
    texts = [text for text in TEXTS if text]
    views = bare.views().views(texts)
    for row, text in enumerate(texts):
        expected = references.llm2vec(asked, "", "")(bare.tokenizer(), model("llama"), text)
        assert views.full_ids(row).tolist() == expected.ids[0]
        assert list(range(*views.span[row].tolist())) == expected.pooled[0]


# Tokens of a view, where it is not the 512 of the literature (or of nobody: METHODS without one).
LIMITS: dict[str, int | dict[str, int]] = {
    "autoregembed": 512 + 5,
    "bert_flow": 64,
    "bert_whitening": 64,
    "bge_en_icl": {"document": 512, "query": 512 + 1, "symmetric": 512 + 1},
    "e5_mistral": 4096,
    "echo": 640,
    "echo_finetuned": 768,
    "echo_rewrite": 640,
    "llara": 560,
    "nv_embed": 32768,
    "promptreps": 768,
    "promptreps_multi": 768,
    "qwen3_embedding": 8192,
    "repllama": 512 - 1,
    "sbert": 128,
    "simcse_sup": 128,
    "simcse_unsup": 128,
}


@pytest.mark.parametrize("name", names())
def test_a_method_cuts_where_its_authors_do(name: str) -> None:
    limit, budget = LIMITS.get(name, 512), BUDGETS.get(name)
    for role, recipe in Setting(name, "document", "-", "-", knobs=MERGED).recipes().items():
        assert recipe.max_tokens == (limit[role] if isinstance(limit, dict) else limit)
        asked = recipe.model_copy(update={"instruction": recipe.instruction or ""})
        texts = [p for one in templates(asked) for p in one.segments if p.content is None]
        assert {piece.max_tokens for piece in texts} == {budget}


def test_every_method_has_a_reference() -> None:
    assert {setting.method for setting, _ in CASES} | TABLES == set(names())


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
