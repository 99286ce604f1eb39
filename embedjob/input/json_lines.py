"""JSON Lines: rows of files that have an object in each line, read by byte ranges found once.

Python's own parser reads them. Arrow's ends its process at a line `null` (pyarrow 26), makes times
of texts that look like them, and rounds whole numbers of more than 53 bits.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, islice
from typing import Any, BinaryIO

import pyarrow as pa

from embedjob.errors import InputChangedError, in_one_line
from embedjob.input.chunks import Chunk, LineRange, RowRange, Shard
from embedjob.input.footers import Footer, Wanted
from embedjob.input.json_types import (
    JsonKind,
    arrow_type,
    fraction_of,
    has_nulls_alone,
    has_whole_numbers,
    joined_kind,
    kind_of,
    without_empty,
)
from embedjob.storage.objects import Stored, open_unchanged
from embedjob.storage.retrying import is_passing, retried

# A folder gives files of the first names; `.json` may be anything, and counts where it is named.
_NAMES = (".jsonl", ".ndjson")
_NAMED = (*_NAMES, ".json")
_CODECS: Mapping[str, str] = {".gz": "gzip", ".zst": "zstd"}
# Where one of the two is reached, a block of lines ends, which is what a row group is to Parquet.
# A border is part of a file's name: other numbers here would have outputs made again.
_BLOCK_ROWS, _BLOCK_BYTES = 1000, 4 * 2**20
_READ_BYTES = 4 * 2**20
_TABLE_ROWS = 8192
_MAX_LINE_BYTES = 2**30
_MAX_NAMES = 30
_BOM = b"\xef\xbb\xbf"
_DECODER = json.JSONDecoder(parse_float=fraction_of)


class _LineError(ValueError):
    """A line cannot be read, or does not fit those before it."""


def is_json_lines(url: str, *, named: bool = True) -> bool:
    """Return whether a file's name says that it is JSON Lines; `named` by its user, or in a folder.

    A `.json` that nobody named is a document of some tool; a compressed one is a corpus.
    """
    stem, codec = _split(url.lower())
    return stem.endswith(_NAMED if named or codec else _NAMES)


def _split(url: str) -> tuple[str, str | None]:
    """Return a name without the ending that says how it is compressed, and the codec."""
    for ending, codec in _CODECS.items():
        if url.endswith(ending):
            return url.removesuffix(ending), codec
    return url, None


def scan_lines(file: Stored, wanted: Wanted) -> Footer | str:
    """Read a file once; return its blocks of lines as a footer has row groups, or what is wrong.

    The blocks' bytes of text are their bytes in the file, where it is not compressed. A compressed
    file is one block: to read a part of it is to read all that lies before it.
    """
    try:
        with open_unchanged(file) as source:
            return _scanned(file, source, wanted)
    except _LineError as error:
        return f"not JSON Lines: {error}"
    except (InputChangedError, FileNotFoundError) as error:
        return f"changed after it was listed: {error}"
    except (pa.ArrowException, OSError) as error:
        if _split(file.url.lower())[1] is None or is_passing(error):
            raise
        return f"not whole: {in_one_line(error)}"


def _scanned(file: Stored, source: BinaryIO, wanted: Wanted) -> Footer:
    codec = _split(file.url.lower())[1]
    if codec and not file.size:
        raise _LineError("empty, which no compressed file is: was its upload cut short?")
    columns = _Columns(wanted)
    blocks: list[tuple[int, int]] = []
    rows = size = 0
    for number, line in enumerate(_lines(_Patient(source, file.url), codec), start=1):
        size += len(line)
        if (found := _object(line, number)) is not None:
            columns.add(found, number)
            rows += 1
        if not codec and (rows >= _BLOCK_ROWS or size >= _BLOCK_BYTES):
            blocks.append((rows, size))
            rows = size = 0
    if size:
        blocks.append((rows, size))
    schema, fine = columns.schemas()
    return Footer(tuple(r for r, _ in blocks), tuple(s for _, s in blocks), schema, 0, fine)


class _Columns:
    """The kinds of values seen in each wanted column, and names of other columns."""

    def __init__(self, wanted: Wanted) -> None:
        self._text = frozenset(wanted.text)
        self._kinds: dict[str, JsonKind] = {}
        self._needed = wanted.needed
        self._others: dict[str, None] = {}
        self._empty = True

    def add(self, row: Mapping[str, Any], number: int) -> None:
        """Take a line's values; _LineError where one does not fit those before it."""
        self._empty = False
        for name in self._needed:
            if name not in row:
                continue
            value, before = row[name], self._kinds.get(name, "null")
            try:
                kind = kind_of(value, any_text=name in self._text)
                if kind != before:
                    self._kinds[name] = joined_kind(before, kind)
                else:
                    self._kinds.setdefault(name, kind)
            except ValueError as error:
                raise _LineError(f"line {number}, column {name!r}: {error}") from error
            except RecursionError as error:
                raise _LineError(f"line {number} is nested too deeply") from error
        if len(self._others) < _MAX_NAMES:
            self._others |= dict.fromkeys(row.keys() - self._others.keys())

    def schemas(self) -> tuple[pa.Schema, pa.Schema | None]:
        """Return the columns' types, and those with whole numbers as fractions where exact.

        Where a wanted column is missing, some names of others are there, for the message. A file
        without a row, as those who write in parallel leave them, has every column.
        """
        if self._empty:
            return pa.schema([(name, pa.null()) for name in self._needed]), None
        fields = [(name, self._kinds[name]) for name in self._needed if name in self._kinds]
        schema = pa.schema([(name, arrow_type(kind)) for name, kind in fields])
        if len(fields) < len(self._needed):
            shown = (name.encode(errors="backslashreplace").decode() for name in self._others)
            others = sorted({*shown} - {*self._kinds})
            schema = pa.schema([*schema, *(pa.field(name, pa.null()) for name in others)])
        if not any(has_whole_numbers(kind) for _, kind in fields):
            return schema, None
        types = {name: arrow_type(kind, fractions=True) for name, kind in fields}
        fine = [field.with_type(types.get(field.name, field.type)) for field in schema]
        return schema, pa.schema(fine)


