"""Deleting what a run should make again: the only deletions beside those of `prune`."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from embedjob.errors import EmbedjobError
from embedjob.shards.committed import read_committed
from embedjob.shards.names import data_directory, quarantine_directory
from embedjob.shards.verifying import first_lines
from embedjob.storage import Stored, delete, join, list_files, open_unchanged

THREADS = 8


def delete_damaged(out: str, fingerprint: str) -> int:
    """How many chunks were deleted: files that cannot be read whole, and half-put chunks."""
    data = list_files(data_directory(out, fingerprint))
    aside = {_name(file): file for file in list_files(quarantine_directory(out, fingerprint))}
    with ThreadPoolExecutor(THREADS) as pool:
        sound = list(pool.map(lambda file: _is_sound(file, aside.get(_name(file))), data))
    damaged = [file for file, whole in zip(data, sound, strict=True) if not whole]
    halves = aside.keys() - {_name(file) for file in data}
    return _delete(out, fingerprint, [*damaged, *(aside[name] for name in halves)])


def delete_quarantined(out: str, fingerprint: str) -> int:
    """How many chunks were deleted: those with quarantined rows, which may now succeed."""
    return _delete(out, fingerprint, list_files(quarantine_directory(out, fingerprint)))


def _delete(out: str, fingerprint: str, files: Sequence[Stored]) -> int:
    """The data file goes first: a chunk without it is work left, whatever else there is of it."""
    names = sorted({_name(file) for file in files})
    for name in names:
        delete(join(data_directory(out, fingerprint), name))
        delete(join(quarantine_directory(out, fingerprint), name))
    return len(names)


def _is_sound(file: Stored, aside: Stored | None) -> bool:
    """Whether the chunk's good rows, and those that were set aside, are all there."""
    try:
        counts = read_committed(file).counts
        if counts["quarantined"] and (aside is None or _rows(aside) != counts["quarantined"]):
            return False
        return _rows(file) + counts["quarantined"] == counts["rows"]
    except (EmbedjobError, OSError, pa.ArrowException):
        return False


def _rows(file: Stored) -> int:
    with open_unchanged(file) as source:
        table = pq.ParquetFile(source, page_checksum_verification=True).read()
    return len(first_lines(table))


def _name(file: Stored) -> str:
    return file.url.rsplit("/", 1)[-1]
