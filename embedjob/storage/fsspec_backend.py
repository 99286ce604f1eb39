"""fsspec backend: any protocol that fsspec knows, within the guarantees that it keeps."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, BinaryIO, cast

import fsspec

from embedjob.errors import AccessError
from embedjob.storage.backend import Backend, Entry

_TIME_KEYS = ("mtime", "last_modified", "LastModified", "updated", "modified", "created")
_VERSION_KEYS = (
    *("ETag", "etag", "generation", "content_md5", "mtime", "last_modified", "created"),
    "blob_id",  # of the Hugging Face hub: git's hash of the content
)
# Without `raise`, fsspec leaves out a folder that it could not list.
_LIST: Mapping[str, Any] = {"on_error": "raise"}
# By protocol, what has a filesystem look again that keeps its listings, whatever fsspec is told.
_LIST_AGAIN: Mapping[str, Mapping[str, Any]] = {"hf": {"refresh": True}}
_LOOK_AGAIN: Mapping[str, Mapping[str, Any]] = {"hf": {"refresh": True, "expand_info": True}}


class FsspecBackend(Backend):
    """The backend of one fsspec protocol."""

    checks_reads = False

    def __init__(self, protocol: str) -> None:
        """Open the filesystem; AccessError where the protocol or a package for it is missing."""
        self._list = _LIST_AGAIN.get(protocol, _LIST)
        self._look_again = _LOOK_AGAIN.get(protocol, {})
        try:
            self.fs: Any = fsspec.filesystem(protocol, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise AccessError(
                f"{protocol}://: no filesystem is installed for it: {error}"
            ) from error

    def spelling(self, url: str) -> tuple[str, str]:
        """Return the path as listings spell it, and the prefix that makes it a URL."""
        path = self.fs._strip_protocol(url)
        return path, self.fs.unstrip_protocol(path).removesuffix(path)

    def entries(self, path: str, pattern: Sequence[str]) -> Iterator[Entry]:
        """Yield the files below a folder; none where it is missing."""
        with suppress(FileNotFoundError):
            by_path = self.fs.find(path, detail=True, **self._list)
            yield from (self._entry(info) for info in by_path.values())

    def entry(self, path: str) -> Entry | None:
        """Return the file; None for a folder."""
        info = self.fs.info(path, **self._look_again)
        return None if info["type"] == "directory" else self._entry(info)

    def _entry(self, info: dict[str, Any]) -> Entry:
        version = next((info[key] for key in _VERSION_KEYS if info.get(key)), "")
        # A listing and a look at one file may spell the same moment differently.
        if isinstance(version, datetime):
            version = version.timestamp()
        modified = next((info[key] for key in _TIME_KEYS if info.get(key)), 0.0)
        return Entry(info["name"], info["size"], f"{info['size']}-{version}", _seconds(modified))

    def read(self, path: str) -> bytes:
        """Return the whole file."""
        return cast(bytes, self.fs.cat_file(path))

    def open(self, path: str) -> tuple[BinaryIO, str]:
        """Return a handle and the etag of what it reads."""
        handle = self.fs.open(path, "rb", cache_type="none")
        return handle, self._entry(self.fs.info(path, **self._look_again)).etag

    def create(self, path: str, data: bytes) -> bool:
        """Create the file; return whether this call did."""
        try:
            self.fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        return True

    def replace(self, path: str, data: bytes) -> None:
        """Put the file."""
        self.fs.pipe_file(path, data)

    def delete(self, path: str) -> None:
        """Remove the file."""
        self.fs.rm_file(path)


def _seconds(moment: Any) -> float:
    """Return a moment, as one of fsspec's filesystems spells it, in seconds since 1970; else 0."""
    if isinstance(moment, str):
        # Python 3.10 does not read a Z.
        with suppress(ValueError):
            moment = datetime.fromisoformat(re.sub("Z$", "+00:00", moment))
    if isinstance(moment, datetime):
        return moment.timestamp()
    return float(moment) if isinstance(moment, int | float) else 0.0


def fresh_filesystem(url: str) -> tuple[Any, str]:
    """Return the filesystem of a URL, and the path there.

    It is not the instance that fsspec keeps, which may be of an earlier endpoint, or have an old
    listing.
    """
    filesystem, path = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    return filesystem, str(path)
