"""Footers: what a Parquet file says of its rows and columns, decoded, and checked for sense.

Arrow ends the process on some damaged and on all encrypted footers, and no `except` helps. So a
driver decodes by `embedjob.input.decoders`, in a process that may die; there, every column that the
job needs is looked up once, so that whoever decodes the same bytes later is safe.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from embedjob.errors import in_one_line
from embedjob.input.chunks import WHOLE_BUT
from embedjob.input.int96 import belongs, read_schema, stored_unit

MAGIC = b"PAR1"
_ENCRYPTED = b"PARE"
ENDING = 8  # the footer's length, then the magic
# A damaged length must not have hundreds of megabytes read; real footers have a few at most.
MAX_LENGTH = 128 * 2**20
# Above what any encoder or codec reaches on real data: a million equal rows take some 60 bytes,
# and zstd's densest block is 4 bytes for 128 KiB.
_MAX_ROWS_PER_BYTE = 2**16
_MAX_EXPANSION = 2**15
_UNREADABLE = "LZO"  # of the codecs that Parquet has

Bounds = Mapping[str, tuple[Any, Any]]
# The last bytes of a file, its footer at least, and the size of the whole file.
Tail = tuple[bytes, int]


class Wanted(NamedTuple):
    """The columns whose text is measured, all columns that are read, and the filtered ones.

    A column that is not among them is not looked at, however damaged.
    """

    text: tuple[str, ...]
    needed: tuple[str, ...]
    filter: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Footer:
    """Rows and decompressed bytes of text by row group, columns, and the footer's length.

    `fine_schema` has int96 in nanoseconds, where `schema` has it in microseconds and its values
    are exact in both; None where only one of the two is right. A `Decoder` does not look at values:
    it gives both where the file does not say.
    """

    group_rows: tuple[int, ...]
    group_text_bytes: tuple[int, ...]
    schema: pa.Schema
    length: int
    fine_schema: pa.Schema | None = None

    @property
    def rows(self) -> int:
        """Return the number of rows in the shard."""
        return sum(self.group_rows)


class _Leaf(NamedTuple):
    """A column of values, as Parquet counts them: a nested column has several."""

    place: int
    path: str
    is_text: bool
    is_flat: bool


class _Layout(NamedTuple):
    """The columns of a schema, and where those lie that are wanted."""

    schema: pa.Schema
    fine_schema: pa.Schema | None
    leaves: tuple[_Leaf, ...]


def footer_length(tail: bytes, size: int) -> int:
    """Return the bytes that the footer of a file of `size` bytes takes; ArrowInvalid if it lies."""
    if tail.endswith(_ENCRYPTED):
        raise pa.ArrowInvalid(
            f"{WHOLE_BUT}s footer is encrypted, which is not supported; decrypt the file"
        )
    if len(tail) < ENDING + len(MAGIC) or not tail.endswith(MAGIC):
        raise pa.ArrowInvalid(f"its {size} bytes do not end in PAR1")
    length = int.from_bytes(tail[-ENDING : -len(MAGIC)], "little") + ENDING
    if length + len(MAGIC) > size:
        raise pa.ArrowInvalid(f"its footer claims {length} bytes of {size}")
    if length > MAX_LENGTH:
        raise pa.ArrowInvalid(f"its footer claims {length} bytes; allowed are {MAX_LENGTH}")
    return length


def parse_footer(tail: bytes) -> pq.FileMetaData:
    """Return the metadata in the last bytes of a file; ArrowInvalid where they are no footer."""
    try:
        # No list or string can be longer than the footer: a claim beyond it asks for memory only.
        file = pq.ParquetFile(
            pa.BufferReader(tail),
            thrift_string_size_limit=len(tail),
            thrift_container_size_limit=len(tail),
        )
        return file.metadata
    except OSError as error:  # what Arrow raises for a footer that cannot be decoded
        raise pa.ArrowInvalid(str(error)) from error


class Decoder:
    """Decodes footers, and remembers where the wanted columns lie in each schema that it saw."""

    def __init__(self, wanted: Wanted) -> None:
        """Take the columns to look at."""
        self._wanted = wanted
        self._layouts: dict[tuple[str | None, bytes], _Layout] = {}

    def decode(self, tail: bytes, size: int) -> Footer:
        """Return the footer at the end of a file of `size` bytes; ArrowInvalid where it is damaged.

        Some damage ends the process instead.
        """
        try:
            metadata = parse_footer(tail)
            layout = self._layout(metadata)
            rows, text_bytes = _groups(metadata, size, layout.leaves)
            for group in range(len(rows)) if self._wanted.filter else ():
                group_bounds(metadata, group, self._wanted.filter)
        except UnicodeDecodeError as error:
            raise pa.ArrowInvalid(f"a column's name is not UTF-8 ({error})") from error
        except pa.ArrowInvalid:
            raise
        except (pa.ArrowException, ValueError, ArithmeticError) as error:
            raise pa.ArrowInvalid(in_one_line(error)) from error
        length = footer_length(tail, size)
        return Footer(rows, text_bytes, layout.schema, length, layout.fine_schema)

    def decode_all(self, tails: Sequence[Tail]) -> list[Footer | str]:
        """Return each file's footer, or what is wrong with it."""
        return [self._decoded(*tail) for tail in tails]

    def _decoded(self, tail: bytes, size: int) -> Footer | str:
        try:
            return self.decode(tail, size)
        except pa.ArrowInvalid as error:
            return " ".join(str(error).split())

    def _layout(self, metadata: pq.FileMetaData) -> _Layout:
        needed = self._wanted.needed
        unit = stored_unit(metadata, needed)
        schema = read_schema(metadata, needed, unit or "us").remove_metadata()
        key = (unit, schema.serialize().to_pybytes())
        if key not in self._layouts:
            fine = None
            if unit is None:
                both = zip(schema, read_schema(metadata, needed, "ns"), strict=True)
                fine = _bare(finer if finer.name in needed else field for field, finer in both)
            leaves = _leaves(metadata.schema, self._wanted)
            self._layouts[key] = _Layout(_bare(schema), fine, leaves)
        return self._layouts[key]


