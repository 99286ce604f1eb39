"""Borders: within the bound, as few as the rule leaves, and where an edit leaves them alone."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedjob.text.passages.borders import Sentences, passage_stops, rank

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def of(sizes: list[int], names: list[str] | None = None) -> Sentences:
    """Sentences of so many tokens, ranked by their names."""
    texts = names or [f"sentence {place}" for place in range(len(sizes))]
    ranks = [rank(text, within=False) for text in texts]
    return Sentences(texts, np.array(sizes), np.zeros(len(sizes), np.int64), np.array(ranks))


def lengths(sizes: list[int], stops: list[int]) -> list[int]:
    return [sum(sizes[a:b]) for a, b in pairwise([0, *stops])]


@given(SIZES, st.integers(1, 200), st.integers(0, 9))
def test_passages_fit_and_every_border_is_needed(sizes: list[int], most: int, salt: int) -> None:
    """Invariant: a border stands between passages of which the stronger sides did not fit."""
    names = [f"{salt} {place}" for place in range(len(sizes))]
    stops = passage_stops(of(sizes, names), most)
    assert stops == sorted(set(stops))
    assert stops[-1] == len(sizes)
    found = lengths(sizes, stops)
    assert sum(found) == sum(sizes)
    singles = [b - a == 1 for a, b in pairwise([0, *stops])]
    assert all(one <= most or single for one, single in zip(found, singles, strict=True))
    if sum(sizes) <= most:
        assert stops == [len(sizes)]
    assert all(a + b > most for a, b in pairwise(found))


@given(SIZES, SIZES, SIZES, st.integers(20, 200))
def test_a_strong_border_parts_what_stands_on_its_sides(
    left: list[int], other: list[int], right: list[int], most: int
) -> None:
    """Behind a border that stays, passages are the same whatever stands before it."""
    names = [f"right {place}" for place in range(len(right))]
    parted = []
    for before in (left, other):
        sizes = [*before, most, *right]
        made = of(sizes, [*(f"left {place}" for place in range(len(before))), "own", *names])
        stops = passage_stops(made, most)
        # A sentence as long as a passage is one by itself.
        assert {len(before), len(before) + 1} <= set(stops)
        parted.append([stop - len(before) - 1 for stop in stops if stop > len(before)])
    assert parted[0] == parted[1]


def test_blanks_at_the_end_of_a_passage_do_not_count() -> None:
    made = Sentences(["a", "b"], np.array([10, 30]), np.array([0, 25]), np.array([0.1, 0.2]))
    assert passage_stops(made, 15) == [2]
    assert passage_stops(made, 14) == [1, 2]


@pytest.mark.parametrize("most", [9, 30, 90])
def test_repetitions_of_one_sentence_are_full_passages(most: int) -> None:
    stops = passage_stops(of([3] * 70, ["the same"] * 70), most)
    assert lengths([3] * 70, stops)[:-1] == [most] * (len(stops) - 1)


def test_a_rank_is_a_hash_of_the_sentence_alone() -> None:
    digest = hashlib.blake2b(b"It works.", digest_size=8).digest()
    share = int.from_bytes(digest, "big") / 2**64
    for blanks in ("", " ", "\n", "  \n"):
        assert rank(f"It works.{blanks}", within=False) == share
    assert rank("It works.\n\n", within=False) == share / 2
    assert rank("It works. ", within=True) == 1 + share
