"""Columns: which of them a job reads, and which shards can give them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from embedjob.config.job import Input, ReadInput
from embedjob.errors import InputError
from embedjob.input.chunks import Shard
from embedjob.input.column_types import (
    TEXT,
    agreed_type,
    fits,
    in_nanoseconds,
    is_text,
    plain_type,
)
from embedjob.input.filtering import filter_columns, misfit
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
    headings: tuple[str, ...] = ()

    @property
    def carried(self) -> tuple[str, ...]:
        """Return the columns whose values reach the output; their types must agree."""
        return tuple(dict.fromkeys([*([self.id] if self.id else []), *self.keep]))

    @property
    def wanted(self) -> Wanted:
        """Return what footers are asked of these columns."""
        text = tuple(dict.fromkeys([*self.text, *self.headings]))
        return Wanted(text=text, needed=self.needed, filter=self.filter)

    @property
    def needed(self) -> tuple[str, ...]:
        """Return every column to read, once."""
        return tuple(dict.fromkeys([*self.text, *self.headings, *self.carried, *self.filter]))


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
        headings=job_input.headings if isinstance(job_input, ReadInput) else (),
    )


@dataclass(frozen=True)
class Standing:
    """The column types of an output's files, which stay when shards are added later.

    `types` are exact. Earlier releases kept only their names, by column: `names`.
    """

    types: Mapping[str, pa.DataType] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)


def agree(
    shards: Sequence[Shard],
    footers: Mapping[str, Footer],
    job_input: Input,
    standing: Standing | None = None,
) -> Agreement:
    """Return the types of the carried columns, and the shards that do not fit them.

    They are those of the output, if it has any yet, and else those that most shards have.

    Raises:
        InputError: no shard fits.
    """
    columns = columns_of(job_input)
    seen: dict[tuple[pa.Schema, tuple[str, ...]], str | None] = {}
    faults: dict[str, str] = {}
    for shard in shards:
        layout = (footers[shard.url].schema, tuple(key for key, _ in shard.partitions))
        if layout not in seen:
            seen[layout] = _problem(shard, footers[shard.url].schema, job_input)
        reason = seen[layout] or _too_long(footers[shard.url])
        faults |= {shard.url: reason} if reason else {}
    types: dict[str, pa.DataType] = {}
    standing = standing or Standing()
    sound = [shard for shard in shards if shard.url not in faults]
    for name in columns.carried if sound else ():
        kinds = {
            shard.url: _types_in(name, footers[shard.url], shard.partitions) for shard in sound
        }
        stands = _standing_type(name, [first for first, *_ in kinds.values()], standing)
        types[name] = _agreed([*kinds.values()]) if stands is None else stands
        before = stands is not None and name not in standing.types
        where = "most shards" if stands is None else "the files of this output, which stay"
        faults |= {
            url: f"column {name!r} is {given[0]}, and {types[name]} in {where}"
            for url, given in kinds.items()
            if not (_fit(given, types[name]) or (before and _fitted_before(given[0], types[name])))
        }
    if shards and len(faults) == len(shards):
        raise InputError(f"input: {faults[shards[0].url]} ({shards[0].url})")
    return Agreement(types, faults)


def _standing_type(
    name: str, kinds: Iterable[pa.DataType], standing: Standing
) -> pa.DataType | None:
    """Return the type that a column has in the output's files; None where nothing says so."""
    if name in standing.types or name not in standing.names:
        return standing.types.get(name)
    for kind in dict.fromkeys(kinds):
        plain = plain_type(kind)
        spellings = (plain, agreed_type([kind]), kind, _before(kind), in_nanoseconds(plain))
        for spelled in spellings:
            if str(spelled) == standing.names[name]:
                return spelled
    return None


def _agreed(kinds: Sequence[Sequence[pa.DataType]]) -> pa.DataType:
    """Return the type that most columns fit, each in the first or the last of its types."""
    usual = agreed_type([first for first, *_ in kinds])
    if all(len(given) == 1 for given in kinds):
        return usual
    other = agreed_type([last for *_, last in kinds])
    return max(usual, other, key=lambda kind: sum(_fit(given, kind) for given in kinds))


def _fit(kinds: Sequence[pa.DataType], agreed: pa.DataType) -> bool:
    return any(fits(kind, agreed) for kind in kinds)


def _before(kind: pa.DataType) -> pa.DataType:
    """Return the type as earlier releases had it: plain only where it is not nested."""
    return kind if pa.types.is_nested(kind) else plain_type(kind)


def _fitted_before(kind: pa.DataType, stands: pa.DataType) -> bool:
    """Return whether earlier releases had the column so: they read int96 as nanoseconds."""
    return fits(in_nanoseconds(plain_type(kind)), stands)


def _types_in(
    name: str, footer: Footer, partitions: Sequence[tuple[str, str | None]]
) -> list[pa.DataType]:
    """Return the types in which a shard's values of a column are exact, the usual one first."""
    schemas = [one for one in (footer.schema, footer.fine_schema) if one is not None]
    return [*dict.fromkeys(_type_in(name, schema, partitions) for schema in schemas)]


def _type_in(
    name: str, schema: pa.Schema, partitions: Sequence[tuple[str, str | None]]
) -> pa.DataType | None:
    """Return the type of a column, from file or directories; None if it is missing."""
    places = schema.get_all_field_indices(name)
    if len(places) == 1:
        return schema.field(places[0]).type
    return TEXT if not places and name in dict(partitions) else None


def _problem(shard: Shard, schema: pa.Schema, job_input: Input) -> str | None:
    columns = columns_of(job_input)
    types = {name: _type_in(name, schema, shard.partitions) for name in columns.needed}
    for name, kind in types.items():
        if kind is None:
            return _missing(name, schema, [key for key, _ in shard.partitions])
    for name in (*columns.text, *columns.headings):
        if not is_text(types[name]):
            return (
                f"column {name!r} is {types[name]}; text must be string, large_string,"
                " string_view or a dictionary of them"
            )
    if job_input.filter is None:
        return None
    return misfit(job_input.filter, {name: plain_type(types[name]) for name in columns.filter})


def _missing(name: str, schema: pa.Schema, partitions: Sequence[str]) -> str:
    if name in schema.names:
        return f"two columns are named {name!r}; rename one"
    return f"no column {name!r}; there are: {', '.join([*schema.names, *partitions]) or 'none'}"


def _too_long(footer: Footer) -> str | None:
    if footer.rows < MAX_ROWS:
        return None
    return f"got {footer.rows} rows; allowed are at most {MAX_ROWS - 1} in one shard; split it"
