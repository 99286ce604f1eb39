"""Borders: within the bound, and an edit moves those of at most three stretches."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedjob.text.passages.borders import Sentences, landmarks, passage_stops, rank

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=40)
NAMES = st.lists(st.integers(0, 40), max_size=25)


def of(sizes: list[int], names: list[str] | None = None) -> Sentences:
    """Sentences of so many tokens, ranked by their names."""
    texts = names or [f"sentence {place}" for place in range(len(sizes))]
    ranks = [rank(text, within=False) for text in texts]
    return Sentences(texts, np.array(sizes), np.zeros(len(sizes), np.int64), np.array(ranks))


def named(numbers: list[int], salt: int = 0) -> Sentences:
    """Sentences whose number says everything of them, so that equal ones are equal."""
    texts = [f"{salt} {one}" for one in numbers]
    return of([1 + (7 * one + salt) % 30 for one in numbers], texts)


def lengths(sizes: list[int], stops: list[int]) -> list[int]:
    return [sum(sizes[a:b]) for a, b in pairwise([0, *stops])]


def runs(own: Sentences, stops: list[int]) -> set[tuple[str, ...]]:
    return {tuple(own.texts[a:b]) for a, b in pairwise([0, *stops])}


@given(SIZES, st.integers(1, 200), st.integers(0, 9))
def test_passages_fit(sizes: list[int], most: int, salt: int) -> None:
    stops = passage_stops(of(sizes, [f"{salt} {place}" for place in range(len(sizes))]), most)
    assert stops == sorted(set(stops))
    assert stops[-1] == len(sizes)
    found = lengths(sizes, stops)
    singles = [b - a == 1 for a, b in pairwise([0, *stops])]
    assert all(one <= most or single for one, single in zip(found, singles, strict=True))
    if sum(sizes) <= most:
        assert stops == [len(sizes)]


@given(st.integers(1, 400), st.integers(9, 60), st.integers(0, 9))
def test_no_passage_is_short_where_sentences_are(number: int, most: int, salt: int) -> None:
    names = [f"{salt} {place}" for place in range(number)]
    found = lengths([1] * number, passage_stops(of([1] * number, names), most))
    assert min(found) >= 0.36 * most or len(found) == 1


def by_definition(own: Sentences, most: int) -> list[int]:
    """Where nothing lower is within 0.45 of the bound; of equal ranks the first counts."""
    places, ranks, near = [0, *np.cumsum(own.sizes).tolist()], own.ranks.tolist(), 0.45 * most
    found = []
    for border in range(1, len(ranks)):
        before = [one for one in range(1, border) if places[border] - places[one] < near]
        after = [
            one for one in range(border + 1, len(ranks)) if places[one] - places[border] < near
        ]
        if (
            min(places[border], places[-1] - places[border]) >= near
            and all(ranks[one - 1] > ranks[border - 1] for one in before)
            and all(ranks[one - 1] >= ranks[border - 1] for one in after)
        ):
            found.append(border)
    return found


@given(NAMES, st.integers(1, 300), st.integers(0, 9))
def test_a_landmark_has_nothing_lower_near_it(numbers: list[int], most: int, salt: int) -> None:
    own = named(numbers, salt)
    assert landmarks(own, most) == by_definition(own, most)


@given(NAMES, NAMES, NAMES, NAMES, st.integers(20, 300), st.integers(0, 9))
def test_an_edit_makes_three_stretches_at_most(
    left: list[int], old: list[int], new: list[int], right: list[int], most: int, salt: int
) -> None:
    """Invariant: whatever the sentences are, equal ones among them, and where the edit is."""
    before = named([*left, *old[:1], *right], salt)
    after = named([*left, *new[:1], *right], salt)
    known = runs(before, [*landmarks(before, most), len(before.texts)])
    assert len(runs(after, [*landmarks(after, most), len(after.texts)]) - known) <= 3


@given(NAMES, st.integers(20, 200), st.integers(0, 9))
def test_a_stretch_is_cut_alike_whatever_stands_beside_it(
    numbers: list[int], most: int, salt: int
) -> None:
    own = named(numbers, salt)
    stops = passage_stops(own, most)
    if len(stops) > 1:
        alone = []
        for first, stop in pairwise([0, *landmarks(own, most), len(numbers)]):
            inside = named(numbers[first:stop], salt)
            assert landmarks(inside, most) == []
            alone += [first + one for one in passage_stops(inside, most)]
        assert alone == stops


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
