from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from embedjob.input.chunks import WHOLE_GROUP_FACTOR, ranges

LAYOUTS = st.lists(st.integers(0, 400), max_size=30)
CHUNK_ROWS = st.integers(1, 60)


@given(LAYOUTS, CHUNK_ROWS)
def test_every_row_is_in_exactly_one_chunk_and_in_the_groups_it_names(
    layout: list[int], chunk_rows: int
) -> None:
    found = ranges(layout, chunk_rows=chunk_rows)
    assert [row for part in found for row in range(part.start, part.stop)] == [*range(sum(layout))]
    for part in found:
        assert part.start < part.stop
        assert part.first_row == sum(layout[: part.first_group]) <= part.start
        assert part.stop <= sum(layout[: part.stop_group])


@given(LAYOUTS, CHUNK_ROWS)
def test_only_groups_that_are_too_large_are_split(layout: list[int], chunk_rows: int) -> None:
    for part in ranges(layout, chunk_rows=chunk_rows):
        rows = part.stop - part.start
        groups = [size for size in layout[part.first_group : part.stop_group] if size]
        if rows != sum(groups):
            assert len(groups) == 1
            assert groups[0] > WHOLE_GROUP_FACTOR * chunk_rows
        assert rows <= chunk_rows or len(groups) == 1


@given(LAYOUTS, CHUNK_ROWS)
def test_neighbours_that_fit_together_are_joined(layout: list[int], chunk_rows: int) -> None:
    found = ranges(layout, chunk_rows=chunk_rows)
    for left, right in pairwise(found):
        split = WHOLE_GROUP_FACTOR * chunk_rows < max(
            layout[left.first_group], layout[right.first_group]
        )
        first = next(size for size in layout[right.first_group :] if size)
        assert split or left.stop - left.start + first > chunk_rows


def test_the_border_between_whole_and_split() -> None:
    assert [part[:2] for part in ranges([80], chunk_rows=10)] == [(0, 80)]
    assert [part[:2] for part in ranges([81], chunk_rows=10)][-1] == (80, 81)
    assert [tuple(part) for part in ranges([4, 6, 1, 0, 5], chunk_rows=10)] == [
        (0, 10, 0, 2, 0),
        (10, 16, 2, 5, 10),
    ]


def test_an_empty_file_has_no_chunk() -> None:
    assert ranges([], chunk_rows=10) == []
    assert ranges([0, 0], chunk_rows=10) == []
