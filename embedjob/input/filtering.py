"""Row filters: which rows pass `input.filter`, and which row groups need not be read."""

import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedjob.errors import ConfigError
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
OPERATORS = (*_EXCLUDES, "!=", "not in")


def alternatives(written: Sequence[Any]) -> list[list[Term]]:
    """Return the filter as conjunctions, any of which lets a row pass; ConfigError if malformed."""
    groups = [written] if written and _is_term(written[0]) else written
    if not groups or not all(_is_list(group) and all(map(_is_term, group)) for group in groups):
        raise ConfigError(
            f"input.filter: got {list(written)!r}; allowed is a list of [column, operator, value],"
            f" or a list of such lists, any of which may hold; operators: {', '.join(OPERATORS)}"
        )
    return [[(column, operator, value) for column, operator, value in group] for group in groups]


def filter_columns(written: Sequence[Any]) -> tuple[str, ...]:
    """Return the columns that the filter reads."""
    return tuple(dict.fromkeys(term[0] for group in alternatives(written) for term in group))


def filter_rows(table: pa.Table, written: Sequence[Any]) -> pa.Table:
    """Return the rows that pass, in order; an Arrow error where a value does not fit its column.

    A null passes `not in` and nothing else.
    """
    # With it come pyarrow.dataset and pandas: a second, for jobs that filter.
    import pyarrow.acero as acero

    predicate: pc.Expression = pq.filters_to_expression(alternatives(written))
    steps = [
        acero.Declaration("table_source", acero.TableSourceNodeOptions(table)),
        acero.Declaration("filter", acero.FilterNodeOptions(predicate)),
    ]
    # One thread: with more, the order of rows is not promised.
    return acero.Declaration.from_sequence(steps).to_table(use_threads=False)


def never_passes(written: Sequence[Any], bounds: Bounds) -> bool:
    """Return whether no row within these bounds, lowest and highest by column, can pass."""
    return all(
        any(_term_excludes(term, bounds) for term in group) for group in alternatives(written)
    )


def _term_excludes(term: Term, bounds: Bounds) -> bool:
    column, operator, value = term
    low, high = bounds.get(column, (None, None))
    if operator not in _EXCLUDES or not {type(low), type(high)} <= _COMPARABLE:
        return False
    try:
        return _EXCLUDES[operator](low, high, value)
    except TypeError:  # a value of another type: Arrow decides whether that is allowed
        return False


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value)


def _is_term(value: Any) -> bool:
    if not _is_list(value) or len(value) != 3:
        return False
    column, operator, compared = value
    takes_list = operator in ("in", "not in")
    return isinstance(column, str) and operator in OPERATORS and _is_list(compared) == takes_list
