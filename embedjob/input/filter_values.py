"""Filter values: what a job file writes, as a value of the column that it is compared with.

Arrow casts at every row what it compares, and fails at the first that does not fit. So a value gets
its column's type at planning; where the type has no such value, the comparison becomes one that it
has: of whole numbers, `< 2.5` is `<= 2`.
"""

import datetime
import math
import re
from collections.abc import Callable
from decimal import Context, Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, NamedTuple

import pyarrow as pa

from embedjob.config.types import seconds_of
from embedjob.input.column_types import plain_type

SEVERAL = ("in", "not in")
EQUALITIES = frozenset({"=", "==", "!=", *SEVERAL})
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_EXACT = Context(prec=100)
_TIME = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2})(\.\d{1,9})?)?")
_DAY_SECONDS = 86400
_MAX_DIGITS = 400


class Comparison(NamedTuple):
    """An operator, and its value as the column has it: a list of values for `in` and `not in`."""

    operator: str
    value: Any


def compared_type(kind: pa.DataType) -> pa.DataType:
    """Return the type in which values of a column are compared: Arrow lacks it for some types."""
    plain = plain_type(kind)
    if pa.types.is_float16(plain):
        return pa.float32()
    return pa.large_binary() if pa.types.is_fixed_size_binary(plain) else plain


class _Whole(NamedTuple):
    """A type that stores whole numbers: its smallest and largest, and how many make the unit 1."""

    low: int
    high: int
    per_unit: int
    scalar: Callable[[int], pa.Scalar]


def comparison(operator: str, value: Any, kind: pa.DataType) -> Comparison:
    """Return a comparison with a column of this type; ValueError says why there is none."""
    kind = plain_type(kind)
    if pa.types.is_null(kind):  # nothing is equal to null, and nothing below it
        return Comparison("not in" if operator == "not in" else "in", [])
    whole = _whole(kind)
    if whole is not None:
        read = _reader(kind)
        if operator in SEVERAL:
            numbers = [read(one, kind) * whole.per_unit for one in value]
            return Comparison(operator, [whole.scalar(int(n)) for n in numbers if _has(whole, n)])
        return _of_whole(operator, read(value, kind) * whole.per_unit, whole)
    make = next((make for holds, make in _MAKERS if holds(kind)), None)
    if make is None:
        raise ValueError("a filter compares plain values: numbers, text, bytes, days and times")
    if operator in SEVERAL:
        return Comparison(operator, [make(one, kind, operator) for one in value])
    return Comparison(operator, make(value, kind, operator))


def _of_whole(operator: str, number: Fraction, whole: _Whole) -> Comparison:
    """Return the comparison of whole numbers that holds where that with `number` would."""
    below = math.floor(number)
    nothing = Comparison("<", whole.scalar(whole.low))
    anything = Comparison(">=", whole.scalar(whole.low))
    if _has(whole, number):
        return Comparison(operator, whole.scalar(below))
    if operator in EQUALITIES:
        return anything if operator == "!=" else nothing
    if operator in ("<", "<="):
        passes = below >= whole.low
        return Comparison("<=", whole.scalar(min(below, whole.high))) if passes else nothing
    passes = below < whole.high
    return Comparison(">=", whole.scalar(max(below + 1, whole.low))) if passes else nothing


def _has(whole: _Whole, number: Fraction) -> bool:
    return number.denominator == 1 and whole.low <= number <= whole.high


