import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from embedjob.encoder.batching.padding import Side, distinct_views, pad_views
from embedjob.text.arrays import offsets_of
from embedjob.text.views import TokenViews

ROWS = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=12)


def views_of(rows: list[list[int]], prefix: list[int], shared: list[bool]) -> TokenViews:
    """Views whose span is their last token; those that share it leave the prefix out."""
    sizes = np.array([len(row) for row in rows])
    which = np.where(shared, 0, -1).astype(np.int32)
    last = sizes + np.where(shared, len(prefix), 0)
    return TokenViews(
        views_per_text=1,
        prefixes=(np.array(prefix, np.uint32),),
        prefix=which,
        ids=np.concatenate([np.array(row, np.uint32) for row in rows]),
        offsets=offsets_of(sizes),
        common=np.zeros(len(rows), np.int32),
        span=np.stack([last - 1, last], axis=1).astype(np.int32),
        truncated=np.zeros(len(rows), bool),
    )


@given(rows=ROWS, data=st.data(), side=st.sampled_from(["left", "right"]))
def test_nothing_of_a_view_is_lost_or_added_by_padding(
    rows: list[list[int]], data: st.DataObject, side: Side
) -> None:
    shared = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    views = views_of(rows, [7, 8], shared)
    which = np.array(data.draw(st.permutations(range(len(rows)))))
    batch = pad_views(views, which, side=side)
    for row, view in enumerate(which):
        ids = views.full_ids(int(view)).tolist()
        assert batch.ids_VT[row][batch.mask_VT[row]].tolist() == ids
        assert batch.ids_VT[row][batch.span_VT[row]].tolist() == ids[-1:]
        assert batch.mask_VT[row, 0 if side == "right" else -1]


@given(rows=ROWS)
def test_without_its_prefix_a_view_is_its_own_ids(rows: list[list[int]]) -> None:
    views = views_of(rows, [7, 8], [True] * len(rows))
    batch = pad_views(views, np.arange(len(rows)), whole=False)
    for row, ids in enumerate(rows):
        assert batch.ids_VT[row][batch.mask_VT[row]].tolist() == ids
        assert batch.ids_VT[row][batch.span_VT[row]].tolist() == ids[-1:]


@given(rows=ROWS, data=st.data())
def test_views_are_one_exactly_when_ids_and_span_are(
    rows: list[list[int]], data: st.DataObject
) -> None:
    shared = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    views = views_of(rows, [7], shared)
    firsts, which = distinct_views(views)
    full = [tuple(views.full_ids(view).tolist()) for view in range(len(rows))]
    assert [full[firsts[one]] for one in which] == full
    assert len(firsts) == len({(ids, s) for ids, s in zip(full, shared, strict=True)})


def test_equal_ids_under_another_span_are_another_view() -> None:
    views = views_of([[1, 2], [1, 2], [1, 2]], [7], [False] * 3)
    views.span[1] = (0, 2)
    firsts, which = distinct_views(views)
    assert (firsts.tolist(), which.tolist()) == ([0, 1], [0, 1, 0])
