"""Keys by sorts in partitions, beside a dictionary that holds all of them."""

import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedjob.stages.reuse.text_keys import (
    NO_OLD,
    NO_TEXTS,
    OldKeys,
    TextKeys,
    all_of,
    column_numbers,
    hashes_of,
    in_order,
    join_partition,
    numbers_of,
)

# Few, so that they meet; some are alike in their first half, and both ends of the range are there.
HALVES = [bytes(8), b"\x00" * 7 + b"\x01", b"\x7f" + b"\xff" * 7, b"\x80" + bytes(7), b"\xff" * 8]
HASHES = st.builds(lambda one, two: one + two, st.sampled_from(HALVES), st.sampled_from(HALVES))
TEXTS = st.lists(st.tuples(st.integers(0, 4), HASHES), unique=True, max_size=30)
OLDS = st.lists(
    st.tuples(st.integers(0, 4), HASHES, st.integers(0, 99), st.integers(1, 3)), max_size=30
)


def text_keys(texts: list[tuple[int, bytes]]) -> TextKeys:
    high, low = numbers_of(b"".join(one for _, one in texts))
    return in_order(TextKeys(high, low, np.array([chunk for chunk, _ in texts], np.uint32)))


def old_keys(olds: list[tuple[int, bytes, int, int]]) -> OldKeys:
    high, low = numbers_of(b"".join(one for _, one, _, _ in olds))
    columns = [np.array([old[at] for old in olds], np.uint32) for at in (0, 2, 3)]
    return in_order(OldKeys(high, low, *columns))


def halves(some: list, seed: int) -> tuple[list, list]:  # type: ignore[type-arg]
    """The same in two parts, as two tasks would find them."""
    chance = random.Random(seed)
    sides = [chance.random() < 0.5 for _ in some]
    return tuple(
        [one for one, own in zip(some, sides, strict=True) if own == side] for side in (0, 1)
    )


@given(TEXTS, OLDS, st.integers(1, 7), st.integers(0, 9))
def test_each_text_of_each_chunk_is_found_once_in_the_lowest_file_that_has_it(
    texts: list[tuple[int, bytes]], olds: list[tuple[int, bytes, int, int]], parts: int, seed: int
) -> None:
    news = [text_keys(half) for half in halves(texts, seed)]
    before = [old_keys(half) for half in halves(olds, seed)]
    found, files, again = [], [], []
    for part in range(parts):
        places, repeated = join_partition(part, parts, news, before)
        names = hashes_of(repeated.high, repeated.low).to_pylist()
        again += zip(repeated.chunk.tolist(), names, strict=True)
        assert repeated.chunk.tolist() == sorted(repeated.chunk.tolist())
        hashes = hashes_of(places.high, places.low).to_pylist()
        lines = zip(places.file, places.line, places.lines, strict=True)
        found += zip(
            places.chunk.tolist(), hashes, [(*map(int, one),) for one in lines], strict=True
        )
        files.append(places.file.tolist())
    lowest: dict[bytes, int] = {}
    for file, one, _, _ in olds:
        lowest[one] = min(file, lowest.get(one, file))
    assert sorted((chunk, one) for chunk, one, _ in found) == sorted(
        (chunk, one) for chunk, one in texts if one in lowest
    )
    places_of = {(file, one, line, lines) for file, one, line, lines in olds}
    for _, one, (file, line, lines) in found:
        assert file == lowest[one]
        assert (file, one, line, lines) in places_of
    assert all(some == sorted(some) for some in files)
    left = Counter(one for _, one in texts if one not in lowest)
    assert sorted(again) == sorted((chunk, one) for chunk, one in texts if left[one] > 1)


def test_hashes_come_back_from_their_numbers_also_out_of_a_slice() -> None:
    hashes = [bytes(range(n, n + 16)) for n in range(0, 200, 7)]
    column = pa.chunked_array(
        [pa.array(hashes[:9], pa.binary(16)), pa.array(hashes[9:], pa.binary(16))]
    )
    assert hashes_of(*column_numbers(column)).to_pylist() == hashes
    assert hashes_of(*column_numbers(column.slice(5, 11))).to_pylist() == hashes[5:16]
    assert len(column_numbers(column.slice(0, 0))[0]) == 0


@pytest.mark.parametrize("parts", [1, 5])
def test_nothing_is_found_where_nothing_is(parts: int) -> None:
    some = text_keys([(0, bytes(16))])
    for news, olds in (([], []), ([some], []), ([some], [NO_OLD]), ([NO_TEXTS], [])):
        for part in range(parts):
            places, repeated = join_partition(part, parts, news, olds)
            assert (len(places.file), len(repeated.chunk)) == (0, 0)
    assert all_of([], NO_TEXTS) is NO_TEXTS
