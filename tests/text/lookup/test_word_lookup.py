"""Words of texts found in a vocabulary, against sentence-transformers' WhitespaceTokenizer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer

from embedjob.text.lookup.word_lookup import WordLookup

WORDS = ["the", "Fox", "fox", "jumps", "U.S.", ",", "don't", "zwölf", "日本", "it", "--", "i"]
PIECES = [*WORDS, "The", "FOX", '"Fox', "fox!", "(jumps)", "u.s.", "Don't.", "ZWÖLF", "...", "x"]


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12),
    st.sets(st.sampled_from(PIECES), max_size=4),
    st.booleans(),
)
def test_words_are_found_as_sentence_transformers_finds_them(
    words: list[str], left_out: set[str], lower_case: bool
) -> None:
    theirs = WhitespaceTokenizer(WORDS, stop_words=left_out, do_lower_case=lower_case)
    ours = WordLookup(WORDS, max_tokens=100, left_out=left_out, lower_case=lower_case)
    text = " ".join(words)
    # Twice: the second time spellings are known.
    for views in (ours.views([text]), ours.views([text])):
        assert views.ids.tolist() == theirs.tokenize(text)


def test_views_have_each_texts_rows_up_to_the_limit() -> None:
    views = WordLookup(WORDS, max_tokens=2).views(["the fox jumps", "", "nothing here", "the Fox"])
    assert views.ids.tolist() == [0, 2, 0, 1]
    assert views.offsets.tolist() == [0, 2, 2, 2, 4]
    assert views.span.tolist() == [[0, 2], [0, 0], [0, 0], [0, 2]]
    assert views.truncated.tolist() == [True, False, False, False]
    assert views.lengths.tolist() == [2, 0, 0, 2]
    assert views.take(np.array([3, 0])).ids.tolist() == [0, 1, 0, 2]


def test_unknown_spellings_are_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedjob.text.lookup.word_lookup._MOST_KNOWN", 3)
    lookup = WordLookup(WORDS, max_tokens=10)
    texts = [f"word{n} Fox!" for n in range(20)]
    assert lookup.views(texts).ids.tolist() == [1] * 20
    assert len(lookup._rows) == len(WORDS) + 3


def test_rows_are_spelled_as_words() -> None:
    assert WordLookup(WORDS, max_tokens=10).tokens([2, 8]) == ["fox", "日本"]
