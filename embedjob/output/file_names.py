"""File names: an output file's name says which rows of which input it holds."""

import hashlib
import re
from functools import lru_cache
from typing import NamedTuple

from embedjob.errors import OutputError
from embedjob.storage.objects import join

_SLUG_LENGTH = 48
_HASH_LENGTH = 16
_NAME = re.compile(
    r"(?P<slug>[A-Za-z0-9_.]+)-(?P<hash>[0-9a-f]{16})-(?P<version>[0-9a-f]{16})"
    r"-(?P<start>[0-9]{10,})-(?P<stop>[0-9]{10,})(?:-(?P<generation>[0-9]{8,}))?\.parquet"
)
# What people's programs leave in any folder that they show: file browsers, office programs, network
# disks. A run names nothing so.
_LEFT_BY_OTHERS = re.compile(
    r"\..*|~\$.*|.*~|@eaDir|\$RECYCLE\.BIN|(eh)?thumbs\.db|desktop\.ini|Icon\r|.*_\$folder\$",
    re.IGNORECASE,
)


class ChunkName(NamedTuple):
    """The fields of a file name; `shard` is the slug and hash of the shard's url.

    `generation` tells apart the files of one chunk: the epoch of the run that made it, or 0 for a
    chunk that was never made before.
    """

    shard: str
    version: str
    start: int
    stop: int
    generation: int = 0

    @property
    def chunk(self) -> str:
        """Return the name of the chunk, which all its generations share."""
        return f"{self.shard}-{self.version}-{self.start:010d}-{self.stop:010d}.parquet"


def digest(text: str) -> str:
    """Return 16 hex digits of the sha256 of a string, which may have lone surrogates."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_LENGTH]


# A shard's chunks are named one after the other.
@lru_cache(maxsize=8)
def shard_name(url: str) -> str:
    """Return `<slug>-<hash>`: the end of the path, readable, and a hash of the whole path."""
    tail = "/".join(url.split("/")[-2:]).removesuffix(".parquet")
    slug = re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9_.]+", "_", tail))
    # Files that begin with a dot or an underscore are hidden from most readers.
    slug = slug[-_SLUG_LENGTH:].strip("._") or "shard"
    return f"{slug}-{digest(url)}"


def chunk_name(shard_url: str, version: str, start: int, stop: int) -> str:
    """Return `<slug>-<hash>-<version>-<start>-<stop>.parquet`."""
    return f"{shard_name(shard_url)}-{version}-{start:010d}-{stop:010d}.parquet"


def with_generation(name: str, generation: int) -> str:
    """Return the file name of one generation of a chunk; the first, 0, has the chunk's own name."""
    return f"{name.removesuffix('.parquet')}-{generation:08d}.parquet" if generation else name


def parsed(name: str) -> ChunkName | None:
    """Split a file name into its fields; None when it is not the name of an embedding file."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    slug, digits, version, start, stop, generation = match.groups()
    return ChunkName(f"{slug}-{digits}", version, int(start), int(stop), int(generation or 0))


def parse_name(name: str) -> ChunkName:
    """Split a file name into its fields; OutputError when it is not the name of a chunk."""
    fields = parsed(name)
    if fields is None:
        raise OutputError(
            f"{name}: is not the name of an embedding file"
            " (<shard>-<hash>-<version>-<start>-<stop>[-<generation>].parquet); move it out of the"
            " output"
        )
    return fields


def data_folder(fingerprint: str) -> str:
    """Return the folder of one fingerprint's embedding files, relative to an output."""
    return f"data/{fingerprint[:12]}"


def is_left_by_others(path: str) -> bool:
    """Tell whether a path below the output's folders is a hidden file or what a browser left."""
    return any(_LEFT_BY_OTHERS.fullmatch(part) for part in path.split("/"))


def data_directory(out: str, fingerprint: str) -> str:
    """Return the directory of one fingerprint's embedding files."""
    return join(out, data_folder(fingerprint))


def quarantine_directory(out: str, fingerprint: str) -> str:
    """Return the directory of one fingerprint's bad rows, under the same file names."""
    return join(out, "quarantine", fingerprint[:12])
