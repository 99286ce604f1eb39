"""Shard listing: find the Parquet files of an input, and read their footers."""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from embedjob.errors import InputChangedError, InputError, amount, in_one_line
from embedjob.input.chunks import WHOLE_BUT, Shard, printable
from embedjob.input.decoders import DecodesFooters, decoders
from embedjob.input.footers import Footer, Tail, Wanted, footer_length, parse_footer
from embedjob.input.int96 import exact_units
from embedjob.input.json_lines import is_json_lines, scan_lines
from embedjob.storage.backend import DANGLING
from embedjob.storage.objects import Stored, absolute, covers, find, open_unchanged, read_tail, stat
from embedjob.storage.retrying import retried

PARQUET_NAMES = (".parquet", ".pq", ".parq")
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
FIRST_READ = 64 * 1024
_EXAMPLES = 3
_BATCH = 16  # footers that go to a process together
_DAMAGED = "not a whole Parquet file"
_CHANGED = "changed after it was listed"
_HEAD = 512  # bytes that tell what a file is
_PARQUET, _ENCRYPTED = b"PAR1", b"PARE"

# What files of a kind begin with, and what to say of them.
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself with `git lfs pull`"),
    (b"/annex/objects/", "a git-annex pointer; fetch the file itself with `git annex get`"),
    (b"../.git/annex", "a git-annex pointer; fetch the file itself with `git annex get`"),
    (b"<!DOCTYPE html", "an HTML page, as an error that was saved in place of the file"),
    (b"<html", "an HTML page, as an error that was saved in place of the file"),
    (b"<?xml", "an XML document, as an error that was saved in place of the file"),
    (b"<Error", "an XML document, as an error that was saved in place of the file"),
    (b"ARROW1", "an Arrow IPC file (feather); write it as Parquet"),
    (b"FEA1", "a feather file of version 1; write it as Parquet"),
    (b"\xff\xff\xff\xff", "an Arrow IPC stream; write it as Parquet"),
    (b"ORC", "an ORC file; write it as Parquet"),
    (b"Obj\x01", "an Avro file; write it as Parquet"),
    (b"SQLite format 3\x00", "an SQLite database; write its table as Parquet"),
    (b"\x89HDF\r\n", "an HDF5 file; write it as Parquet"),
    (b"\x93NUMPY", "a NumPy array; write it as Parquet"),
    (b"\x1f\x8b", "compressed as a whole by gzip; decompress it"),
    (b"\x28\xb5\x2f\xfd", "compressed as a whole by zstd; decompress it"),
    (b"BZh", "compressed as a whole by bzip2; decompress it"),
    (b"\xfd7zXZ\x00", "compressed as a whole by xz; decompress it"),
    (b"\x04\x22\x4d\x18", "compressed as a whole by lz4; decompress it"),
    (b"\xff\x06\x00\x00sNaPpY", "compressed as a whole by snappy; decompress it"),
    (b"PK\x03\x04", "a ZIP archive; unpack it"),
    (b"\x80", "a Python pickle; write it as Parquet"),
    (_ENCRYPTED, "a Parquet file with an encrypted footer, which is not supported; decrypt it"),
    (_PARQUET, "the beginning of a Parquet file without its end: its copy was cut short"),
)
_DUCKDB = slice(8, 12)


@dataclass(frozen=True)
class InputFiles:
    """The files of an input: its shards, and the files beside them that are not read."""

    shards: tuple[Shard, ...]
    unread: tuple[str, ...]


