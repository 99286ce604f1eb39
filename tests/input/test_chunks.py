from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from embedjob.input.chunks import (
    MAX_TEXT_BYTES,
    PARCEL_ROWS,
    PARCEL_TEXT_BYTES,
    WHOLE_GROUP_FACTOR,
    Chunk,
    RowRange,
    Shard,
    newest_first,
    parcels,
    passes,
    ranges,
    text_of,
)

LAYOUTS = st.lists(st.integers(0, 400), max_size=30)
CHUNK_ROWS = st.integers(1, 60)
MIB = 2**20
GROUPS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 2000).map(MIB.__mul__)), max_size=9)


def _ranges(layout: Sequence[int], *, chunk_rows: int) -> list[RowRange]:
    """The chunks of groups of so little text that only rows count."""
    return ranges(layout, [size * 1000 for size in layout], chunk_rows=chunk_rows)


def _sized(groups: list[tuple[int, int]], chunk_rows: int) -> list[tuple[RowRange, float]]:
    """The chunks, and the text of each."""
    rows = [count for count, _ in groups]
    sizes = [size if count else 0 for count, size in groups]
    found = ranges(rows, sizes, chunk_rows=chunk_rows)
    texts = []
    for part in found:
        span = slice(part.first_group, part.stop_group)
        texts.append(sum(sizes[span]) * (part.stop - part.start) / sum(rows[span]))
    return list(zip(found, texts, strict=True))


@given(LAYOUTS, CHUNK_ROWS)
def test_every_row_is_in_exactly_one_chunk_and_in_the_groups_it_names(
    layout: list[int], chunk_rows: int
) -> None:
    found = _ranges(layout, chunk_rows=chunk_rows)
    assert [row for part in found for row in range(part.start, part.stop)] == [*range(sum(layout))]
    for part in found:
        assert part.start < part.stop
        assert part.first_row == sum(layout[: part.first_group]) <= part.start
        assert part.stop <= sum(layout[: part.stop_group])


@given(LAYOUTS, CHUNK_ROWS)
def test_only_groups_that_are_too_large_are_split(layout: list[int], chunk_rows: int) -> None:
    for part in _ranges(layout, chunk_rows=chunk_rows):
        rows = part.stop - part.start
        groups = [size for size in layout[part.first_group : part.stop_group] if size]
        if rows != sum(groups):
            assert len(groups) == 1
            assert groups[0] > WHOLE_GROUP_FACTOR * chunk_rows
        assert rows <= chunk_rows or len(groups) == 1


@given(LAYOUTS, CHUNK_ROWS)
def test_neighbours_that_fit_together_are_joined(layout: list[int], chunk_rows: int) -> None:
    found = _ranges(layout, chunk_rows=chunk_rows)
    for left, right in pairwise(found):
        split = WHOLE_GROUP_FACTOR * chunk_rows < max(
            layout[left.first_group], layout[right.first_group]
        )
        first = next(size for size in layout[right.first_group :] if size)
        assert split or left.stop - left.start + first > chunk_rows


def test_the_border_between_whole_and_split() -> None:
    assert [part[:2] for part in _ranges([80], chunk_rows=10)] == [(0, 80)]
    assert [part[:2] for part in _ranges([81], chunk_rows=10)][-1] == (80, 81)
    assert [tuple(part) for part in _ranges([4, 6, 1, 0, 5], chunk_rows=10)] == [
        (0, 10, 0, 2, 0),
        (10, 16, 2, 5, 10),
    ]


def test_an_empty_file_has_no_chunk() -> None:
    assert _ranges([], chunk_rows=10) == []
    assert _ranges([0, 0], chunk_rows=10) == []


@given(GROUPS, CHUNK_ROWS)
def test_no_chunk_holds_too_much_text_unless_it_is_one_row(
    groups: list[tuple[int, int]], chunk_rows: int
) -> None:
    found = _sized(groups, chunk_rows)
    assert [row for part, _ in found for row in range(part.start, part.stop)] == [
        *range(sum(rows for rows, _ in groups))
    ]
    for part, text in found:
        assert text <= MAX_TEXT_BYTES or part.stop - part.start == 1


