"""The words of a text against nltk's, and their ids."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.config.heads import SparseHead, SparseLm
from embedjob.config.recipe import Recipe
from embedjob.text.tokenizing import ViewTokenizer
from embedjob.text.words import STOPWORDS, WordIds, sentences, stops, words
from tests.fakes import FAMILIES, tiny_tokenizer

# What the Treebank's rules look at, and some of what they do not.
MARKS = "ab1 ''\"\"`..,:;!?()[]{}<>-$%&@*\u2019\u201c\u201d\u00ab\u2014é"
PIECES = ["can't", "cannot", "gimme", "gonna ", " 'tis", "n't", "'ll ", "wanna", "more'n", "d'ye"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(MARKS, max_size=6) | st.sampled_from(PIECES), max_size=6).map("".join))
def test_a_sentence_is_split_as_nltk_splits_it(sentence: str) -> None:
    theirs = pytest.importorskip("nltk.tokenize.destructive").NLTKWordTokenizer()
    ours = list(words(sentence))
    assert ours == [word for part in sentences(sentence) for word in theirs.tokenize(part)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("the fox. the dog? yes!", ["the fox.", "the dog?", "yes!"]),
        ('he said "no." then (he left.) so', ['he said "no."', "then (he left.)", "so"]),
        (
            "mr. fox, e.g. a fox, in 2024. and j. bach",
            ["mr. fox, e.g. a fox, in 2024. and j. bach"],
        ),
        ("wait... for 3.5 kg. now", ["wait... for 3.5 kg.", "now"]),
        ("", [""]),
        ("  a.  b  ", ["  a.  b"]),
    ],
)
def test_where_sentences_end(text: str, found: list[str]) -> None:
    assert list(sentences(text)) == found


def test_hostile_texts_take_no_longer_than_others() -> None:
    for text in ("a" * 50_000, "." * 20_000, "' " * 9_000, ".) " * 9_000, "a. " * 9_000):
        assert sum(len(word) for word in words(text)) > 0


def test_the_stopwords_are_those_of_the_time_of_the_paper() -> None:
    english = sorted(word for word in STOPWORDS if any(map(str.isalpha, word)))
    assert len(english) == 179
    assert hashlib.sha256(" ".join(english).encode()).hexdigest()[:16] == "0c98fde29ffc5a2e"


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_of_each_word_alone(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    found = WordIds(tokenizer)(["The quick Fox! [SEP] fox", "", "the and !"])
    expected = {
        token
        for word in ("quick", "fox", "sep")
        for token in tokenizer.encode(word, add_special_tokens=False).ids
    }
    assert found.of(0).tolist() == sorted(expected)
    assert found.of(1).tolist() == found.of(2).tolist() == []


def test_a_token_that_ends_a_decoding_contains_the_mark() -> None:
    tokenizer = tiny_tokenizer("llama")
    found = stops(tokenizer, '"')
    assert tokenizer.token_to_id("<0x22>") in found
    assert all('"' in tokenizer.decode([token]) for token in found)


def test_words_go_with_their_texts_and_only_where_they_are_asked_for() -> None:
    heads = (SparseHead(sparse_lm=SparseLm(words="text")),)
    asked = ViewTokenizer(tiny_tokenizer("gpt2"), Recipe(model="-", heads=heads, span="last_token"))
    texts = ["fox", "", "a quick dog"]
    views = asked.views(texts)
    taken = views.take([2, 0, 2])
    assert views.words is not None
    assert taken.words is not None
    for place, text in enumerate((2, 0, 2)):
        assert taken.words.of(place).tolist() == views.words.of(text).tolist()
    assert ViewTokenizer(tiny_tokenizer("gpt2"), Recipe(model="-")).views(texts).words is None
