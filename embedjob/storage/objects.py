"""Object storage: read, list, create and delete files on local disks, S3 and fsspec's other places.

Names are URLs; a plain path, a `~` path and `file://` are all local. Nothing is cached.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from embedjob.errors import AccessError, InputChangedError, OutputError
from embedjob.storage.access import access_errors
from embedjob.storage.backend import DANGLING, Backend, Entry
from embedjob.storage.local import LocalBackend, dangling
from embedjob.storage.locate import locate, split
from embedjob.storage.patterns import is_hidden, is_magic, matches, may_lead
from embedjob.storage.retrying import retried

_T = TypeVar("_T")
_COPY_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Stored:
    """One file as it was listed; another etag under the same URL means another file.

    `modified` is when it was last written, in seconds since 1970; 0 where storage does not say.
    """

    url: str
    size: int
    etag: str
    modified: float = field(default=0.0, compare=False)

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rsplit("/", 1)[-1]


def absolute(url: str) -> str:
    """Return the URL as every process reads it; a local one becomes an absolute plain path."""
    protocol, path = split(url)
    return f"{protocol}://{path}" if protocol else path


def join(url: str, *parts: str) -> str:
    """Return the URL of a path below `url`."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def find(pattern: str) -> list[Stored]:
    """Return the files that a file, folder or glob names, sorted; hidden and `_` names left out.

    A file that exists under the literal name wins, even where the name holds `*`, `?` or `[`.
    `**` is any number of folders, and everything below a folder that matches belongs to it.
    """
    literal = _below(pattern, ()) or [file for file in [stat(pattern) or _lost(pattern)] if file]
    if literal or not is_magic(split(pattern)[1]):
        return literal
    parts = absolute(pattern).split("/")
    starts = ["/".join(parts[:i]) or "/" for i in range(len(parts) + 1)]
    wild = (i for i, part in enumerate(parts) if is_magic(part) and not holds(starts[i + 1]))
    fixed = next(wild, len(parts))
    return _below(starts[fixed], tuple(parts[fixed:]))


def covers(pattern: str, url: str) -> bool:
    """Return whether `find` would list a file at `url` for this pattern; links are followed."""
    parts, place = _real(pattern).split("/"), _real(url).split("/")
    wild = next((i for i, part in enumerate(parts) if is_magic(part)), len(parts))
    fixed, rest = parts[:wild], tuple(parts[wild:])
    return place[:wild] == fixed and len(place) > wild and matches(place[wild:], rest)


def list_files(directory: str, *, links: bool = False) -> list[Stored]:
    """Return every file below a folder, hidden files too, sorted; none without a folder.

    Links are followed only where `links` says so: a link inside an output would have files
    elsewhere listed, and then deleted. AccessError where the folder itself is a link. A link that
    leads nowhere is left out.
    """
    backend, path, prefix = locate(directory)
    with access_errors(directory):
        if links or not isinstance(backend, LocalBackend):
            entries = backend.entries(path, ())
        else:
            entries = backend.own_entries(path)
        files = [_stored(prefix, entry) for entry in entries if entry.etag != DANGLING]
    return sorted(files, key=lambda file: file.url)


def stat(url: str) -> Stored | None:
    """Return the file as it is now; None where there is none."""
    backend, path, prefix = locate(url)
    with access_errors(url), suppress(FileNotFoundError):
        entry = _asked(backend, url, partial(backend.entry, path))
        return _stored(prefix, entry) if entry else None
    return None


def read_bytes(url: str) -> bytes:
    """Return the whole file; FileNotFoundError where there is none."""
    backend, path, _ = locate(url)
    with access_errors(url):
        return _asked(backend, url, partial(backend.read, path))


def read_tail(file: Stored, length: int) -> bytes:
    """Return the last `length` bytes of a listed file; InputChangedError if it has changed."""

    def read() -> bytes:
        with open_unchanged(file) as handle:
            handle.seek(max(0, file.size - length))
            return handle.read()

    return retried(read, what=file.url)


@contextmanager
def open_unchanged(file: Stored) -> Iterator[BinaryIO]:
    """Open a listed file, seekable and without read-ahead; InputChangedError if it changed.

    S3 compares the etag at every read. Elsewhere it is compared at both ends, so that what was read
    counts only after the `with` block has ended.
    """
    backend, path, _ = locate(file.url)
    try:
        with access_errors(file.url):
            handle, etag = _asked(backend, file.url, partial(backend.open, path))
        with handle:
            if etag != file.etag:
                raise _changed(file)
            yield handle
        require_unchanged(file)
    except (AccessError, InputChangedError):
        raise
    except Exception as error:
        # If the file was replaced, report that: it explains any other error.
        if not _is_still(file):
            raise _changed(file) from error
        raise


