"""Local filesystem backend: a file appears whole or not at all, even with two writers."""

import errno
import io
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from embedjob.errors import AccessError
from embedjob.storage.backend import DANGLING, Backend, Entry
from embedjob.storage.patterns import may_lead

# A local file is written in a folder of this name and then linked to its own. The nearest one above
# the file is used; an output's probe makes one at its top, so that none lies inside OUT/data.
SCRATCH = ".embedjob-tmp"


class LocalBackend(Backend):
    """The backend of plain paths."""

    checks_reads = False

    def entries(self, path: str, pattern: Sequence[str]) -> Iterator[Entry]:
        """Yield the files below a folder, following links; none where it is missing.

        A link that leads nowhere is an entry of its own, with the etag DANGLING.
        """
        seen: set[tuple[int, int]] = set()
        _first_visit(path, seen)
        for folder, folders, names in os.walk(path, followlinks=True, onerror=_raise_unless_gone):
            above = Path(folder).relative_to(path).parts
            inner = [name for name in sorted(folders) if may_lead((*above, name), pattern)]
            folders[:] = [x for x in inner if _first_visit(os.path.join(folder, x), seen)]
            for name in names:
                # Other writers' temporary files may be gone before their status is read.
                with suppress(FileNotFoundError):
                    inner_path = os.path.join(folder, name)
                    entry = dangling(inner_path) or self.entry(inner_path)
                    if entry:
                        yield entry

    def own_entries(self, path: str) -> Iterator[Entry]:
        """Yield the files below a folder; links to files and folders are left out.

        AccessError where the folder itself is a link.
        """
        if os.path.islink(path):
            raise AccessError(
                f"{path}: is a link, and what it leads to is not this output's to list or delete;"
                " move the folder itself here"
            )
        for folder, folders, names in os.walk(path, onerror=_raise_unless_gone):
            folders.sort()
            for name in names:
                inner = os.path.join(folder, name)
                with suppress(FileNotFoundError):
                    status = os.lstat(inner)
                    if stat.S_ISREG(status.st_mode):
                        yield _entry(inner, status)

    def entry(self, path: str) -> Entry | None:
        """Return the file; None for a folder."""
        status = os.stat(path)
        return _entry(path, status) if stat.S_ISREG(status.st_mode) else None

    def read(self, path: str) -> bytes:
        """Return the whole file."""
        with _opened(path) as handle:
            return handle.read()

    def open(self, path: str) -> tuple[BinaryIO, str]:
        """Return a handle and the etag of what it reads."""
        handle = _opened(path)
        return handle, _etag(os.fstat(handle.fileno()))

    def create(self, path: str, data: bytes) -> bool:
        """Create the file; return whether this call did."""
        try:
            _put(path, data, place=os.link)
        except FileExistsError:
            return False
        return True

    def replace(self, path: str, data: bytes) -> None:
        """Put the file."""
        _put(path, data, place=os.replace)

    def delete(self, path: str) -> None:
        """Remove the file."""
        os.unlink(path)

    def make_scratch(self, folder: str) -> None:
        """Make a scratch folder here, in which files below this folder are written first."""
        os.makedirs(os.path.join(folder, SCRATCH), exist_ok=True)


def _opened(path: str) -> BinaryIO:
    """Open a regular file; AccessError for a pipe or a device, which could wait for ever."""
    handle = io.BufferedReader(io.FileIO(path, opener=_without_waiting))
    if stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
        return handle
    handle.close()
    raise AccessError(f"{path}: is a pipe or a device, and not a file; remove it")


def _without_waiting(path: str, flags: int) -> int:
    # The open of a pipe waits for a writer otherwise.
    return os.open(path, flags | os.O_NONBLOCK)


def dangling(path: str) -> Entry | None:
    """Return the entry of a link that leads nowhere; None for anything else."""
    return Entry(path, 0, DANGLING) if os.path.islink(path) and not _leads(path) else None


def _leads(link: str) -> bool:
    """Return whether a link leads somewhere, even to what may not be read."""
    try:
        os.stat(link)
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
    return True


def _entry(path: str, status: os.stat_result) -> Entry:
    return Entry(path, status.st_size, _etag(status), status.st_mtime)


def _etag(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"


def _put(path: str, data: bytes, *, place: Callable[[str, str], None]) -> None:
    """Write to a scratch file, sync it to disk, then name it: no reader ever sees half a file."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    scratch = _scratch(folder)
    os.makedirs(scratch, exist_ok=True)
    temporary = os.path.join(scratch, secrets.token_hex(16))
    try:
        with open(temporary, "xb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        place(temporary, path)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _scratch(folder: str) -> str:
    """Return the nearest scratch folder, at or above, on this device; else one in the folder."""
    device = os.stat(folder).st_dev
    for parent in (Path(folder), *Path(folder).parents):
        scratch = parent / SCRATCH
        if scratch.is_dir() and scratch.stat().st_dev == device and os.access(scratch, os.W_OK):
            return str(scratch)
    return os.path.join(folder, SCRATCH)


def _raise_unless_gone(error: OSError) -> None:
    """Ignore a folder that is missing or has vanished; raise any other error."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _first_visit(folder: str, seen: set[tuple[int, int]]) -> bool:
    """Note a folder and return whether it is new: a loop of links must end."""
    try:
        status = os.stat(folder)
    except FileNotFoundError:
        return False
    key = (status.st_dev, status.st_ino)
    if key in seen:
        return False
    seen.add(key)
    return True
