"""A filter's value, of whatever type its column is: with the exact result, or said at planning.

Covers: embedjob.input.filter_values
"""

import datetime
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedjob.errors import ConfigError
from embedjob.input.filtering import filter_rows

D = Decimal
NOON = datetime.datetime(2024, 1, 1, 12, 0, 0, 500_000)
TOP = 2**64 - 1
U64 = pa.array([0, 5, TOP, None], pa.uint64())
CENTS = pa.array([D("1.50"), D("-2.25"), None], pa.decimal128(38, 2))
DAYS = pa.array([datetime.date(2024, 1, 1), None], pa.date32())
NAIVE = pa.array([NOON], pa.timestamp("us"))
AWARE = pa.array([NOON], pa.timestamp("us", "Europe/Berlin"))
CODES = pa.array([b"abc", b"\xff\xff\xff"], pa.binary(3))


@pytest.mark.parametrize(
    ("column", "operator", "value", "places"),
    [
        (U64, "=", TOP, [2]),
        (U64, ">", -1, [0, 1, 2]),
        (U64, "<", 2**70, [0, 1, 2]),
        (U64, "!=", -1, [0, 1, 2]),
        (U64, "not in", [-1], [0, 1, 2, 3]),
        (U64, "in", [5, -1, 2.5], [1]),
        (pa.array([2**53 + 1, 2], pa.int64()), ">", 2.5, [0]),
        (pa.array([1, -1], pa.int8()), "<", 1000, [0, 1]),
        (CENTS, "=", 1.5, [0]),
        (CENTS, ">", 1, [0]),
        (CENTS, "<", 1.505, [0, 1]),
        (CENTS, "<", "1e40", [0, 1]),
        (CENTS, "in", [1.5, 1], [0]),
        (DAYS, ">=", "2024-01-01", [0]),
        (DAYS, "<", "2024-01-01 12:00", [0]),
        (NAIVE, ">=", "2024-01-01", [0]),
        (NAIVE, ">", "2024-01-01T12:00:00.5000001", []),
        (NAIVE, "<", "0001-01-01", []),
        (AWARE, "=", "2024-01-01T13:00:00.5+01:00", [0]),
        (AWARE, ">=", "2024-01-01t12:00:00z", [0]),
        (AWARE, ">=", "2024-01-01", [0]),
        (pa.array([253402300800], pa.timestamp("s")), ">", "2024-01-01T00:00:00.000000001", [0]),
        (pa.array([datetime.time(12, 30)], pa.time32("ms")), "=", "12:30", [0]),
        (pa.array([90_000_000], pa.duration("us")), "<=", "90s", [0]),
        (CODES, "=", "abc", [0]),
        (CODES, "in", ["abc", "x"], [0]),
        (pa.array([b"abc"], pa.large_binary()), "<", "abd", [0]),
        (pa.array([1.5, None], pa.float16()), "in", [1.5], [0]),
        (pa.array([0.1], pa.float32()), "=", 0.1, [0]),
        (pa.array(["2024", "05"]), "=", 2024, [0]),
        (pa.nulls(2), "not in", [1], [0, 1]),
        (pa.nulls(2), "!=", 1, []),
        (pa.array([5, 6]).dictionary_encode(), "=", 5, [0]),
    ],
)
def test_which_rows_pass(column: pa.Array, operator: str, value: Any, places: list[int]) -> None:
    table = pa.table({"c": column, "place": range(len(column))})
    found = filter_rows(table, [("c", operator, value)])
    assert found.column("place").to_pylist() == places


@pytest.mark.parametrize(
    ("column", "operator", "value", "said"),
    [
        (U64, "=", "x", "allowed is a number"),
        (U64, "=", True, "allowed is a number"),
        (U64, "=", None, "allowed is a number"),
        (CENTS, "<", float("nan"), "allowed is a number"),
        (DAYS, "<=", "2024-13-01", "allowed is 2024-01-31"),
        (NAIVE, "=", "2024-01-01T00:00:00Z", "no time zone"),
        (NAIVE, "=", 5, "allowed is 2024-01-31"),
        (pa.array([1], pa.time64("us")), "=", 45000, "allowed is 12:30"),
        (pa.array([1], pa.duration("s")), "=", 5, "allowed is a duration such as 90s"),
        (pa.array(["no"]), "=", False, "put the value into quotes"),
        (pa.array(["9", "10"]), "<", 10, "put the value into quotes"),
        (pa.array([True]), "=", 1, "allowed is true or false"),
        (pa.array([b"a"]), "in", [1], "bytes"),
        (pa.array([[1]]), "=", 1, "plain values"),
        (pa.array([{"a": 1}]), "in", [1], "plain values"),
    ],
)
def test_what_a_column_cannot_be_compared_with(
    column: pa.Array, operator: str, value: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=rf"a value does not fit its column.*'c'.*{said}"):
        filter_rows(pa.table({"c": column}).slice(0, 0), [("c", operator, value)])


_HOLDS: Mapping[str, Callable[[Any, Any], bool]] = {
    "=": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}
_NUMBERS = st.decimals(-400, 400, places=2) | st.integers(-(2**70), 2**70) | st.integers(-3, 3)


@given(
    st.sampled_from([pa.int8(), pa.uint8(), pa.int64(), pa.uint64(), pa.decimal128(4, 1)]),
    st.lists(st.integers(0, 127), min_size=1, max_size=5),
    st.sampled_from(sorted(_HOLDS)),
    _NUMBERS,
)
def test_numbers_compare_as_numbers(
    kind: pa.DataType, numbers: list[int], operator: str, value: Any
) -> None:
    column = pa.array(map(Decimal, numbers), pa.decimal128(4, 1)).cast(kind)
    found = filter_rows(pa.table({"c": column}), [("c", operator, value)]).column("c")
    holds = _HOLDS[operator]
    expected = [one for one in column.to_pylist() if holds(Fraction(one), Fraction(value))]
    assert found.to_pylist() == expected
