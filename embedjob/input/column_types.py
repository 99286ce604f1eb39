"""Column types: which of Arrow's many types mean the same, and values in an agreed type.

Writers spell one type in many ways: 32- or 64-bit offsets, views, dictionaries, names of list
items, nullability, zones that are UTC. A column is carried in its plain type, which has one
spelling, so that shards of several writers are one corpus.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

TEXT = pa.large_string()
_TEXTS = (pa.string(), pa.large_string(), pa.string_view())
_BYTES = (pa.binary(), pa.large_binary(), pa.binary_view())
_UTC = frozenset({"UTC", "ETC/UTC", "ETC/UCT", "UCT", "ETC/ZULU", "ZULU", "Z", "UNIVERSAL"}) | {
    *("ETC/UNIVERSAL", "GMT", "ETC/GMT", "GMT0", "ETC/GMT0", "GREENWICH", "ETC/GREENWICH"),
    *("+00:00", "-00:00", "+0000", "+00", "GMT+0", "GMT-0", "ETC/GMT+0", "ETC/GMT-0"),
}
_ITEM = "element"  # as Parquet names it, so that a round trip is exact
_NARROW_DECIMAL, _WIDE_DECIMAL = 38, 76  # the most digits of 128 and of 256 bits


def plain_type(given: pa.DataType) -> pa.DataType:
    """Return the type that all types of the same meaning share, at every depth."""
    if isinstance(given, pa.BaseExtensionType):
        return plain_type(given.storage_type)
    make = next((make for holds, make in _PLAIN if holds(given)), None)
    return make(given) if make else given


def is_text(given: pa.DataType) -> bool:
    """Return whether the type is a kind of string; a column without any value may be text, too."""
    return plain_type(given) in (TEXT, pa.null())


def agreed_type(kinds: Sequence[pa.DataType | None]) -> pa.DataType | None:
    """Return the plain type that most columns have, widened to the widest type that agrees with it.

    Null, at any depth, agrees with everything, and becomes text where nothing else is known: a
    column that is empty tonight is text more often than not. None where there is no type.
    """
    counts = Counter(plain_type(kind) for kind in kinds if kind is not None)
    if not counts:
        return None
    agreed, *others = (kind for kind, _ in counts.most_common())
    for kind in others:
        agreed = joined_type(agreed, kind) or agreed
    return _determined(agreed)


def fits(given: pa.DataType, agreed: pa.DataType) -> bool:
    """Return whether every value of a type can be carried, exactly, in the agreed type."""
    here, there = plain_type(given), plain_type(agreed)
    joined = joined_type(there, here)
    return joined is not None and _zoneless(joined) == _zoneless(there)


def joined_type(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    """Return the narrowest plain type for the values of two plain types; None if there is none.

    Of two zones, the left one is kept: both name the same moments.
    """
    if left == right or pa.types.is_null(right):
        return left
    if pa.types.is_null(left):
        return right
    if _is_zoned(left) and _is_zoned(right) and left.unit == right.unit:
        return left
    join = next((join for holds, join in _JOINS if holds(left) and holds(right)), None)
    return join(left, right) if join else None


def read_type(given: pa.DataType) -> pa.DataType:
    """Return the plain type, with text in place of the nulls inside of it: no value says more."""
    plain = plain_type(given)
    return plain if pa.types.is_null(plain) else _determined(plain)


def in_type(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Return a column in a type that it fits; pa.ArrowException where a value does not."""
    if column.type == kind:
        return column
    return pa.chunked_array([_cast(part, kind) for part in column.chunks], kind)


def _cast(array: pa.Array, kind: pa.DataType) -> pa.Array:
    array = _castable(array, kind)
    bare = _bare(array.type)
    array = array if bare == array.type else array.view(bare)
    return array.cast(_widened(array.type)).cast(kind)