def find_files(path: str | Sequence[str]) -> InputFiles:
    """Return the files that the patterns list, each once, by url; InputError without a shard."""
    patterns = (path,) if isinstance(path, str) else tuple(path)
    listed = {pattern: find(pattern) for pattern in patterns}
    for pattern, files in listed.items():
        if not input_files(pattern, files):
            raise InputError(
                f"input.path: no Parquet file at {pattern} (listed: {amount(len(files), 'file')});"
                f" looked for that file, for files that match it as a glob, and for"
                f" {', '.join(PARQUET_NAMES)} files below that directory, and then for JSON Lines"
                " (.jsonl, .ndjson, also with .gz or .zst); names that begin with . or _ are left"
                " out"
            )
    shards = shards_of(listed)
    every = {file.url for files in listed.values() for file in files}
    return InputFiles(shards, tuple(sorted(every - {shard.stored.url for shard in shards})))


def described_unread(urls: Sequence[str]) -> str:
    """Return how many files are not read, and what the first of them are; nothing for none."""
    if not urls:
        return ""
    likely = sorted(urls, key=lambda url: ("parq" not in url.lower(), "." in Path(url).name, url))
    shown = [f"{printable(url)} ({_unread(url)})" for url in likely[:_EXAMPLES]]
    return f"{amount(len(urls), 'file')} beside the shards, such as {', '.join(shown)}"


def _unread(url: str) -> str:
    file = stat(url)
    if file is None:
        return "gone"
    nature = _nature(file)
    if is_json_lines(url, named=False):
        return "JSON Lines beside Parquet; name them in input.path, as *.jsonl"
    if nature.startswith("the beginning of a Parquet file"):
        return "Parquet by its first bytes; name it in input.path, or rename it to *.parquet"
    return nature


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
        for file in input_files(pattern, candidates)
    }
    return tuple(_shard(file) for _, file in sorted(files.items()))


def _shard(file: Stored) -> Shard:
    url = printable(file.url)
    raw = None if url == file.url else file.url
    return Shard(url, file.size, file.etag, partitions(url), raw, file.modified)


