"""What every benchmark program is measured with."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.measuring.claims import Claim
from benchmarks.measuring.texts import distinct, duplicates, sample
from benchmarks.measuring.turns import Turns, least_cosine, quickest, take_turns


@given(st.lists(st.sampled_from("abcdefghij"), min_size=1), st.integers(1, 40))
def test_a_sample_keeps_the_order_and_every_copy(texts: list[str], count: int) -> None:
    chosen = sample(texts, count)
    assert len(chosen) <= count
    kept = set(chosen)
    assert chosen == [text for text in texts if text in kept]
    left = Counter(text for text in texts if text not in kept)
    assert all(len(chosen) + copies > count for copies in left.values())


def test_duplicates_and_distinct_texts_are_counted_alike() -> None:
    texts = ["a", "b", "a", " ", "c", "a"]
    assert duplicates(texts) == pytest.approx(2 / 6)
    assert distinct(texts, 2) == ["a", "b"]
    assert distinct(texts, 9) == ["a", "b", "c"]


def test_ways_take_turns_and_keep_their_last_result() -> None:
    calls: list[str] = []
    turns = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b", "a", "b"]
    assert [len(turns.seconds[way]) for way in "ab"] == [2, 2]


def test_the_quickest_is_found_among_those_that_run() -> None:
    def run(size: int) -> None:
        if size > 1:
            raise MemoryError

    assert quickest((1, 2, 3), run, beyond=(MemoryError,)) == 1
    with pytest.raises(MemoryError):
        quickest((1, 2), run)


def test_the_ratio_is_of_medians_and_its_spread_of_rounds() -> None:
    turns: Turns[None] = Turns({"slow": [4.0, 9.0, 6.0], "fast": [2.0, 3.0, 100.0]})
    assert turns.ratio("slow", "fast") == 2.0
    assert turns.ratios("slow", "fast") == [2.0, 3.0, 0.06]


def test_the_smallest_cosine_is_that_of_the_worst_row() -> None:
    one = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)
    other = np.array([[5.0, 0.0], [3.0, 3.0]], np.float32)
    assert least_cosine(one, other) == pytest.approx(0.5**0.5)


@pytest.mark.parametrize(
    ("claim", "holds"),
    [
        (Claim("x", 1.2, floor=1.2), True),
        (Claim("x", 1.19, floor=1.2), False),
        (Claim("x", 2.0, ceiling=2.0), True),
        (Claim("x", 2.1, ceiling=2.0), False),
        (Claim("x", 9.0, floor=1.2, cosine=0.99), False),
        (Claim("x", 0.1), True),
        (Claim("x", 0.1, floor=1.2).unbound(), True),
        (Claim("x", 0.1, cosine=float("nan")), False),
    ],
)
def test_a_claim_holds_by_its_bound_and_equal_results(claim: Claim, holds: bool) -> None:
    assert claim.holds is holds
