import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedjob.config.interventions import Contrast, Contrasting
from embedjob.config.recipe import Recipe
from embedjob.text.tokenizing import ViewTokenizer
from embedjob.text.variants import views_with_variants
from tests.fakes import tiny_tokenizer

WORDS = st.sampled_from(["fox", "a dog", "the river bank", "é", ""])
PAIRS = st.lists(st.tuples(WORDS, st.lists(WORDS, max_size=3)), max_size=4)


def tokenizer(**recipe: object) -> ViewTokenizer:
    return ViewTokenizer(tiny_tokenizer("llama"), Recipe(model="m", max_tokens=16, **recipe))


MADE = [tokenizer(), tokenizer(templates=("It says: {text}", "{text} means"))]


@given(PAIRS, st.sampled_from(MADE))
def test_a_text_and_its_variants_are_units_of_one_text(
    pairs: list[tuple[str, list[str]]], made: ViewTokenizer
) -> None:
    views = views_with_variants(made, [text for text, _ in pairs], [own for _, own in pairs])
    assert views.texts == len(pairs)
    assert views.cuts is not None
    assert (views.cuts.tokens == 1).all()
    flat = [one for text, own in pairs for one in (text, *own)]
    alone = made.views(flat)
    assert views.units == len(flat)
    assert [views.full_ids(n).tolist() for n in range(len(views.prefix))] == [
        alone.full_ids(n).tolist() for n in range(len(alone.prefix))
    ]
    assert np.diff(views.text_units).tolist() == [1 + len(own) for _, own in pairs]


def test_only_a_text_that_is_cut_itself_counts_as_cut() -> None:
    long = "fox " * 50
    views = views_with_variants(MADE[0], ["fox", long], [[long], ["fox"]])
    assert (views.per_text(views.truncated) > 0).tolist() == [False, True]


def test_a_variant_without_a_token_is_left_out_where_the_text_has_some() -> None:
    bare = ViewTokenizer(tiny_tokenizer("gpt2"), Recipe(model="m"))
    views = views_with_variants(bare, ["fox", ""], [["", "dog"], [""]])
    assert np.diff(views.text_units).tolist() == [2, 1]
    empty = views.per_text(views.span[:, 0] >= views.span[:, 1]) > 0
    assert empty.tolist() == [False, True]


@pytest.mark.parametrize("texts", [[0, 1], [1], [1, 0]])
def test_auxiliary_views_go_where_their_units_go(texts: list[int]) -> None:
    against = Contrasting(contrast=Contrast(template="Not: {text}", layer=1, alpha=0.5))
    made = tokenizer(interventions=(against,), span="last_token")
    views = views_with_variants(made, ["fox", "dog"], [["a fox"], ["a dog", "no dog"]]).take(texts)
    words = [["fox", "a fox"], ["dog", "a dog", "no dog"]]
    alone = made.views([word for text in texts for word in words[text]])
    assert views.auxiliary is not None
    assert alone.auxiliary is not None
    assert [views.auxiliary.full_ids(n).tolist() for n in range(views.units)] == [
        alone.auxiliary.full_ids(n).tolist() for n in range(alone.units)
    ]
