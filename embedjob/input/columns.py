"""Columns: which of them a job reads, and which shards can give them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from embedjob.config.job import Input
from embedjob.errors import InputError
from embedjob.input.chunks import Shard
from embedjob.input.filtering import filter_columns, filter_rows
from embedjob.input.footers import Footer, Wanted
from embedjob.input.joining import text_columns

MAX_ROWS = 2**32  # the output's `row` is a uint32
# Kept columns carry this prefix until they are written: a corpus may well keep a column named
# `text` or `reason`, and the tables between the stages have columns of these names.
KEPT = "keep."


@dataclass(frozen=True)
class Columns:
    """The columns that a job reads, by purpose."""

    text: tuple[str, ...]
    id: str | None
    keep: tuple[str, ...]
    filter: tuple[str, ...]

    @property
    def carried(self) -> tuple[str, ...]:
        """Return the columns whose values reach the output; their types must agree."""
        return tuple(dict.fromkeys([*([self.id] if self.id else []), *self.keep]))

    @property
    def wanted(self) -> Wanted:
        """Return what footers are asked of these columns."""
        return Wanted(text=self.text, needed=self.needed, filter=self.filter)

    @property
    def needed(self) -> tuple[str, ...]:
        """Return every column to read, once."""
        return tuple(dict.fromkeys([*self.text, *self.carried, *self.filter]))


@dataclass(frozen=True)
class Agreement:
    """The types of the carried columns, and by url the shards that do not fit."""

    types: Mapping[str, pa.DataType]
    faults: Mapping[str, str]


def columns_of(job_input: Input) -> Columns:
    """Return the columns that `input` names."""
    return Columns(
        text=text_columns(job_input.text),
        id=job_input.id,
        keep=job_input.keep,
        filter=filter_columns(job_input.filter) if job_input.filter is not None else (),
    )


def plain_type(given: pa.DataType) -> pa.DataType:
    """Return the type without its encoding: strings and bytes have several that mean the same."""
    if isinstance(given, pa.BaseExtensionType):
        return plain_type(given.storage_type)
    if pa.types.is_dictionary(given):
        return plain_type(given.value_type)
    if is_text(given):
        return pa.large_string()
    if given in (pa.binary(), pa.large_binary(), pa.binary_view()):
        return pa.large_binary()
    return given


def is_text(given: pa.DataType) -> bool:
    """Return whether the type is a kind of string, dictionary-encoded or not."""
    value = given.value_type if pa.types.is_dictionary(given) else given
    return value in (pa.string(), pa.large_string(), pa.string_view())


def agree(shards: Sequence[Shard], footers: Mapping[str, Footer], job_input: Input) -> Agreement:
    """Return the types that most shards have, and the odd shards; InputError when no shard fits."""
    columns = columns_of(job_input)
    seen: dict[tuple[pa.Schema, tuple[str, ...]], str | None] = {}
    faults: dict[str, str] = {}
    for shard in shards:
        layout = (footers[shard.url].schema, tuple(key for key, _ in shard.partitions))
        if layout not in seen:
            seen[layout] = _problem(shard, footers[shard.url].schema, job_input)
        reason = seen[layout] or _too_long(footers[shard.url])
        faults |= {shard.url: reason} if reason else {}
    sound = [shard for shard in shards if shard.url not in faults]
    if shards and not sound:
        raise InputError(f"input: {faults[shards[0].url]} ({shards[0].url})")
    types: dict[str, pa.DataType] = {}
    for name in columns.carried:
        by_shard = {
            shard.url: column_type(name, footers[shard.url].schema, shard.partitions)
            for shard in sound
        }
        types[name] = Counter(by_shard.values()).most_common(1)[0][0]
        faults |= {
            url: f"column {name!r} is {kind}, and {types[name]} in most shards"
            for url, kind in by_shard.items()
            if kind != types[name]
        }
    return Agreement(types, faults)


def column_type(
    name: str, schema: pa.Schema, partitions: Sequence[tuple[str, str | None]]
) -> pa.DataType | None:
    """Return the plain type of a column, from file or directories; None if it is missing."""
    places = schema.get_all_field_indices(name)
    if len(places) == 1:
        return plain_type(schema.field(places[0]).type)
    return pa.large_string() if not places and name in dict(partitions) else None


def _problem(shard: Shard, schema: pa.Schema, job_input: Input) -> str | None:
    columns = columns_of(job_input)
    types = {name: column_type(name, schema, shard.partitions) for name in columns.needed}
    for name, kind in types.items():
        if kind is None:
            return _missing(name, schema, [key for key, _ in shard.partitions])
    for name in columns.text:
        if types[name] != pa.large_string():
            return (
                f"column {name!r} is {types[name]}; text must be string, large_string,"
                " string_view or a dictionary of them"
            )
    if job_input.filter is None:
        return None
    try:
        filter_rows(pa.schema(list(types.items())).empty_table(), job_input.filter)
    except pa.ArrowException as error:
        described = ", ".join(f"{name}: {types[name]}" for name in columns.filter)
        return f"filter: a value does not fit its column ({described}): {error}"
    return None


def _missing(name: str, schema: pa.Schema, partitions: Sequence[str]) -> str:
    if name in schema.names:
        return f"two columns are named {name!r}; rename one"
    return f"no column {name!r}; there are: {', '.join([*schema.names, *partitions]) or 'none'}"


def _too_long(footer: Footer) -> str | None:
    if footer.rows < MAX_ROWS:
        return None
    return f"got {footer.rows} rows; allowed are at most {MAX_ROWS - 1} in one shard; split it"