def input_files(pattern: str, files: list[Stored]) -> list[Stored]:
    """Return the input files: those the pattern names, and the Parquet files of directories.

    Where there are none, the files of JSON Lines: beside Parquet they are some tool's own.
    """
    base = pattern.rstrip("/").rsplit("/", 1)[-1]
    lost = [file for file in files if file.etag == DANGLING]
    found = [
        file
        for file in files
        if file.url.lower().endswith(PARQUET_NAMES) or _is_named(base, file.name)
    ]
    found = found or [file for file in files if is_json_lines(file.url, named=False)]
    return found + [file for file in lost if file not in found]


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
    """Read the footers of many files; return by url the footer, or why it cannot be used.

    Files of JSON Lines have none: all of each is read, and its blocks of lines are found.
    """
    lines = [file for file in files if is_json_lines(file.url) and file.etag != DANGLING]
    apart = {file.url for file in lines}
    files = [file for file in files if file.url not in apart]
    # A thread reads one after the other: only where there are many files is that no wait.
    batch = max(1, min(_BATCH, len(files) // (4 * threads)))
    batches = [files[start : start + batch] for start in range(0, len(files), batch)]
    found: dict[str, Footer | str] = {}
    with decoders(wanted, files=len(files)) as decode, ThreadPoolExecutor(threads) as pool:
        for footers in pool.map(functools.partial(read_batch, decode=decode), batches):
            found |= footers
        scanned = pool.map(functools.partial(scan_lines, wanted=wanted), lines)
        found |= {printable(file.url): one for file, one in zip(lines, scanned, strict=True)}
    return found


def read_batch(files: Sequence[Stored], decode: DecodesFooters) -> dict[str, Footer | str]:
    """Read footers one after the other, and decode them together; return them by shards' urls."""
    tails: dict[str, Tail] = {}
    reasons: dict[str, str] = {}
    for file in files:
        if file.etag == DANGLING:
            reasons[file.url] = (
                "a link that leads nowhere: mount what it leads to, fetch the file, or remove it"
            )
            continue
        try:
            tails[file.url] = _tail(file, FIRST_READ), file.size
        except pa.ArrowInvalid as error:
            message = str(error)
            whole = message.startswith(WHOLE_BUT)
            reasons[file.url] = (
                message if whole else f"{_DAMAGED}: {message}; it is {_nature(file)}"
            )
        except (InputChangedError, FileNotFoundError) as error:
            reasons[file.url] = f"{_CHANGED}: {error}"
    decoded = dict(zip(tails, decode([*tails.values()]), strict=True)) if tails else {}
    for file in files:
        footer = decoded.get(file.url)
        if isinstance(footer, Footer) and footer.fine_schema is not None:
            footer = decoded[file.url] = _settled(file, tails[file.url], footer)
        if isinstance(footer, str):
            ready = footer.startswith((WHOLE_BUT, _CHANGED))
            reasons[file.url] = footer if ready else f"{_DAMAGED}: {footer}"
    return {printable(file.url): reasons.get(file.url) or decoded[file.url] for file in files}


def _settled(file: Stored, tail: Tail, footer: Footer) -> Footer | str:
    """Return a footer whose int96 columns have the units that their values are exact in."""
    assert footer.fine_schema is not None
    names = [
        fine.name
        for fine, field in zip(footer.fine_schema, footer.schema, strict=True)
        if fine.type != field.type
    ]

    def look() -> list[str]:
        with open_unchanged(file) as source:
            return exact_units(source, parse_footer(tail[0]), range(len(footer.group_rows)), names)

    try:
        units = retried(look, what=file.url)
    except (InputChangedError, FileNotFoundError) as error:
        return f"{_CHANGED}: {error}"
    except (pa.ArrowException, OSError) as error:
        message = " ".join(str(error).split())
        whole = message.startswith(WHOLE_BUT)
        return message if whole else f"its timestamps cannot be read: {message}"
    if units == ["ns"]:
        return replace(footer, schema=footer.fine_schema, fine_schema=None)
    return footer if "ns" in units else replace(footer, fine_schema=None)


def _nature(file: Stored) -> str:
    """Return what a file is that is not Parquet, as far as it can still be read."""
    try:
        with open_unchanged(file) as handle:
            return what_it_is(handle.read(_HEAD))
    except (InputChangedError, OSError) as error:
        return in_one_line(error)


def read_metadata(file: Stored, *, length: int) -> tuple[pq.FileMetaData, int]:
    """Return the footer and its length in bytes, reading `length` bytes first and more if needed.

    It is decoded in this process: see `embedjob.input.footers` for what a file must have passed.
    pa.ArrowInvalid where the file does not end in a whole footer.
    """
    tail = _tail(file, length)
    return parse_footer(tail), footer_length(tail, file.size)


def _tail(file: Stored, length: int) -> bytes:
    """Return the footer of a file, and nothing that lies before it."""
    tail = read_tail(file, min(length, file.size))
    needed = footer_length(tail, file.size)
    return tail[-needed:] if needed <= len(tail) else read_tail(file, needed)


def what_it_is(head: bytes) -> str:
    """Return what a file is whose first bytes these are, and what to do about it."""
    begun = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for beginning, said in _BEGINNINGS:
        if head.startswith(beginning) or begun[: len(beginning)].lower() == beginning.lower():
            return said
    return next((said for holds, said in _OTHERS if holds(head)), "no file of a known kind")


def _is_text(head: bytes) -> bool:
    try:
        text = head[:-4].decode() if len(head) == _HEAD else head.decode()
    except UnicodeDecodeError:
        return False
    return "\x00" not in text


_OTHERS: tuple[tuple[Callable[[bytes], bool], str], ...] = (
    (lambda head: not head, "empty: was its upload cut short?"),
    (lambda head: not head.strip(b"\x00"), "zeros only: was its copy cut short?"),
    (lambda head: head[_DUCKDB] == b"DUCK", "a DuckDB database; write its table as Parquet"),
    (lambda head: head.lstrip()[:1] in (b"{", b"["), "JSON; name it *.jsonl if each line is a row"),
    (_is_text, "text, such as CSV; write it as Parquet"),
)
