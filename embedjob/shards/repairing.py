"""What a run should make again, and its deletion: the only one beside that of `prune`."""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from embedjob.errors import EmbedjobError
from embedjob.shards.committed import read_committed
from embedjob.shards.names import data_directory, quarantine_directory
from embedjob.shards.verifying import first_lines
from embedjob.storage import Stored, delete, join, list_files, open_unchanged

THREADS = 8


def damaged(out: str, fingerprint: str) -> frozenset[str]:
    """Names of the chunks whose files cannot be read whole, or were put by half."""
    data = list_files(data_directory(out, fingerprint))
    aside = {file.name: file for file in list_files(quarantine_directory(out, fingerprint))}
    with ThreadPoolExecutor(THREADS) as pool:
        sound = list(pool.map(lambda file: _is_sound(file, aside.get(file.name)), data))
    broken = {file.name for file, whole in zip(data, sound, strict=True) if not whole}
    halves = aside.keys() - {file.name for file in data}
    return frozenset(broken | halves)


def quarantined(out: str, fingerprint: str) -> frozenset[str]:
    """Names of the chunks with quarantined rows, which may now succeed."""
    return frozenset(file.name for file in list_files(quarantine_directory(out, fingerprint)))


def delete_chunks(out: str, fingerprint: str, names: Collection[str]) -> None:
    """The data file goes first: a chunk without it is work left, whatever else there is of it."""
    for name in sorted(names):
        delete(join(data_directory(out, fingerprint), name))
        delete(join(quarantine_directory(out, fingerprint), name))


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
