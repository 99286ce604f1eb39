import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from embedjob.vectors.sparse import Row, heaviest, sparse

ROWS = st.lists(st.dictionaries(st.integers(0, 50), st.floats(0, 9, width=32), max_size=6))


def row(entries: dict[int, float]) -> Row:
    indices = sorted(entries)
    values = [entries[index] for index in indices]
    return np.array(indices, np.uint32), np.array(values, np.float32)


@given(ROWS, st.data())
def test_rows_come_back_in_any_order(rows: list[dict[int, float]], data: st.DataObject) -> None:
    joined = sparse([row(one) for one in rows])
    assert len(joined) == len(rows)
    places = data.draw(st.lists(st.integers(0, len(rows) - 1)) if rows else st.just([]))
    taken = joined.take(np.array(places, np.int64))
    assert len(taken) == len(places)
    for at, place in enumerate(places):
        indices, values = taken.row(at)
        assert dict(zip(indices.tolist(), values.tolist(), strict=True)) == rows[place]


@given(st.dictionaries(st.integers(0, 50), st.integers(0, 5), max_size=12), st.integers(1, 6))
def test_the_heaviest_are_kept_and_the_lower_index_among_equals(
    entries: dict[int, int], top_k: int
) -> None:
    kept = heaviest(*row(entries), top_k=top_k, scale=10.0)
    by_weight = sorted(entries, key=lambda index: (-entries[index], index))[:top_k]
    expected = sorted(index for index in by_weight if entries[index])
    assert kept[0].tolist() == expected
    assert kept[1].tolist() == [10.0 * entries[index] for index in expected]


def test_what_is_not_finite_is_never_left_out() -> None:
    indices, values = np.arange(3, dtype=np.uint32), np.array([1, np.nan, 2], np.float32)
    assert np.isnan(heaviest(indices, values, top_k=1, scale=None)[1]).any()