@given(GROUPS, CHUNK_ROWS)
def test_only_too_much_text_moves_a_border(groups: list[tuple[int, int]], chunk_rows: int) -> None:
    """The borders of outputs from before the bound stay, wherever their chunks were within it."""
    by_rows = _sized([(rows, 0) for rows, _ in groups], chunk_rows)
    bounds = [part for part, _ in by_rows]
    sizes = {place: size for place, (_, size) in enumerate(groups)}
    texts = [
        sum(sizes[group] for group in range(part.first_group, part.stop_group) if groups[group][0])
        * (part.stop - part.start)
        / sum(groups[group][0] for group in range(part.first_group, part.stop_group))
        for part in bounds
    ]
    if all(text <= MAX_TEXT_BYTES for text in texts):
        assert [part for part, _ in _sized(groups, chunk_rows)] == bounds


def test_a_group_of_long_texts_is_cut_at_rows() -> None:
    borders = [part[:2] for part in ranges([16], [2 * MAX_TEXT_BYTES], chunk_rows=16)]
    assert borders == [(0, 8), (8, 16)]
    # Pieces by rows stay as they are while they hold little enough.
    text = 10 * MAX_TEXT_BYTES
    assert [part[:2] for part in ranges([100], [text], chunk_rows=10)][:2] == [(0, 10), (10, 20)]
    assert [part[:2] for part in ranges([100], [text + 100], chunk_rows=10)][:2] == [
        (0, 9),
        (9, 18),
    ]


def test_groups_that_are_too_long_together_stay_apart() -> None:
    sizes = [MAX_TEXT_BYTES // 2, MAX_TEXT_BYTES // 2, 1]
    assert [part[:2] for part in ranges([2, 3, 4], sizes, chunk_rows=16)] == [(0, 5), (5, 9)]


def _chunks(layout: Sequence[int], chunk_rows: int, row_bytes: int = 1) -> list[Chunk]:
    """The chunks of two shards of that layout, one after the other in turn."""
    return [
        Chunk(
            Shard(f"{name}.parquet", 1, "etag"),
            part.start,
            part.stop,
            (part.first_group, part.stop_group),
            part.first_row,
            f"{name}-{part.start}",
            row_bytes * (part.stop - part.start),
            10,
        )
        for part in _ranges(layout, chunk_rows=chunk_rows)
        for name in "ab"
    ]


@given(LAYOUTS, CHUNK_ROWS)
def test_a_pass_is_a_chunk_or_the_pieces_of_a_group(layout: list[int], chunk_rows: int) -> None:
    chunks = _chunks(layout, chunk_rows)
    found = passes(reversed(chunks))
    assert sorted(chunk.key for together in found for chunk in together) == sorted(
        chunk.key for chunk in chunks
    )
    assert len({(together[0].shard, together[0].groups) for together in found}) == len(found)
    for together in found:
        assert {(chunk.shard, chunk.groups) for chunk in together} == {
            (together[0].shard, together[0].groups)
        }
        assert list(together) == sorted(together, key=lambda chunk: chunk.start)


@given(LAYOUTS, CHUNK_ROWS, st.integers(1, 40), st.integers(1, 4000))
def test_only_what_is_small_together_is_a_parcel(
    layout: list[int], chunk_rows: int, most: int, row_bytes: int
) -> None:
    groups = passes(_chunks(layout, chunk_rows, row_bytes))
    made = parcels(groups, most=most)
    assert [chunk for parcel in made for chunk in parcel] == [c for group in groups for c in group]

    def is_small(chunks: Sequence[Chunk]) -> bool:
        rows = sum(chunk.rows for chunk in chunks)
        small = rows <= PARCEL_ROWS and text_of(chunks) <= PARCEL_TEXT_BYTES
        return small and len(chunks) <= most

    assert all(is_small(parcel) for parcel in made if parcel not in groups)
    # None could have taken more.
    for parcel, following in pairwise(made):
        group = next(group for group in groups if following[0] in group)
        assert not is_small([*parcel, *group])


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), max_size=12))
def test_the_newest_shards_come_first_and_their_rows_in_order(
    places: list[tuple[str, int]],
) -> None:
    written = {"a": 20.0, "b": 30.0, "c": 20.0}
    chunks = [
        Chunk(Shard(name, 1, "e", modified=written[name]), at, at + 1, (0, 1), 0, "", 1, 1)
        for name, at in places
    ]
    found = [(chunk.shard.url, chunk.start) for chunk in newest_first(chunks)]
    assert sorted(found) == sorted(places)
    assert found == sorted(found, key=lambda place: ("bac".index(place[0]), place[1]))