def _castable(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return an array whose parts without any value have their type, and without list views.

    Arrow casts nulls inside of lists, structs and maps to the length of what holds them, and list
    views to lists of other values.
    """
    if array.type == kind:
        return array
    if array.null_count == len(array):
        return pa.nulls(len(array), kind)
    if pa.types.is_list_view(array.type) or pa.types.is_large_list_view(array.type):
        array = _as_list(array)
    given = array.type
    if pa.types.is_struct(given) and pa.types.is_struct(kind):
        return _castable_struct(array, kind)
    if pa.types.is_map(given) and pa.types.is_map(kind):
        pairs = pa.struct([("key", kind.key_type), ("value", kind.item_type)])
        return _with_values(array, pairs, lambda made: pa.map_(*(part.type for part in made)))
    if _is_list(given) and _is_list(kind):
        return _with_values(array, kind.value_type, lambda made: _with_parts(given, lambda _: made))
    return array


def _as_list(array: pa.Array) -> pa.Array:
    """Return a list view as a list, of 64-bit offsets."""
    import pyarrow.compute as pc  # late, as in `embedjob.input.int96`

    lengths = array.value_lengths().fill_null(0).cast(pa.int64())
    ends = pc.cumulative_sum(lengths)
    offsets = pa.concat_arrays([pa.nulls(1, pa.int64()).fill_null(0), ends])
    return pa.LargeListArray.from_arrays(offsets, array.flatten(), mask=array.is_null())


def _castable_struct(array: pa.Array, kind: pa.DataType) -> pa.Array:
    given = array.type
    ordered = given.names == kind.names
    if not ordered and sorted(given.names) != sorted(kind.names):
        return array
    parts = [array.field(place) for place in range(given.num_fields)]
    wanted = [*kind] if ordered else [kind.field(name) for name in given.names]
    made = [_castable(part, to.type) for part, to in zip(parts, wanted, strict=True)]
    if all(new is old for new, old in zip(made, parts, strict=True)):
        return array
    fields = [field.with_type(part.type) for field, part in zip(given, made, strict=True)]
    return pa.StructArray.from_arrays(made, fields=fields, mask=array.is_null())


def _with_values(
    array: pa.Array, wanted: pa.DataType, holder: Callable[[pa.DataType], pa.DataType]
) -> pa.Array:
    """Return a list or map of castable values; `holder` gives its type by theirs."""
    values = array.values  # all of them, whatever slice of the lists this is
    made = _castable(values, wanted)
    if made is values:
        return array
    own = array.buffers()[: array.type.num_buffers]
    kind = holder(made.type)
    return pa.Array.from_buffers(kind, len(array), own, offset=array.offset, children=[made])


def _plain_struct(given: pa.DataType) -> pa.DataType:
    fields = [given.field(place) for place in range(given.num_fields)]
    return pa.struct([(field.name, plain_type(field.type)) for field in fields])


def _decimal(precision: int, scale: int) -> pa.DataType:
    make = pa.decimal256 if precision > _NARROW_DECIMAL else pa.decimal128
    return make(precision, scale)


def has_inner_dictionary(given: pa.DataType) -> bool:
    """Return whether a nested type has dictionaries, which Arrow reads of one row group alone."""
    if not pa.types.is_nested(given):
        return False
    parts = [given.field(place).type for place in range(given.num_fields)]
    return any(pa.types.is_dictionary(part) or has_inner_dictionary(part) for part in parts)


def units_in(given: pa.DataType) -> set[str]:
    """Return the units of all timestamps in a type."""
    if pa.types.is_timestamp(given):
        return {given.unit}
    if not pa.types.is_nested(given):
        return set()
    fields = (given.field(place) for place in range(given.num_fields))
    return set().union(*(units_in(field.type) for field in fields))


def in_nanoseconds(given: pa.DataType) -> pa.DataType:
    """Return a plain type with nanoseconds where it has microseconds: int96 was read so once."""
    if pa.types.is_timestamp(given) and given.unit == "us":
        return pa.timestamp("ns", given.tz)
    return _with_parts(given, in_nanoseconds)


def _bare(given: pa.DataType) -> pa.DataType:
    """Return the type without extensions, which Arrow cannot cast inside of lists."""
    if isinstance(given, pa.BaseExtensionType):
        return _bare(given.storage_type)
    return _with_parts(given, _bare)


def _widened(given: pa.DataType) -> pa.DataType:
    """Return the type with plain values in its dictionaries.

    All values of a column together may be too long for the 32-bit offsets of its dictionary.
    """
    if isinstance(given, pa.BaseExtensionType):
        return _widened(given.storage_type)
    if pa.types.is_dictionary(given):
        return pa.dictionary(given.index_type, plain_type(given.value_type))
    return _with_parts(given, _widened)


def _with_parts(given: pa.DataType, change: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """Return a nested type of the same kind, with its parts changed; any other type as it is."""
    if not pa.types.is_nested(given) or isinstance(given, pa.BaseExtensionType):
        return given
    if pa.types.is_map(given):
        return pa.map_(change(given.key_type), change(given.item_type))
    fields = [given.field(place) for place in range(given.num_fields)]
    changed = [field.with_type(change(field.type)) for field in fields]
    if pa.types.is_struct(given):
        return pa.struct(changed)
    if pa.types.is_fixed_size_list(given):
        return pa.list_(changed[0], given.list_size)
    make = next((make for holds, make in _LISTS if holds(given)), None)
    return make(changed[0]) if make else given  # a union, which Parquet has not


_LISTS: tuple[tuple[Callable[[pa.DataType], bool], Callable[[pa.Field], pa.DataType]], ...] = (
    (pa.types.is_list, pa.list_),
    (pa.types.is_large_list, pa.large_list),
    (pa.types.is_list_view, pa.list_view),
    (pa.types.is_large_list_view, pa.large_list_view),
)


def _determined(given: pa.DataType) -> pa.DataType:
    """Return a plain type with text wherever no value has said what it is."""
    if pa.types.is_null(given):
        return TEXT
    return _with_parts(given, _determined)


def _zoneless(given: pa.DataType) -> pa.DataType:
    """Return a plain type with one zone for all moments."""
    if pa.types.is_timestamp(given) and given.tz:
        return pa.timestamp(given.unit, "UTC")
    return _with_parts(given, _zoneless)


def _joined_struct(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    """Return a struct of the left one's fields in their order, each joined with its namesake."""
    names, others = left.names, right.names
    if sorted(names) != sorted(others) or len({*names}) < len(names):
        return None
    parts = [joined_type(left.field(name).type, right.field(name).type) for name in names]
    return None if None in parts else pa.struct([*zip(names, parts, strict=True)])


def _joined_decimal(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    """Return a decimal with the digits of both: pandas takes no more than a shard's values need."""
    scale = max(left.scale, right.scale)
    whole = max(left.precision - left.scale, right.precision - right.scale)
    return None if whole + scale > _WIDE_DECIMAL else _decimal(whole + scale, scale)


def _joined_map(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    key = joined_type(left.key_type, right.key_type)
    item = joined_type(left.item_type, right.item_type)
    return None if key is None or item is None else pa.map_(key, item)


def _joined_list(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    """Return a list of both items; of a fixed size only where both lists are."""
    item, sizes = joined_type(left.value_type, right.value_type), {_size(left), _size(right)}
    if item is None or len(sizes - {None}) > 1:  # vectors of another width
        return None
    return _list(item, sizes.pop() if len(sizes) == 1 else None)


def _is_zoned(given: pa.DataType) -> bool:
    return pa.types.is_timestamp(given) and bool(given.tz)


def _is_encoded(given: pa.DataType) -> bool:
    return bool(pa.types.is_dictionary(given) or pa.types.is_run_end_encoded(given))


def _is_list(given: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(given)) or any(holds(given) for holds, _ in _LISTS)


def _size(given: pa.DataType) -> int | None:
    """Return the items of each list of a fixed size; None where lists differ."""
    return given.list_size if pa.types.is_fixed_size_list(given) else None


def _list(item: pa.DataType, size: int | None) -> pa.DataType:
    """Return a list type in its one spelling."""
    field = pa.field(_ITEM, item)
    return pa.list_(field) if size is None else pa.list_(field, size)


# The kinds of types that have several spellings, each with its plain one.
_PLAIN: tuple[tuple[Callable[[pa.DataType], bool], Callable[[Any], pa.DataType]], ...] = (
    (_is_encoded, lambda kind: plain_type(kind.value_type)),
    (_TEXTS.__contains__, lambda kind: TEXT),
    (_BYTES.__contains__, lambda kind: pa.large_binary()),
    (pa.types.is_date, lambda kind: pa.date32()),  # Parquet knows no other
    (pa.types.is_decimal, lambda kind: _decimal(kind.precision, kind.scale)),
    (
        _is_zoned,
        lambda kind: pa.timestamp(kind.unit, "UTC" if kind.tz.upper() in _UTC else kind.tz),
    ),
    (pa.types.is_map, lambda kind: pa.map_(plain_type(kind.key_type), plain_type(kind.item_type))),
    (pa.types.is_struct, _plain_struct),
    (_is_list, lambda kind: _list(plain_type(kind.value_type), _size(kind))),
)
_JOINS: tuple[
    tuple[Callable[[pa.DataType], bool], Callable[[Any, Any], pa.DataType | None]], ...
] = (
    (pa.types.is_struct, _joined_struct),
    (pa.types.is_map, _joined_map),
    (_is_list, _joined_list),
    (pa.types.is_decimal, _joined_decimal),
)
