"""Slots in templates, and auxiliary views, under tokenizers of every family of decoders.

Covers: embedjob.text.prompts
"""

import pytest

from embedjob.config.heads import SparseHead, SparseLm
from embedjob.config.interventions import Contrast, Contrasting, Prepend, Prepending
from embedjob.config.recipe import Recipe
from embedjob.errors import ConfigError
from embedjob.text.slots import as_normalized
from embedjob.text.tokenizing import ViewTokenizer
from tests.fakes import tiny_tokenizer

FAMILIES = ("gpt2", "qwen", "llama3", "llama", "mistral")
PREPEND = Prepending(prepend=Prepend(slot="<PST>", start=0, exit=1))
NORMALIZED = Prepending(prepend=Prepend(slot="<PST>", start=0, exit=1, normalized=True))
CONTRAST = Contrasting(contrast=Contrast(template="Not {text}", layer=0, mode="norm"))
TEMPLATES = ('A sentence : <PST> "{text}" means', 'Now after all : <PST> "{text}" says')
TEXTS = ["a fox", "", "<PST> b", 'He said "no" ' * 40, "b <PST> a<PST>"]


def views_of(family: str, templates: tuple[str, ...], *interventions: object) -> ViewTokenizer:
    knobs = {"templates": templates, "interventions": interventions, "max_tokens": 64}
    recipe = Recipe(model="m", span="last_token").model_copy(update=knobs)
    return ViewTokenizer(tiny_tokenizer(family), recipe)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("slot_as", [PREPEND, NORMALIZED], ids=["special", "normalized"])
def test_every_view_has_its_slot_where_it_is_said_to_be_and_shares_what_is_before(
    family: str, slot_as: Prepending
) -> None:
    found = views_of(family, TEMPLATES, slot_as)
    views = found.views(TEXTS)
    tokens = [found.tokens(views.full_ids(view)) for view in range(len(views.prefix))]
    for view, spelt in enumerate(tokens):
        slot = views.slots[view % 2]
        assert [at for at, token in enumerate(spelt) if token.lstrip("▁") == "<PST>"] == [slot]
        assert views.prefix_lengths[view] == slot
    assert not views.common.any()
    assert views.auxiliary is None
    assert views.take([3, 1]).slots == views.slots


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slot_is_normalized_where_that_gives_other_ids(family: str) -> None:
    knobs = {"templates": TEMPLATES, "interventions": (PREPEND,)}
    recipe = Recipe(model="m", span="last_token").model_copy(update=knobs)
    settled = as_normalized(recipe, tiny_tokenizer(family))
    [prepending] = settled.interventions
    assert prepending == (NORMALIZED if family == "llama" else PREPEND)
    # As the authors do it: the token has the blank before it, and none after it.
    tokenizer = tiny_tokenizer(family)
    tokenizer.add_tokens(["<PST>"])
    theirs = tokenizer.encode('A sentence : <PST> "a fox" means').ids
    assert views_of(family, TEMPLATES, prepending).views(["a fox"]).full_ids(0).tolist() == theirs
    assert as_normalized(settled, tiny_tokenizer(family)) == settled


def test_a_recipe_without_a_slot_stays_as_it_is() -> None:
    recipe = Recipe(model="m", span="last_token", interventions=(CONTRAST,))
    assert as_normalized(recipe, tiny_tokenizer("llama")) is recipe


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slot_may_have_the_embedding_of_another_token(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    alone = tokenizer.encode("!", add_special_tokens=False).ids
    like = Prepending(prepend=Prepend(slot="<PST>", start=0, exit=1, embedding="!"))
    if len(alone) > 1:
        with pytest.raises(ConfigError, match="is 2 tokens; allowed is a single token"):
            views_of(family, TEMPLATES, like)
        return
    plain = views_of(family, TEMPLATES, PREPEND).views(TEXTS)
    views = views_of(family, TEMPLATES, like).views(TEXTS)
    assert views.slots == plain.slots
    for view in range(len(views.prefix)):
        wanted = plain.full_ids(view).tolist()
        wanted[views.slots[view % 2]] = alone[0]
        assert views.full_ids(view).tolist() == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_auxiliary_views_are_those_of_their_template_alone(family: str) -> None:
    views = views_of(family, TEMPLATES, PREPEND, CONTRAST).views(TEXTS).take([3, 0, 2])
    alone = views_of(family, ("Not {text}",)).views([TEXTS[3], TEXTS[0], TEXTS[2]])
    assert views.auxiliary is not None
    assert (views.auxiliary.texts, views.auxiliary.views_per_text) == (3, 1)
    assert views.auxiliary.slots == ()
    for text in range(3):
        assert views.auxiliary.full_ids(text).tolist() == alone.full_ids(text).tolist()


def test_words_are_of_the_main_views_alone() -> None:
    recipe = Recipe(
        model="m",
        span="last_token",
        interventions=(CONTRAST,),
        heads=(SparseHead(sparse_lm=SparseLm(words="text")),),
    )
    views = ViewTokenizer(tiny_tokenizer("gpt2"), recipe).views(TEXTS)
    assert views.auxiliary is not None
    assert views.words is not None
    assert views.auxiliary.words is None


def test_a_slot_in_the_auxiliary_template_is_one_too() -> None:
    contrast = Contrasting(contrast=Contrast(template="Not <PST> {text}", layer=0, mode="norm"))
    views = views_of("gpt2", TEMPLATES, PREPEND, contrast).views(TEXTS)
    assert views.auxiliary is not None
    assert len(views.auxiliary.slots) == 1


@pytest.mark.parametrize(
    "template", ['A sentence : "{text}"', "{text} <PST> means", "<PST> and <PST> {text}"]
)
def test_a_template_without_one_slot_before_its_text_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match=r"must have <PST> once,\s+and before the text"):
        views_of("gpt2", (template,), PREPEND)


def test_an_auxiliary_template_without_a_text_is_refused() -> None:
    contrast = Contrasting(contrast=Contrast(template="Not", layer=0, mode="norm"))
    with pytest.raises(ConfigError, match=r"'Not' has 0 \{text\} slots"):
        views_of("gpt2", ("{text}",), contrast)