def _bare(fields: Iterable[pa.Field]) -> pa.Schema:
    """Return a schema without metadata, which may ask Arrow to make an extension type."""
    return pa.schema([field.remove_metadata() for field in fields])


def group_bounds(metadata: pq.FileMetaData, group: int, columns: Sequence[str]) -> Bounds:
    """Return the lowest and highest value of `columns` in a row group that the footer has."""
    bounds: dict[str, tuple[Any, Any]] = {}
    paths = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
    for column in columns:
        if paths.count(column) != 1:
            continue
        part = metadata.row_group(group).column(paths.index(column))
        if part.is_stats_set and part.statistics.has_min_max:
            bounds |= {column: _decoded(part.statistics)}
    return bounds


def _decoded(statistics: pq.Statistics) -> tuple[Any, Any]:
    try:
        return (statistics.min, statistics.max)
    except (ValueError, ArithmeticError, pa.ArrowException):
        # A bound cut inside a character, text that is not UTF-8, a date that Python has not.
        return (None, None)


def _leaves(schema: pq.ParquetSchema, wanted: Wanted) -> tuple[_Leaf, ...]:
    """Return the columns of values that belong to the wanted columns."""
    found = []
    for index in range(len(schema.names)):
        column = schema.column(index)
        path = column.path
        if any(belongs(path, name) for name in wanted.needed):
            is_text = any(belongs(path, name) for name in wanted.text)
            found.append(_Leaf(index, path, is_text, column.max_repetition_level == 0))
    return tuple(found)


def _groups(
    metadata: pq.FileMetaData, size: int, leaves: Sequence[_Leaf]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return each row group's rows and bytes of text; ArrowInvalid where they make no sense."""
    rows, text_bytes = [], []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        count = group.num_rows
        if not 0 <= count <= size * _MAX_ROWS_PER_BYTE:
            raise pa.ArrowInvalid(f"row group {number} claims {count} rows in {size} bytes")
        parts = [(leaf, group.column(leaf.place)) for leaf in leaves]
        for leaf, part in parts:
            if part.compression == _UNREADABLE:
                raise pa.ArrowInvalid(
                    f"{WHOLE_BUT}s column {leaf.path!r} is compressed by {_UNREADABLE}, which Arrow"
                    " cannot read; write it again with another codec, such as zstd"
                )
            for problem in _problems(part, leaf, count, size):
                raise pa.ArrowInvalid(f"row group {number}, column {leaf.path!r}: {problem}")
        rows.append(count)
        text_bytes.append(sum(part.total_uncompressed_size for leaf, part in parts if leaf.is_text))
    if sum(rows) != metadata.num_rows:
        raise pa.ArrowInvalid(f"claims {metadata.num_rows} rows, and {sum(rows)} in its row groups")
    return tuple(rows), tuple(text_bytes)


def _problems(part: pq.ColumnChunkMetaData, leaf: _Leaf, rows: int, size: int) -> Iterator[str]:
    """Yield what cannot be true of a column in a row group."""
    compressed, whole = part.total_compressed_size, part.total_uncompressed_size
    if not 0 <= compressed <= size:
        yield f"claims {compressed} bytes of a file of {size}"
    if not 0 <= whole <= max(compressed, 1) * _MAX_EXPANSION:
        yield f"claims that {compressed} bytes are {whole} once decompressed"
    # A list may hold any number of values; every other column has one for each row.
    if leaf.is_flat and part.num_values != rows:
        yield f"claims {part.num_values} values for {rows} rows"
