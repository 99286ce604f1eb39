"""Ragged arrays against lists of lists."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from embedjob.text.arrays import flatten, gather, offsets_of

ROWS = st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=5), max_size=8)


@given(rows=ROWS)
def test_flattened_rows_lie_between_their_offsets(rows: list[list[int]]) -> None:
    ids, offsets = flatten(rows)
    assert (ids.dtype, offsets.dtype) == (np.uint32, np.int64)
    assert len(offsets) == len(rows) + 1
    assert [ids[offsets[i] : offsets[i + 1]].tolist() for i in range(len(rows))] == rows


@given(rows=ROWS, data=st.data())
def test_gathered_rows_are_those_asked_for_in_that_order(
    rows: list[list[int]], data: st.DataObject
) -> None:
    places = st.lists(st.integers(0, len(rows) - 1), max_size=10) if rows else st.just([])
    wanted = data.draw(places)
    ids, offsets = flatten(rows)
    positions, bounds = gather(offsets, np.array(wanted, np.int64))
    assert ids[positions].tolist() == [id for row in wanted for id in rows[row]]
    assert bounds.tolist() == offsets_of(np.array([len(rows[row]) for row in wanted])).tolist()
