"""Shard listing: find the Parquet files of an input, and read their footers."""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from embedjob.errors import InputChangedError, InputError
from embedjob.input.chunks import Shard
from embedjob.storage.objects import Stored, find, read_tail

PARQUET_NAMES = (".parquet", ".pq", ".parq")
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
FIRST_READ = 64 * 1024
_MAGIC = b"PAR1"
_ENDING = 8  # the footer's length, then the magic


def find_shards(path: str | Sequence[str]) -> tuple[Shard, ...]:
    """Return the shards that the patterns name, each once, by url; InputError without any."""
    patterns = (path,) if isinstance(path, str) else tuple(path)
    listed = {pattern: find(pattern) for pattern in patterns}
    for pattern, files in listed.items():
        if not parquet_files(pattern, files):
            raise InputError(
                f"input.path: no Parquet file at {pattern} ({len(files)} files listed); looked"
                f" for that file, for files that match it as a glob, and for"
                f" {', '.join(PARQUET_NAMES)} files below that directory; names that begin with"
                " . or _ are left out"
            )
    return shards_of(listed)


def shards_of(listed: dict[str, list[Stored]]) -> tuple[Shard, ...]:
    """Return the shards among the files that were listed for each pattern."""
    files = {
        file.url: file
        for pattern, candidates in listed.items()
        for file in parquet_files(pattern, candidates)
    }
    return tuple(
        Shard(file.url, file.size, file.etag, partitions(file.url))
        for _, file in sorted(files.items())
    )


def parquet_files(pattern: str, files: list[Stored]) -> list[Stored]:
    """Return the input files: those the pattern names, and the Parquet files of directories."""
    base = pattern.rstrip("/").rsplit("/", 1)[-1]
    return [
        file
        for file in files
        if file.url.lower().endswith(PARQUET_NAMES) or _is_named(base, file.name)
    ]


def _is_named(base: str, name: str) -> bool:
    """Return whether the end of a pattern names this file, and is not a bare wildcard."""
    return base == name or (bool(base.strip("*")) and fnmatchcase(name, base))


def partitions(url: str) -> tuple[tuple[str, str | None], ...]:
    """Return the `key=value` directories above a file, decoded; the last of two equal keys wins."""
    values: dict[str, str | None] = {}
    for directory in url.split("/")[:-1]:
        key, sign, value = directory.partition("=")
        if sign and key:
            values[unquote(key)] = None if value == _HIVE_NULL else unquote(value)
    return tuple(values.items())


@dataclass(frozen=True)
class Footer:
    """Rows and decompressed bytes of text by row group, columns, and the footer's length."""

    group_rows: tuple[int, ...]
    group_text_bytes: tuple[int, ...]
    schema: pa.Schema
    length: int

    @property
    def rows(self) -> int:
        """Return the number of rows in the shard."""
        return sum(self.group_rows)


def read_footers(
    files: Sequence[Stored], *, text: Sequence[str], threads: int = 32
) -> dict[str, Footer | str]:
    """Read the footers of many files; return by url the footer, or why it cannot be used.

    `text` names the columns whose bytes are summed.
    """
    read = functools.partial(read_footer, text=text)
    with ThreadPoolExecutor(max_workers=threads) as pool:
        return dict(zip((file.url for file in files), pool.map(read, files), strict=True))


def read_footer(file: Stored, *, text: Sequence[str]) -> Footer | str:
    """Return the footer of a shard, or what is wrong with the shard."""
    try:
        metadata, length = read_metadata(file, length=FIRST_READ)
        schema = metadata.schema.to_arrow_schema().remove_metadata()
    except pa.ArrowException as error:
        return f"not a whole Parquet file: {error}"
    except (InputChangedError, FileNotFoundError) as error:
        return f"changed after it was listed: {error}"
    groups = range(metadata.num_row_groups)
    return Footer(
        group_rows=tuple(metadata.row_group(group).num_rows for group in groups),
        group_text_bytes=_column_bytes(metadata, text),
        schema=schema,
        length=length,
    )


def read_metadata(file: Stored, *, length: int) -> tuple[pq.FileMetaData, int]:
    """Return the footer and its length in bytes, reading `length` bytes first and more if needed.

    pa.ArrowInvalid where the file does not end in a whole footer.
    """
    tail = read_tail(file, min(length, file.size))
    if len(tail) < _ENDING + len(_MAGIC) or not tail.endswith(_MAGIC):
        raise pa.ArrowInvalid(f"its {file.size} bytes do not end in PAR1; cut short?")
    needed = int.from_bytes(tail[-_ENDING : -len(_MAGIC)], "little") + _ENDING
    if needed + len(_MAGIC) > file.size:
        raise pa.ArrowInvalid(f"its footer claims {needed} bytes of {file.size}")
    if needed > len(tail):
        tail = read_tail(file, needed)
    try:
        return pq.read_metadata(pa.BufferReader(tail)), needed
    except OSError as error:  # what Arrow raises for a footer that cannot be decoded
        raise pa.ArrowInvalid(str(error)) from error


def _column_bytes(metadata: pq.FileMetaData, columns: Sequence[str]) -> tuple[int, ...]:
    wanted = [
        index
        for index in range(metadata.num_columns)
        if metadata.schema.column(index).path.split(".")[0] in columns
    ]
    return tuple(
        sum(metadata.row_group(group).column(index).total_uncompressed_size for index in wanted)
        for group in range(metadata.num_row_groups)
    )