def _whole(kind: pa.DataType) -> _Whole | None:
    """Return the whole numbers that a type stores; None for types that store other things."""
    if pa.types.is_decimal(kind):
        high = 10**kind.precision - 1
        shift = -kind.scale

        def decimal(number: int) -> pa.Scalar:
            return pa.scalar(Decimal(number).scaleb(shift, _EXACT), kind)

        return _Whole(-high, high, 10**kind.scale, decimal)
    if not (pa.types.is_integer(kind) or pa.types.is_temporal(kind)):
        return None
    bits = kind.bit_width
    unsigned = pa.types.is_unsigned_integer(kind)
    low, high = (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    stored = kind if pa.types.is_integer(kind) else {32: pa.int32(), 64: pa.int64()}[bits]
    per_unit = _PER_SECOND[kind.unit] if hasattr(kind, "unit") else 1
    return _Whole(low, high, per_unit, lambda number: pa.scalar(number, stored).cast(kind))


def _reader(kind: pa.DataType) -> Callable[[Any, pa.DataType], Fraction]:
    readers = (
        (pa.types.is_timestamp, _moment),
        (pa.types.is_date, _day),
        (pa.types.is_time, _time),
        (pa.types.is_duration, _duration),
    )
    return next((read for holds, read in readers if holds(kind)), _number)


def _number(value: Any, kind: pa.DataType) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise ValueError("allowed is a number")
    try:
        # A float as it is written: 0.1 is a tenth, and not the number nearest to it.
        number = Decimal(repr(value) if isinstance(value, float) else value)
    except InvalidOperation as error:
        raise ValueError("allowed is a number") from error
    if not number.is_finite() or abs(number.adjusted()) > _MAX_DIGITS:
        raise ValueError(f"allowed is a number of at most {_MAX_DIGITS} digits")
    return Fraction(number)


def _moment(value: Any, kind: pa.DataType) -> Fraction:
    """Return seconds since 1970; a moment without a zone is in UTC."""
    seconds, zoned = _parsed(value, "2024-01-31, or 2024-01-31T12:00:00Z")
    if zoned and not kind.tz:
        raise ValueError("the column has no time zone; allowed is 2024-01-31T12:00:00")
    return seconds


def _day(value: Any, kind: pa.DataType) -> Fraction:
    seconds, zoned = _parsed(value, "2024-01-31")
    if zoned:
        raise ValueError("the column has days; allowed is 2024-01-31")
    return seconds / _DAY_SECONDS


def _parsed(value: Any, allowed: str) -> tuple[Fraction, bool]:
    """Return the seconds since 1970 of a day or a time, and whether it names its zone."""
    text = value.isoformat() if isinstance(value, datetime.date) else value
    if isinstance(text, str):
        text = text.strip().upper()  # YAML writes 2024-01-31t12:00:00z as well
        for unit, count in _PER_SECOND.items():
            for zone in (None, "UTC"):
                try:
                    found = pa.scalar(text).cast(pa.timestamp(unit, zone)).cast(pa.int64())
                except pa.ArrowException:
                    continue
                return Fraction(found.as_py(), count), zone is not None
    raise ValueError(f"allowed is {allowed}")


def _time(value: Any, kind: pa.DataType) -> Fraction:
    """Return the seconds since midnight."""
    text = value.isoformat() if isinstance(value, datetime.time) else value
    match = _TIME.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError("allowed is 12:30 or 12:30:59.5")
    hours, minutes, seconds, part = match.groups(default="0")
    return (int(hours) * 60 + int(minutes)) * 60 + int(seconds) + Fraction(part)


def _duration(value: Any, kind: pa.DataType) -> Fraction:
    if isinstance(value, datetime.timedelta):
        return Fraction(value // datetime.timedelta(microseconds=1), 10**6)
    if not isinstance(value, str):
        raise ValueError("allowed is a duration such as 90s, 30m or 2h")
    return Fraction(seconds_of(value))


def _truth(value: Any, kind: pa.DataType, operator: str) -> pa.Scalar:
    if not isinstance(value, bool):
        raise ValueError("allowed is true or false")
    return pa.scalar(value, kind)


def _float(value: Any, kind: pa.DataType, operator: str) -> pa.Scalar:
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise ValueError("allowed is a number")
    try:
        return pa.scalar(float(value), pa.float64()).cast(compared_type(kind), safe=False)
    except (ValueError, OverflowError) as error:
        raise ValueError("allowed is a number") from error


def _text(value: Any, kind: pa.DataType, operator: str) -> pa.Scalar:
    if isinstance(value, int) and not isinstance(value, bool) and operator in EQUALITIES:
        return pa.scalar(str(value), kind)
    if isinstance(value, datetime.date):
        value = value.isoformat()
    if not isinstance(value, str):
        raise ValueError("the column has text; put the value into quotes")
    return pa.scalar(value, kind)


def _bytes(value: Any, kind: pa.DataType, operator: str) -> pa.Scalar:
    if not isinstance(value, str | bytes):
        raise ValueError("the column has bytes; allowed is a text, which stands for its UTF-8")
    return pa.scalar(value.encode() if isinstance(value, str) else value, pa.large_binary())


_MAKERS: tuple[
    tuple[Callable[[pa.DataType], bool], Callable[[Any, pa.DataType, str], pa.Scalar]], ...
] = (
    (pa.types.is_boolean, _truth),
    (pa.types.is_floating, _float),
    (pa.types.is_large_string, _text),
    (lambda kind: pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind), _bytes),
)
