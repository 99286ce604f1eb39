"""What the footer of an embedding file says of it."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from embedjob.errors import OutputError
from embedjob.input.listing import FIRST_READ, read_metadata
from embedjob.output.parquet import COUNTS
from embedjob.storage.objects import Stored


@dataclass(frozen=True)
class Committed:
    """A chunk's file as it is there now; `written` where this call put it.

    `rows` are the file's own, as Parquet counts them; `counts` count rows of the chunk.
    """

    name: str
    rows: int
    bytes: int
    etag: str
    counts: Mapping[str, int]
    written: bool


def read_committed(file: Stored) -> Committed:
    """What the footer of an embedding file says; OutputError when it is none of ours."""
    return committed(file, file_metadata(file))


def read_all_committed(files: Sequence[Stored], *, threads: int = 32) -> list[Committed]:
    """What the footers of many embedding files say, in their order."""
    with ThreadPoolExecutor(max_workers=threads) as pool:
        return list(pool.map(read_committed, files))


def file_metadata(file: Stored) -> pq.FileMetaData:
    """The footer; OutputError when it is not one that embedjob wrote."""
    try:
        metadata, _ = read_metadata(file, length=FIRST_READ)
    except pa.ArrowException as error:
        raise OutputError(f"{file.url}: is not a whole Parquet file ({error})") from error
    if COUNTS not in (metadata.metadata or {}):
        raise OutputError(f"{file.url}: is a Parquet file that embedjob did not write")
    return metadata


def committed(file: Stored, metadata: pq.FileMetaData) -> Committed:
    """A file and its footer, as a value."""
    counts = json.loads(metadata.metadata[COUNTS])
    name = file.url.rsplit("/", 1)[-1]
    return Committed(name, metadata.num_rows, file.size, file.etag, counts, written=False)
