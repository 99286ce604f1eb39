"""The interface of a storage backend: list, read, create once, replace, delete."""

from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple, Protocol


class Entry(NamedTuple):
    """A file: path in its backend, size in bytes, and an etag that changes with the content.

    `modified` is when it was last written, in seconds since 1970; 0 where storage does not say.
    """

    path: str
    size: int
    etag: str
    modified: float = 0.0


# The etag of a link that leads nowhere: to a volume that is not mounted, or a file not fetched.
DANGLING = "dangling link"


class Backend(Protocol):
    """A place where files live; a missing file raises FileNotFoundError."""

    checks_reads: bool  # each read fails once the opened file was replaced

    @property
    def reached(self) -> bool:
        """Whether there was an answer in this process; until then the address may be wrong."""
        return True

    def note_reached(self) -> None:
        """Note that there was an answer."""
        return

    def entries(self, path: str, pattern: Sequence[str]) -> Iterator[Entry]:
        """Yield files below a folder, at least those that match `pattern`; none if missing."""

    def entry(self, path: str) -> Entry | None:
        """Return the file at a path; None for a folder."""

    def read(self, path: str) -> bytes:
        """Return the whole file."""

    def open(self, path: str) -> tuple[BinaryIO, str]:
        """Return a seekable handle without read-ahead, and the etag of what it reads."""

    def create(self, path: str, data: bytes) -> bool:
        """Create the file and return True; return False where the name was taken."""

    def replace(self, path: str, data: bytes) -> None:
        """Put the file, even where the name is taken."""

    def delete(self, path: str) -> None:
        """Remove the file."""
