"""Shards and chunks: which rows of which file form one unit of work."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa

from embedjob.storage.objects import Stored

# A row group up to this many times chunk_rows is one chunk: decoding it twice costs more.
WHOLE_GROUP_FACTOR = 8
# And up to this much text, of which READ and TOKENIZE take about ten times as much memory. A border
# is part of a file's name: another number here would have outputs made again.
MAX_TEXT_BYTES = 512 * 2**20
# Ray's three tasks for a chunk cost more than so little work: what is small together shares them.
# No more than this, since all of it is made again where a process dies.
PARCEL_CHUNKS, PARCEL_ROWS, PARCEL_TEXT_BYTES = 32, 512, 256 * 2**10
# How a reason begins that cannot be given for a damaged shard.
WHOLE_BUT = "whole, but it"


@dataclass(frozen=True, slots=True)
class TableColumn:
    """A column as a table has it, and where its files have it.

    `names` are all names that it has in files. In a file whose columns have ids it is the one with
    `id`, in others one of `mapped`. Rows that were written before it have `default`, or null.
    """

    name: str
    type: pa.DataType
    names: tuple[str, ...]
    mapped: tuple[str, ...]
    id: int | None = None
    default: pa.Scalar | None = None


@dataclass(frozen=True, slots=True)
class TableShard:
    """What a table says of one of its files: the needed columns, and values it need not hold."""

    columns: tuple[TableColumn, ...]
    constants: tuple[tuple[str, pa.Scalar], ...] = ()


@dataclass(frozen=True, slots=True)
class Shard:
    """One input file as it was listed; `partitions` come from `key=value` directories.

    `url` is UTF-8, as everything that names the shard in an output; `raw` opens a local file whose
    name is not. `modified` is when it was last written, in seconds since 1970, or 0. `table` is
    there for a file of a table.
    """

    url: str
    size: int
    etag: str
    partitions: tuple[tuple[str, str | None], ...] = ()
    raw: str | None = None
    modified: float = field(default=0.0, compare=False)
    table: TableShard | None = None

    @property
    def stored(self) -> Stored:
        """Return the stored object to read, bound to the planned etag."""
        return Stored(url=self.raw or self.url, size=self.size, etag=self.etag)


def printable(url: str) -> str:
    """Return the url as UTF-8: a local file's name may hold bytes that are not."""
    return url.encode("utf-8", "backslashreplace").decode()


class RowRange(NamedTuple):
    """Rows [start, stop), inside row groups [first_group, stop_group) that begin at first_row."""

    start: int
    stop: int
    first_group: int
    stop_group: int
    first_row: int


@dataclass(frozen=True, slots=True)
class LineRange:
    """Bytes [begin, end) of a shard of JSON Lines, all if it is compressed, and its columns."""

    begin: int
    end: int
    schema: pa.Schema


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows [start, stop) of a shard; `name` is the file name of their embeddings.

    `generation` is the epoch of the run that makes them again; 0 the first time. `lines` says where
    they are in a shard of JSON Lines. `deleted` are rows that the shard's table has no more, as
    bytes of 32-bit numbers.
    """

    shard: Shard
    start: int
    stop: int
    groups: tuple[int, int]
    first_row: int
    name: str
    text_bytes: int
    footer_bytes: int
    generation: int = 0
    lines: LineRange | None = None
    deleted: bytes = b""

    @property
    def key(self) -> str:
        """Return a key that differs from that of every other chunk, of any version of any shard."""
        return self.name

    @property
    def rows(self) -> int:
        """Return the number of rows to read."""
        return self.stop - self.start


def ranges(
    group_rows: Sequence[int], group_text_bytes: Sequence[int], *, chunk_rows: int
) -> list[RowRange]:
    """Divide row groups into chunks that cover every row once, in order; none without rows.

    A row group with too many rows, or too much text, for one chunk is cut into pieces of equal rows
    that belong to no other group.
    """
    chunks: list[RowRange] = []
    row = 0
    joined: RowRange | None = None
    joined_bytes = 0
    for group, (rows, size) in enumerate(zip(group_rows, group_text_bytes, strict=True)):
        step = _step(rows, size, chunk_rows)
        fits = joined and row + rows - joined.start <= chunk_rows
        if step < rows:
            chunks += [joined] if joined else []
            chunks += _pieces(group, row, rows, step)
            joined = None
        elif joined and fits and joined_bytes + size <= MAX_TEXT_BYTES:
            joined = joined._replace(stop=row + rows, stop_group=group + 1)
            joined_bytes += size
        elif rows:
            chunks += [joined] if joined else []
            joined, joined_bytes = RowRange(row, row + rows, group, group + 1, row), size
        row += rows
    return chunks + ([joined] if joined else [])


def _step(rows: int, size: int, chunk_rows: int) -> int:
    """Return how many rows of a row group go into one chunk: all, unless they are too many."""
    step = chunk_rows if rows > WHOLE_GROUP_FACTOR * chunk_rows else rows
    return min(step, max(1, rows * MAX_TEXT_BYTES // size)) if size > MAX_TEXT_BYTES else step


def _pieces(group: int, first_row: int, rows: int, step: int) -> Iterator[RowRange]:
    end = first_row + rows
    for start in range(first_row, end, step):
        yield RowRange(start, min(start + step, end), group, group + 1, first_row)


def newest_first(chunks: Iterable[Chunk]) -> list[Chunk]:
    """Return the chunks by when their shards were last written, the latest first.

    Those of one shard stay together, in the order of their rows.
    """
    return sorted(chunks, key=lambda chunk: (-chunk.shard.modified, chunk.shard.url, chunk.start))


def passes(chunks: Iterable[Chunk]) -> list[tuple[Chunk, ...]]:
    """Return the chunks by the pass in which they are read: the pieces of a row group are one.

    To read a piece is to decode what lies before it. A pass is where its first chunk was, and its
    pieces are in the order of their rows.
    """
    together: dict[tuple[str, int], list[Chunk]] = {}
    for chunk in chunks:
        # A chunk that is no piece is the only one that begins with its first group.
        together.setdefault((chunk.shard.url, chunk.groups[0]), []).append(chunk)
    return [tuple(sorted(pieces, key=lambda piece: piece.start)) for pieces in together.values()]


def parcels(groups: Iterable[Sequence[Chunk]], *, most: int) -> list[tuple[Chunk, ...]]:
    """Return the groups of chunks, each joined with those before it while all are small together.

    A parcel of several groups has at most `most` chunks, PARCEL_ROWS and PARCEL_TEXT_BYTES.
    """
    made: list[list[Chunk]] = []
    rows = text = 0
    for group in groups:
        more_rows, more_bytes = sum(chunk.rows for chunk in group), text_of(group)
        fits = made and len(made[-1]) + len(group) <= most
        if fits and rows + more_rows <= PARCEL_ROWS and text + more_bytes <= PARCEL_TEXT_BYTES:
            made[-1] += group
            rows, text = rows + more_rows, text + more_bytes
        else:
            made.append([*group])
            rows, text = more_rows, more_bytes
    return [tuple(chunks) for chunks in made]


def text_of(chunks: Iterable[Chunk]) -> int:
    """Return the bytes of text that the chunks have together."""
    return sum(chunk.text_bytes for chunk in chunks)
