"""Where a long text may be cut.

Covers: embedjob.text.long_text
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.text.encoding import PromptEncoder
from embedjob.text.long_text import find_borders
from embedjob.text.prompts import Prompt
from tests.fakes import FAMILIES, tiny_tokenizer

TEXTS = st.text(alphabet="ab Te.\n\"'é日😀\u0301\x00", max_size=40)
BARE = {
    family: PromptEncoder(tiny_tokenizer(family), (Prompt("", ""),), special_tokens=False)
    for family in FAMILIES
}


@settings(max_examples=60, deadline=None)
@given(family=st.sampled_from(FAMILIES), text=TEXTS)
def test_borders_ascend_and_lie_where_tokens_begin(family: str, text: str) -> None:
    [encoding] = BARE[family].encode([0], [text], offsets=True)
    found = find_borders(np.array(encoding.offsets, np.int64).reshape(-1, 2))
    assert (np.diff(found.tokens) > 0).all()
    assert (np.diff(found.places) > 0).all()
    for token, place, clean in zip(found.tokens, found.places, found.clean, strict=True):
        assert 0 < token < len(encoding)
        assert 0 < place < len(text)
        assert encoding.offsets[token][0] == place
        if clean:
            assert max(end for _, end in encoding.offsets[:token]) <= place


#        a  emoji......................  b
CHARS = [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3), (2, 4), (4, 5)]


def test_a_character_of_several_tokens_is_not_cut() -> None:
    found = find_borders(np.array(CHARS))
    assert found.tokens.tolist() == [1, 4, 6]
    assert found.places.tolist() == [1, 2, 4]
    assert found.clean.tolist() == [True, True, True]
    straddling = find_borders(np.array([(0, 1), (0, 2), (1, 2), (1, 3), (3, 4)]))
    assert straddling.tokens.tolist() == [2, 4]
    assert straddling.clean.tolist() == [False, True]


@pytest.mark.parametrize(
    ("limit", "first", "border"), [(0, 0, 0), (1, 0, 0), (3, 0, 0), (4, 0, 1), (9, 0, 2), (4, 2, 2)]
)
def test_the_last_border_before_a_token(limit: int, first: int, border: int) -> None:
    assert find_borders(np.array(CHARS)).before(limit, first) == border


def test_a_clean_border_is_better_and_another_one_better_than_none() -> None:
    found = find_borders(np.array([(0, 1), (0, 2), (1, 2), (2, 3), (2, 4), (3, 4), (3, 5), (5, 6)]))
    assert list(zip(found.tokens.tolist(), found.clean.tolist(), strict=True)) == [
        *((2, False), (3, True), (5, False), (7, True))
    ]
    assert found.before(6, 0) == 1
    assert found.before(6, 2) == 2
    assert found.near(4, 3) == 3
    assert found.near(4, 1) == 2
    assert found.near(8, 5) == 4


def test_no_tokens_have_no_borders() -> None:
    assert len(find_borders(np.zeros((0, 2), np.int64)).tokens) == 0
