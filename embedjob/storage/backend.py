"""What storage asks of a place where files live."""

from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple, Protocol


class Entry(NamedTuple):
    """A file: its path in its backend, its size, and what tells one version from the next."""

    path: str
    size: int
    etag: str


class Backend(Protocol):
    """What storage asks of a place; a missing file is FileNotFoundError."""

    checks_reads: bool  # each read fails once the file is not the opened one

    def entries(self, path: str, pattern: Sequence[str]) -> Iterator[Entry]:
        """Files below a folder, at least those that match the pattern; none if it is missing."""

    def entry(self, path: str) -> Entry | None:
        """One file; None for a folder."""

    def read(self, path: str) -> bytes:
        """The whole file."""

    def open(self, path: str) -> tuple[BinaryIO, str]:
        """A seekable handle that reads no more than asked, and the etag of what it reads."""

    def create(self, path: str, data: bytes) -> bool:
        """Whether this call made the file; False where the name was taken."""

    def replace(self, path: str, data: bytes) -> None:
        """Put the file, whatever was there."""

    def delete(self, path: str) -> None:
        """Remove the file."""
