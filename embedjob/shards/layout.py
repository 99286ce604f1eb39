"""From `input.path` to shards: which of the listed files are input, and their partitions."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from urllib.parse import unquote

from embedjob.errors import InputError
from embedjob.shards.chunks import Shard
from embedjob.storage import Stored, find

PARQUET_NAMES = (".parquet", ".pq", ".parq")
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


def find_shards(path: str | Sequence[str]) -> tuple[Shard, ...]:
    """The shards that one or several patterns name, each once, by url; InputError when none."""
    patterns = (path,) if isinstance(path, str) else tuple(path)
    listed = {pattern: find(pattern) for pattern in patterns}
    for pattern, files in listed.items():
        if not parquet_files(pattern, files):
            raise InputError(
                f"input.path: no Parquet file at {pattern} ({len(files)} files listed); looked"
                f" for that file, for {', '.join(PARQUET_NAMES)} below that directory, and for"
                " whatever a glob names; hidden and _files are left out"
            )
    return shards_of(listed)


def shards_of(listed: dict[str, list[Stored]]) -> tuple[Shard, ...]:
    """The shards among the files that were listed for each pattern."""
    files = {
        file.url: file
        for pattern, found in listed.items()
        for file in parquet_files(pattern, found)
    }
    return tuple(
        Shard(file.url, file.size, file.etag, partitions(file.url))
        for _, file in sorted(files.items())
    )


def parquet_files(pattern: str, files: list[Stored]) -> list[Stored]:
    """The files that are input: those the pattern names itself, and *.parquet of directories."""
    base = pattern.rstrip("/").rsplit("/", 1)[-1]
    return [
        file
        for file in files
        if file.url.lower().endswith(PARQUET_NAMES) or _is_named(base, file.name)
    ]


def _is_named(base: str, name: str) -> bool:
    """Whether the end of a pattern means this file, and not merely whatever lies there."""
    return base == name or (bool(base.strip("*")) and fnmatchcase(name, base))


def partitions(url: str) -> tuple[tuple[str, str | None], ...]:
    """The `key=value` directories above a file, decoded; the last of two equal keys wins."""
    found: dict[str, str | None] = {}
    for directory in url.split("/")[:-1]:
        key, sign, value = directory.partition("=")
        if sign and key:
            found[unquote(key)] = None if value == _HIVE_NULL else unquote(value)
    return tuple(found.items())
