"""Shards and chunks: which rows of which file form one unit of work."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from embedjob.storage.objects import Stored

# A row group up to this many times chunk_rows is one chunk: decoding it twice costs more.
WHOLE_GROUP_FACTOR = 8


@dataclass(frozen=True, slots=True)
class Shard:
    """One input file as it was listed; `partitions` come from `key=value` directories."""

    url: str
    size: int
    etag: str
    partitions: tuple[tuple[str, str | None], ...] = ()

    @property
    def stored(self) -> Stored:
        """Return the stored object to read, bound to the planned etag."""
        return Stored(url=self.url, size=self.size, etag=self.etag)


class RowRange(NamedTuple):
    """Rows [start, stop), inside row groups [first_group, stop_group) that begin at first_row."""

    start: int
    stop: int
    first_group: int
    stop_group: int
    first_row: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows [start, stop) of a shard; `name` is the file name of their embeddings.

    `generation` is the epoch of the run that makes them again; 0 the first time.
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

    @property
    def key(self) -> str:
        """Return a key that differs from that of every other chunk, of any version of any shard."""
        return self.name

    @property
    def rows(self) -> int:
        """Return the number of rows to read."""
        return self.stop - self.start

    @property
    def decoded_rows(self) -> int:
        """Return the number of rows to decode: more than `rows` if a large group is split."""
        return self.stop - self.first_row


def ranges(group_rows: Sequence[int], *, chunk_rows: int) -> list[RowRange]:
    """Divide row groups into chunks that cover every row once, in order; none without rows."""
    chunks: list[RowRange] = []
    row = 0
    joined: RowRange | None = None
    for group, rows in enumerate(group_rows):
        if rows > WHOLE_GROUP_FACTOR * chunk_rows:
            chunks += [joined] if joined else []
            chunks += _pieces(group, row, rows, chunk_rows)
            joined = None
        elif joined and row + rows - joined.start <= chunk_rows:
            joined = joined._replace(stop=row + rows, stop_group=group + 1)
        elif rows:
            chunks += [joined] if joined else []
            joined = RowRange(row, row + rows, group, group + 1, row)
        row += rows
    return chunks + ([joined] if joined else [])


def _pieces(group: int, first_row: int, rows: int, chunk_rows: int) -> Iterator[RowRange]:
    end = first_row + rows
    for start in range(first_row, end, chunk_rows):
        yield RowRange(start, min(start + chunk_rows, end), group, group + 1, first_row)
