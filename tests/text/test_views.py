from itertools import takewhile

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.text.views import TokenViews, assemble

IDS = st.lists(st.integers(0, 3), max_size=6)


@st.composite
def _made(draw: st.DrawFn) -> tuple[list[list[int]], TokenViews]:
    prefixes = draw(st.lists(st.lists(st.integers(0, 1), max_size=2), min_size=1, max_size=3))
    if draw(st.booleans()):
        prefixes = [prefixes[0]] * len(prefixes)
    texts = draw(st.integers(0, 5))
    rows = [draw(IDS) for _ in range(texts * len(prefixes))]
    span = np.array([[draw(st.integers(0, len(row))), len(row)] for row in rows], np.int32)
    truncated = np.array([bool(draw(st.booleans())) for _ in rows], np.bool_)
    views = assemble(
        rows,
        span=span.reshape(-1, 2),
        truncated=truncated,
        prefixes=prefixes,
        text_first=draw(st.booleans()),
        scored=draw(st.booleans()),
    )
    return rows, views


@settings(deadline=None, max_examples=60)
@given(_made())
def test_full_ids_are_what_went_in(made: tuple[list[list[int]], TokenViews]) -> None:
    rows, views = made
    assert [views.full_ids(view).tolist() for view in range(len(rows))] == rows
    assert views.lengths.tolist() == [len(row) for row in rows]
    assert views.texts * views.views_per_text == len(rows)
    assert views.ids.dtype == np.uint32


@settings(deadline=None, max_examples=60)
@given(_made())
def test_a_prefix_is_shared_where_it_can_be(made: tuple[list[list[int]], TokenViews]) -> None:
    rows, views = made
    for view, row in enumerate(rows):
        template = view % views.views_per_text
        prefix = views.prefixes[template].tolist()
        can = (
            bool(prefix)
            and row[: len(prefix)] == prefix
            and len(row) > len(prefix)
            and views.span[view, 0] >= len(prefix)
        )
        assert views.prefix[view] == (template if can else -1)


@settings(deadline=None, max_examples=60)
@given(_made(), st.data())
def test_take_gives_those_texts_in_that_order(
    made: tuple[list[list[int]], TokenViews], data: st.DataObject
) -> None:
    rows, views = made
    if not views.texts:
        assert views.take([]).texts == 0
        return
    chosen = data.draw(st.lists(st.integers(0, views.texts - 1), max_size=6))
    taken = views.take(np.array(chosen, np.int64))
    width = views.views_per_text
    source = [text * width + view for text in chosen for view in range(width)]
    assert [taken.full_ids(view).tolist() for view in range(len(source))] == [
        rows[view] for view in source
    ]
    assert taken.span.tolist() == views.span[source].tolist()
    assert taken.truncated.tolist() == views.truncated[source].tolist()
    assert taken.prefix.tolist() == views.prefix[source].tolist()
    assert taken.texts == len(chosen)
    assert taken.common.tolist() == views.common[chosen].tolist()
    assert taken.lengths.tolist() == views.lengths[source].tolist()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 3).flatmap(
        lambda views: st.lists(st.lists(IDS, min_size=views, max_size=views), max_size=4)
    ),
    st.lists(st.integers(0, 1), max_size=2),
    st.data(),
)
def test_views_of_a_text_share_what_they_begin_with(
    texts: list[list[list[int]]], prefix: list[int], data: st.DataObject
) -> None:
    per_text = len(texts[0]) if texts else 1
    begin = [data.draw(IDS) for _ in texts]
    rows = [
        [*(prefix if data.draw(st.integers(0, 3)) else []), *start, *tail]
        for start, tails in zip(begin, texts, strict=True)
        for tail in tails
    ]
    last = np.array([max(len(row) - 1, 0) for row in rows], np.int32)
    # Spans that are scored begin a token before, which may be shared.
    scored = data.draw(st.booleans())
    begins = np.maximum(last - scored, 0)
    span = np.stack([begins, [len(row) for row in rows]], axis=1).astype(np.int32).reshape(-1, 2)
    views = assemble(
        rows,
        span=span,
        truncated=np.zeros(len(rows), np.bool_),
        prefixes=[prefix] * per_text,
        text_first=True,
        scored=scored,
    )
    assert [views.full_ids(view).tolist() for view in range(len(rows))] == rows
    for text in range(len(texts)):
        mine = range(text * per_text, (text + 1) * per_text)
        skips = {int(views.prefix_lengths[view]) for view in mine}
        expected = 0
        if per_text > 1 and len(skips) == 1:
            skip = skips.pop()
            columns = zip(*(rows[view][skip : last[view]] for view in mine), strict=False)
            expected = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
        assert views.common[text] == expected