def require_unchanged(file: Stored) -> None:
    """Raise InputChangedError if a file that is read has changed, where reads do not tell."""
    backend, _, _ = locate(file.url)
    if not backend.checks_reads and not _is_still(file):
        raise _changed(file)


def create(url: str, data: bytes | bytearray | memoryview) -> bool:
    """Create the whole file and return True; return False where the name was taken.

    Where a put had no answer, the file counts as created if its content is this one.
    """
    backend, path, _ = locate(url)
    content, uncertain = bytes(data), False

    def put() -> bool:
        nonlocal uncertain
        try:
            made = backend.create(path, content)
        except Exception:
            uncertain = True
            raise
        return made or (uncertain and backend.read(path) == content)

    with access_errors(url):
        return _asked(backend, url, put)


def create_json(url: str, document: dict[str, Any]) -> dict[str, Any]:
    """Create a JSON file; return the document that is there now, ours or an earlier one.

    A random `token` is added unless the document has one. The writer whose token comes back has
    won, even where the answer to a put was lost and the retry found the name taken.
    """
    mine = {"token": secrets.token_hex(16), **document}
    if create(url, json.dumps(mine, indent=1).encode()):
        return mine
    try:
        return cast(dict[str, Any], json.loads(read_bytes(url)))
    except ValueError as error:
        raise OutputError(f"{url}: is not JSON; move it away") from error


def replace(url: str, data: bytes) -> None:
    """Put a whole file under a name, even where the name is taken; tried once.

    A retry could put an old content over a new one.
    """
    backend, path, _ = locate(url)
    with access_errors(url):
        backend.replace(path, data)


def delete(url: str) -> None:
    """Remove a file; a file that is not there counts as removed."""
    backend, path, _ = locate(url)
    with access_errors(url), suppress(FileNotFoundError):
        _asked(backend, url, partial(backend.delete, path))


def download(file: Stored, to: Path) -> None:
    """Copy a listed file to a local path; InputChangedError if it has changed."""
    to.parent.mkdir(parents=True, exist_ok=True)

    def copy() -> None:
        with open_unchanged(file) as source, to.open("wb") as sink:
            shutil.copyfileobj(source, sink, _COPY_BYTES)

    retried(copy, what=file.url)


def holds(folder: str) -> bool:
    """Return whether any file lies below a folder of exactly this name."""
    backend, path, _ = locate(folder)
    with access_errors(folder):
        return next(backend.entries(path, ()), None) is not None


def _asked(backend: Backend, url: str, call: Callable[[], _T]) -> _T:
    """Return storage's answer, waited for while its trouble may pass."""
    answer = retried(call, what=url, reached=backend.reached)
    backend.note_reached()
    return answer


def _below(folder: str, pattern: tuple[str, ...]) -> list[Stored]:
    """Return the files below a folder that match, sorted by URL."""
    backend, path, prefix = locate(folder)
    base = len(path.rstrip("/").split("/"))
    with access_errors(folder):
        files = [
            _stored(prefix, entry)
            for entry in backend.entries(path, pattern)
            if _is_meant(entry, entry.path.split("/")[base:], pattern)
        ]
    return sorted(files, key=lambda file: file.url)


def _is_meant(entry: Entry, parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether a pattern means an entry; a link that leads nowhere may have been a folder."""
    if entry.etag == DANGLING and pattern:
        return not any(map(is_hidden, parts)) and may_lead(parts, pattern)
    return matches(parts, pattern)


def _lost(url: str) -> Stored | None:
    """Return the link at a URL, if it is one that leads nowhere."""
    backend, path, prefix = locate(url)
    entry = dangling(path) if isinstance(backend, LocalBackend) else None
    return _stored(prefix, entry) if entry else None


def _real(url: str) -> str:
    """Return the URL without links, and without a slash at its end."""
    place = absolute(url).rstrip("/")
    return place if "://" in place else os.path.realpath(place)


def _stored(prefix: str, entry: Entry) -> Stored:
    return Stored(prefix + entry.path, entry.size, entry.etag, entry.modified)


def _is_still(file: Stored) -> bool:
    now = stat(file.url)
    return now is not None and now.etag == file.etag


def _changed(file: Stored) -> InputChangedError:
    return InputChangedError(
        f"{file.url}: is not the planned file: it was replaced or removed; "
        "run again to plan with the present files"
    )