def line_ranges(
    shard: Shard, footer: Footer, parts: Sequence[RowRange]
) -> Sequence[LineRange | None]:
    """Return for each part of a shard the bytes of its blocks; None for another kind of shard."""
    if not is_json_lines(shard.url):
        return [None] * len(parts)
    if _split(shard.url.lower())[1]:
        return [LineRange(0, shard.size, footer.schema)] * len(parts)
    borders = [0, *accumulate(footer.group_text_bytes)]
    return [
        LineRange(borders[part.first_group], borders[part.stop_group], footer.schema)
        for part in parts
    ]


def line_tables(
    source: BinaryIO, chunks: Sequence[Chunk], names: Sequence[str]
) -> Iterator[pa.Table]:
    """Yield the columns `names` of each chunk's rows. The chunks are of one pass, in order.

    pa.ArrowInvalid where the lines are not those that planning has seen.
    """
    lines = chunks[0].lines
    assert lines is not None
    schema = pa.schema([lines.schema.field(name) for name in names])
    codec = _split(chunks[0].shard.url.lower())[1]
    source.seek(lines.begin)
    every = _lines(source, codec, None if codec else lines.end - lines.begin)
    rows = (line for line in every if not _is_blank(line))
    at = chunks[0].first_row
    for chunk in chunks:
        at += sum(1 for _ in islice(rows, chunk.start - at))
        parts = [schema.empty_table()]
        while some := [*islice(rows, min(_TABLE_ROWS, chunk.stop - at))]:
            at += len(some)
            parts.append(_table(some, schema))
        if at < chunk.stop:
            raise pa.ArrowInvalid(f"the lines end after {at} rows; {chunk.stop} were planned")
        yield pa.concat_tables(parts)


def _table(lines: Sequence[bytes], schema: pa.Schema) -> pa.Table:
    try:
        rows = [_parsed(line) for line in lines]
        columns = [_array([row.get(field.name) for row in rows], field.type) for field in schema]
    except (ValueError, TypeError, RecursionError) as error:
        raise pa.ArrowInvalid(in_one_line(error)) from error
    return pa.table(columns, schema=schema)


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    if has_nulls_alone(kind):
        values = [without_empty(value, kind) for value in values]
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:  # bytes that are not UTF-8, and halves of characters: a bad row
        raw = pa.array([value if value is None else _bytes(value) for value in values])
        return pa.Array.from_buffers(kind, len(raw), raw.cast(pa.large_binary()).buffers())


def _bytes(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def _object(line: bytes, number: int) -> dict[str, Any] | None:
    """Return the object in a line, None for a blank line; _LineError where it has none."""
    if _is_blank(line):
        return None
    try:
        return _parsed(line)
    except RecursionError as error:
        raise _LineError(f"line {number} is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise _LineError(f"line {number}: {error.msg} at character {error.pos + 1}") from error
    except ValueError as error:
        raise _LineError(f"line {number}: {error}") from error


def _is_blank(line: bytes) -> bool:
    """Return whether a line has nothing in it but blanks, and a mark of the order of bytes."""
    return not line.strip() or not line.removeprefix(_BOM).strip()


def _parsed(line: bytes) -> dict[str, Any]:
    found = _DECODER.decode(line.decode("utf-8-sig", "surrogateescape"))
    if isinstance(found, dict):
        return found
    raise ValueError(
        f"got {_KINDS_OF[type(found)]}; allowed is one object, a row, in each line; `jq -c '.[]'`"
        " turns a list of objects into such lines"
    )


_KINDS_OF: Mapping[type, str] = {
    list: "a list",
    str: "a text",
    int: "a number",
    float: "a number",
    bool: "a truth value",
    type(None): "null",
}


def _lines(source: Any, codec: str | None, length: int | None = None) -> Iterator[bytes]:
    """Yield the lines from here on, each with its end, of so many bytes at most.

    _LineError where a line is too long.
    """
    if codec:
        buffered = pa.BufferedInputStream(pa.PythonFile(source, mode="r"), _READ_BYTES)
        source = pa.CompressedInputStream(buffered, codec)
    begun: list[bytes] = []
    size = 0
    left = length
    while block := source.read(_READ_BYTES if left is None else min(_READ_BYTES, left)):
        left = None if left is None else left - len(block)
        *ended, rest = block.split(b"\n")
        for part in ended:
            yield b"".join([*begun, part, b"\n"])
            begun, size = [], 0
        begun.append(rest)
        size += len(rest)
        if size > _MAX_LINE_BYTES:
            raise _LineError(f"a line has more than {_MAX_LINE_BYTES} bytes")
    if size:
        yield b"".join(begun)


class _Patient:
    """A file whose reads are repeated one by one, as scanning all of it may take long."""

    closed = False

    def __init__(self, source: BinaryIO, url: str) -> None:
        self._source = source
        self._url = url
        self._at = 0

    def read(self, length: int = -1) -> bytes:
        """Return the next bytes."""
        data = retried(partial(self._read, length), what=self._url)
        self._at += len(data)
        return data

    def _read(self, length: int) -> bytes:
        self._source.seek(self._at)
        return self._source.read(length)

    def tell(self) -> int:
        """Return how many bytes were read."""
        return self._at

    def close(self) -> None:
        """Leave the file open: who opened it closes it."""
