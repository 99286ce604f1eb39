import datetime
import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedjob.errors import ConfigError
from embedjob.input.filtering import (
    OPERATORS,
    alternatives,
    filter_columns,
    filter_rows,
    never_passes,
)
from embedjob.input.footers import group_bounds

INTEGERS = st.lists(st.none() | st.integers(-5, 5), min_size=1, max_size=6)
STRINGS = st.lists(st.none() | st.text(max_size=2), min_size=1, max_size=6)
FLOATS = st.lists(st.none() | st.floats(width=32), min_size=1, max_size=6)
DAYS = st.dates(datetime.date(2020, 1, 1), datetime.date(2020, 1, 9))
DATES = st.lists(st.none() | DAYS, min_size=1, max_size=6)


def _terms(column: str, values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    single = sorted({*OPERATORS} - {"in", "not in"})
    return st.tuples(st.just(column), st.sampled_from(single), values) | st.tuples(
        st.just(column), st.sampled_from(["in", "not in"]), st.lists(values, min_size=1, max_size=3)
    )


TERMS = st.one_of(
    _terms("i", st.integers(-6, 6)),
    _terms("i", st.sampled_from([-1.5, 0.5, 7.25])).filter(lambda term: "in" not in term[1]),
    _terms("s", st.text(max_size=2)),
    _terms("f", st.floats(allow_nan=False, width=32)),
    _terms("d", DAYS),
)
FILTERS = st.lists(st.lists(TERMS, min_size=1, max_size=2), min_size=1, max_size=2)


@given(INTEGERS, STRINGS, FLOATS, DATES, FILTERS)
def test_a_row_group_is_only_left_out_when_none_of_its_rows_passes(
    integers: list[Any], strings: list[Any], floats: list[Any], dates: list[Any], written: Any
) -> None:
    rows = min(map(len, (integers, strings, floats, dates)))
    table = pa.table(
        {
            "i": pa.array(integers[:rows], pa.int64()),
            "s": pa.array(strings[:rows], pa.string()),
            "f": pa.array(floats[:rows], pa.float32()),
            "d": pa.array(dates[:rows], pa.date32()),
        }
    )
    file = io.BytesIO()
    pq.write_table(table, file)
    metadata = pq.read_metadata(io.BytesIO(file.getvalue()))
    bounds = group_bounds(metadata, 0, filter_columns(written))
    assert not (never_passes(written, bounds) and filter_rows(table, written).num_rows)


@pytest.mark.parametrize(
    ("written", "out"),
    [
        ([("n", "=", 9)], True),
        ([("n", "=", 5)], False),
        ([("n", "<", 3)], True),
        ([("n", "<=", 3)], False),
        ([("n", ">", 7)], True),
        ([("n", ">=", 7)], False),
        ([("n", "in", [1, 2, 8])], True),
        ([("n", "in", [1, 5])], False),
        ([("n", "!=", 5)], False),
        ([("n", "=", "x")], False),
        ([("m", "=", 1)], False),
        ([("m", "=", 1), ("n", "=", 9)], True),
        ([[("n", "=", 9)], [("n", "=", 4)]], False),
        ([[("n", "=", 9)], [("n", "=", 1)]], True),
    ],
)
def test_bounds_from_3_to_7(written: Any, out: bool) -> None:
    assert never_passes(written, {"n": (3, 7)}) is out


@pytest.mark.parametrize(
    ("written", "rows"),
    [
        ([("lang", "=", "en")], [0, 3]),
        ([("lang", "!=", "en")], [2]),
        ([("lang", "in", ["en", "fr"]), ("n", ">", 0)], [3]),
        ([("lang", "not in", ["en"])], [1, 2]),
        ([[("lang", "=", "de")], [("n", "=", 0)]], [0, 2]),
    ],
)
def test_rows_that_pass_stay_in_order(written: Any, rows: list[int]) -> None:
    lang = pa.array(["en", None, "de", "en"]).dictionary_encode()
    table = pa.table({"lang": lang, "n": range(4)})
    assert filter_rows(table, written).column("n").to_pylist() == rows


@pytest.mark.parametrize("shape", [list, tuple])
def test_one_conjunction_may_be_written_without_the_outer_list(shape: Any) -> None:
    term = shape(["a", "=", 1])
    assert alternatives(shape([term])) == alternatives(shape([shape([term])]))


@pytest.mark.parametrize(
    "written",
    [
        (),
        ("a", "=", 1),
        (("a", "=", 1), ("b",)),
        (("a", "="),),
        (("a", "~", 1),),
        (("a", "in", 1),),
        (("a", "=", [1]),),
        ((1, "=", 1),),
        ((("a", "=", 1),), ()),
    ],
)
def test_what_is_no_filter_is_refused(written: Any) -> None:
    with pytest.raises(ConfigError, match=r"input\.filter: got"):
        alternatives(written)
