"""Shard listing: find the Parquet files of an input, and read their footers."""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from embedjob.errors import InputChangedError, InputError
from embedjob.input.chunks import Shard
from embedjob.input.decoders import Decode, decoders
from embedjob.input.footers import Footer, Tail, Wanted, footer_length, parse
from embedjob.storage.objects import Stored, absolute, covers, find, read_tail

PARQUET_NAMES = (".parquet", ".pq", ".parq")
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
FIRST_READ = 64 * 1024
_BATCH = 16  # footers that go to a process together
_DAMAGED = "not a whole Parquet file"


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


def check_apart(path: str | Sequence[str], out: str, shards: Sequence[Shard] = ()) -> None:
    """Raise InputError where input and output overlap: embeddings would be embedded.

    Args:
        path: the input's patterns.
        out: the output.
        shards: the shards that the patterns list now.
    """
    folder = absolute(out).rstrip("/") + "/"
    inside = next((shard.url for shard in shards if shard.url.startswith(folder)), None)
    patterns = (path,) if isinstance(path, str) else tuple(path)
    around = next((one for one in patterns if covers(one, f"{folder}data/x.parquet")), None)
    if inside or around:
        what = f"{inside} lies in it" if inside else f"it lies in input.path {around}"
        raise InputError(
            f"output.path: got {out}, but {what}, and its files would be embedded every night;"
            " give input and output folders of their own"
        )


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


def read_footers(
    files: Sequence[Stored], wanted: Wanted, *, threads: int = 32
) -> dict[str, Footer | str]:
    """Read the footers of many files; return by url the footer, or why it cannot be used."""
    # A thread reads one after the other: only where there are many files is that no wait.
    batch = max(1, min(_BATCH, len(files) // (4 * threads)))
    batches = [files[start : start + batch] for start in range(0, len(files), batch)]
    found: dict[str, Footer | str] = {}
    with decoders(wanted, files=len(files)) as decode, ThreadPoolExecutor(threads) as pool:
        for footers in pool.map(functools.partial(read_batch, decode=decode), batches):
            found |= footers
    return found


def read_batch(files: Sequence[Stored], decode: Decode) -> dict[str, Footer | str]:
    """Read footers one after the other, and decode them together; return them by url."""
    tails: dict[str, Tail] = {}
    reasons: dict[str, str] = {}
    for file in files:
        try:
            tails[file.url] = _tail(file, FIRST_READ), file.size
        except pa.ArrowInvalid as error:
            reasons[file.url] = f"{_DAMAGED}: {error}"
        except (InputChangedError, FileNotFoundError) as error:
            reasons[file.url] = f"changed after it was listed: {error}"
    decoded = dict(zip(tails, decode([*tails.values()]), strict=True)) if tails else {}
    for url, footer in decoded.items():
        if isinstance(footer, str):
            reasons[url] = f"{_DAMAGED}: {footer}"
    return {file.url: reasons.get(file.url) or decoded[file.url] for file in files}


def read_metadata(file: Stored, *, length: int) -> tuple[pq.FileMetaData, int]:
    """Return the footer and its length in bytes, reading `length` bytes first and more if needed.

    It is decoded in this process: see `embedjob.input.footers` for what a file must have passed.
    pa.ArrowInvalid where the file does not end in a whole footer.
    """
    tail = _tail(file, length)
    return parse(tail), footer_length(tail, file.size)


def _tail(file: Stored, length: int) -> bytes:
    """Return the footer of a file, and nothing that lies before it."""
    tail = read_tail(file, min(length, file.size))
    needed = footer_length(tail, file.size)
    return tail[-needed:] if needed <= len(tail) else read_tail(file, needed)
