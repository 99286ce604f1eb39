"""JSON types: the kind of each value of a column, by rule, and the Arrow type of a whole column.

Texts stay texts, whatever they look like. Whole numbers are int64; with fractions in the same
column all are float64, where that changes none of them. Null, and an empty list, agree with every
kind; objects have the fields of all of them, and are null where no line has a field.
"""

import math
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import pyarrow as pa

from embedjob.input.column_types import TEXT

# "null", "bool", "whole", "long", "fraction", "text", ("list", kind), ("object", {name: kind}). A
# long number is a whole one that float64 would round.
JsonKind = Any
_ARROW: Mapping[str, pa.DataType] = {
    "null": pa.null(),
    "bool": pa.bool_(),
    "whole": pa.int64(),
    "long": pa.int64(),
    "fraction": pa.float64(),
    "text": TEXT,
}
_SAID: Mapping[str, str] = {
    "bool": "true or false",
    "whole": "a whole number",
    "long": "a whole number of more than 53 bits",
    "fraction": "a number with a fraction",
    "text": "a text",
    "list": "a list",
    "object": "an object",
}
_JOINED: Mapping[frozenset[str], str] = {
    frozenset({"whole", "long"}): "long",
    frozenset({"whole", "fraction"}): "fraction",
}
_EXACT = 2**53
# Of more names the names are values, and nearly every row would be null in each of them.
_MAX_NAMES = 1000


class Overflow(float):
    """A number that float64 does not hold."""


def fraction_of(literal: str) -> float:
    """Return the number that a fraction's or a power's digits say."""
    value = float(literal)
    return Overflow(value) if math.isinf(value) else value


def kind_of(value: Any, *, any_text: bool = False) -> JsonKind:
    """Return the kind of a value; ValueError where no column can hold it.

    With `any_text` a text may hold what UTF-8 does not: its row is a bad one.
    """
    return _KIND_OF[type(value)](value, any_text)


def _whole(value: int, any_text: bool) -> JsonKind:
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"got {value}, which 64 bits do not hold; write it as a text")
    return "whole" if abs(value) <= _EXACT else "long"


def _overflow(value: Overflow, any_text: bool) -> JsonKind:
    raise ValueError("a number is larger than 64 bits hold; write it as a text")


def _text(value: str, any_text: bool) -> JsonKind:
    if not any_text:
        _require_utf8(value, "a text")
    return "text"


def _require_utf8(value: str, what: str) -> None:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{what} is not UTF-8") from error


def _list(value: list[Any], any_text: bool) -> JsonKind:
    return "list", reduce(joined_kind, (kind_of(one) for one in value), "null")


def _object(value: dict[str, Any], any_text: bool) -> JsonKind:
    for name in value:
        _require_utf8(name, "a name in an object")
    return _of_fields({name: kind_of(one) for name, one in value.items()})


def _of_fields(fields: dict[str, JsonKind]) -> JsonKind:
    if len(fields) > _MAX_NAMES:
        raise ValueError(
            f"objects with more than {_MAX_NAMES} names in all lines; write them as texts, or as"
            " lists of names and values"
        )
    return "object", fields


_KIND_OF: Mapping[type, Callable[[Any, bool], JsonKind]] = {
    type(None): lambda value, any_text: "null",
    bool: lambda value, any_text: "bool",
    int: _whole,
    float: lambda value, any_text: "fraction",
    Overflow: _overflow,
    str: _text,
    list: _list,
    dict: _object,
}


def joined_kind(left: JsonKind, right: JsonKind) -> JsonKind:
    """Return the kind of values of both kinds; ValueError where a column cannot hold both."""
    if left == right or right == "null":
        return left
    if left == "null":
        return right
    name, other = _name(left), _name(right)
    if name == other == "list":
        return "list", joined_kind(left[1], right[1])
    if name == other == "object":
        both = {**left[1], **right[1]}
        return _of_fields(
            {key: joined_kind(left[1].get(key, "null"), right[1].get(key, "null")) for key in both}
        )
    if (joined := _JOINED.get(frozenset({name, other}))) is None:
        raise ValueError(f"got {_SAID[other]}, and {_SAID[name]} in the lines before")
    return joined


def arrow_type(kind: JsonKind, *, fractions: bool = False) -> pa.DataType:
    """Return the type of a column of a kind; with `fractions`, float64 wherever it is exact."""
    name = _name(kind)
    if name == "list":
        return pa.list_(pa.field("element", arrow_type(kind[1], fractions=fractions)))
    if name == "object":
        fields = [(key, arrow_type(one, fractions=fractions)) for key, one in kind[1].items()]
        return pa.struct(fields) if fields else pa.null()  # Parquet has no struct of nothing
    return _ARROW["fraction" if fractions and name == "whole" else name]


def has_nulls_alone(kind: pa.DataType) -> bool:
    """Return whether something in a type holds nothing but null."""
    fields = [kind.field(place) for place in range(kind.num_fields)]
    return pa.types.is_null(kind) or any(has_nulls_alone(field.type) for field in fields)


def without_empty(value: Any, kind: pa.DataType) -> Any:
    """Return a value whose objects without a field are null where no line has a field for them."""
    if value is None or pa.types.is_null(kind):
        return None
    if pa.types.is_list(kind):
        return [without_empty(one, kind.value_type) for one in value]
    if pa.types.is_struct(kind):
        return {field.name: without_empty(value.get(field.name), field.type) for field in kind}
    return value


def has_whole_numbers(kind: JsonKind) -> bool:
    """Return whether a kind has whole numbers that float64 holds as well."""
    if _name(kind) == "list":
        return has_whole_numbers(kind[1])
    if _name(kind) == "object":
        return any(map(has_whole_numbers, kind[1].values()))
    return bool(kind == "whole")


def _name(kind: JsonKind) -> str:
    return kind if isinstance(kind, str) else str(kind[0])
