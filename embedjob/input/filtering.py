"""Row filters: which rows pass `input.filter`, and which row groups need not be read."""

import datetime
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from embedjob.errors import ConfigError
from embedjob.input.filter_values import SEVERAL, compared_type, comparison
from embedjob.input.footers import Bounds

Term = tuple[str, str, Any]

# Types whose Parquet bounds are exact and compare in Python as they do in Arrow.
_COMPARABLE = frozenset({int, float, str, datetime.date})


def _outside(low: Any, high: Any, value: Any) -> bool:
    return bool(value < low or value > high)


# Whether no value within the bounds can pass; operators not listed here exclude nothing.
_EXCLUDES: Mapping[str, Callable[[Any, Any, Any], bool]] = {
    "=": _outside,
    "==": _outside,
    "<": lambda low, high, value: bool(low >= value),
    "<=": lambda low, high, value: bool(low > value),
    ">": lambda low, high, value: bool(high <= value),
    ">=": lambda low, high, value: bool(high < value),
    "in": lambda low, high, values: all(_outside(low, high, value) for value in values),
}
_COMPARES: Mapping[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
OPERATORS = (*_EXCLUDES, "!=", "not in")


def alternatives(written: Sequence[Any]) -> list[list[Term]]:
    """Return the filter as conjunctions, any of which lets a row pass; ConfigError if malformed."""
    groups = [written] if written and _is_term(written[0]) else written
    if not groups or not all(_is_list(group) and all(map(_is_term, group)) for group in groups):
        raise ConfigError(
            f"input.filter: got {list(written)!r}; allowed is a list of [column, operator, value],"
            f" or a list of such lists, any of which may hold; operators: {', '.join(OPERATORS)}"
        )
    return [[(column, named, value) for column, named, value in group] for group in groups]


def filter_columns(written: Sequence[Any]) -> tuple[str, ...]:
    """Return the columns that the filter reads."""
    return tuple(dict.fromkeys(term[0] for group in alternatives(written) for term in group))


def typed_filter(written: Sequence[Any], kinds: Mapping[str, pa.DataType]) -> list[list[Term]]:
    """Return the filter as conjunctions of comparisons with values of the columns' types.

    Values are pa.Scalar, or lists of them; ConfigError where a column cannot have such a value.
    """
    return [[_fitted(term, kinds[term[0]]) for term in group] for group in alternatives(written)]


def filter_rows(table: pa.Table, written: Sequence[Any]) -> pa.Table:
    """Return the rows that pass, in order; ConfigError where a value does not fit its column.

    A null passes `not in` and nothing else.
    """
    # With it come pyarrow.dataset and pandas: a second, for jobs that filter.
    import pyarrow.acero as acero

    kinds = {field.name: field.type for field in table.schema}
    groups = [
        reduce(operator.and_, [_expression(term, kinds[term[0]]) for term in group])
        for group in typed_filter(written, kinds)
    ]
    steps = [
        acero.Declaration("table_source", acero.TableSourceNodeOptions(table)),
        acero.Declaration("filter", acero.FilterNodeOptions(reduce(operator.or_, groups))),
    ]
    # One thread: with more, the order of rows is not promised.
    return acero.Declaration.from_sequence(steps).to_table(use_threads=False)


def misfit(written: Sequence[Any], kinds: Mapping[str, pa.DataType]) -> str | None:
    """Return why columns of these types cannot be filtered so; None where they can."""
    try:
        filter_rows(pa.schema([*kinds.items()]).empty_table(), written)
    except (ConfigError, pa.ArrowException, ValueError, ArithmeticError, TypeError) as error:
        return f"filter: {error}".replace("filter: filter: ", "filter: ")
    return None


def never_passes(
    written: Sequence[Any], bounds: Bounds, kinds: Mapping[str, pa.DataType] | None = None
) -> bool:
    """Return whether no row within these bounds, lowest and highest by column, can pass.

    With `kinds`, the columns' types, values are compared as `filter_rows` compares them.
    """
    groups = alternatives(written) if kinds is None else typed_filter(written, kinds)
    return all(any(_term_excludes(term, bounds) for term in group) for group in groups)


def _fitted(term: Term, kind: pa.DataType) -> Term:
    column, named, value = term
    try:
        return (column, *comparison(named, value, kind))
    except (ValueError, ArithmeticError, TypeError, pa.ArrowException) as error:
        raise ConfigError(
            f"filter: a value does not fit its column: got {value!r} for {column!r}, which is"
            f" {kind}; {error}"
        ) from error


def _expression(term: Term, kind: pa.DataType) -> pc.Expression:
    column, named, value = term
    compared = compared_type(kind)
    field = pc.field(column) if kind == compared else pc.field(column).cast(compared)
    if named in SEVERAL:
        among = field.isin(pa.array(value, compared))
        return among if named == "in" else ~among
    compare: Callable[[Any, Any], pc.Expression] = _COMPARES[named]
    return compare(field, value)


def _term_excludes(term: Term, bounds: Bounds) -> bool:
    column, named, value = term
    low, high = bounds.get(column, (None, None))
    if named not in _EXCLUDES or not {type(low), type(high)} <= _COMPARABLE:
        return False
    try:
        return _EXCLUDES[named](low, high, _python(value))
    except TypeError:  # a value of another type: Arrow decides whether that is allowed
        return False


def _python(value: Any) -> Any:
    if isinstance(value, list):
        return [_python(one) for one in value]
    return value.as_py() if isinstance(value, pa.Scalar) else value


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value)


def _is_term(value: Any) -> bool:
    if not _is_list(value) or len(value) != 3:
        return False
    column, named, compared = value
    takes_list = named in SEVERAL
    return isinstance(column, str) and named in OPERATORS and _is_list(compared) == takes_list
