"""Old vectors: the keys of an embedding file, and the lines of it that chunks take over.

An old file that was deleted, replaced or damaged, or that another recipe wrote, gives nothing: its
texts are embedded.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embedjob.errors import EmbedjobError, OutputError
from embedjob.job.output import calibration_of, output_spec
from embedjob.job.planning import JobPlan
from embedjob.job.reusable import OldFile
from embedjob.output.calibration import Calibration
from embedjob.output.chunk_file import CALIBRATION_KEY, FINGERPRINT_KEY
from embedjob.output.head_columns import INDICES, ROUTER, VALUES
from embedjob.output.row_checks import sound
from embedjob.output.schema import CHARS, PART
from embedjob.stages.calibrating import with_quantization
from embedjob.stages.reuse.merging import CHUNK
from embedjob.stages.reuse.text_keys import (
    NO_OLD,
    OldKeys,
    Places,
    all_of,
    column_numbers,
    hashes_of,
    in_order,
)
from embedjob.storage.objects import open_unchanged
from embedjob.storage.retrying import retried
from embedjob.text.arrays import Flags, Ints, offsets_of
from embedjob.vectors.quantizing import CALIBRATED

# The columns that a text decides, as far as a recipe has them.
_OF_THE_TEXT = (
    "embedding",
    INDICES,
    VALUES,
    ROUTER,
    "tokens",
    "truncated",
    PART.name,
    *CHARS,
)
# The place of a passage comes from the row that has it now, not from the old file.
_OF_THE_ROW = (PART.name, *CHARS)
_TEXT_HASH = "text_hash"
_UNUSABLE = (EmbedjobError, OSError, pa.ArrowException, KeyError, ValueError, IndexError)
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Carried:
    """What is taken over: columns of these fields, from files that say what this run's files say.

    `calibration` has the ranges by which the run's vectors are quantised, None where they are not.
    """

    fields: pa.Schema
    fingerprint: str
    normalized: bool
    calibration: Calibration | None = None

    def allows(self, parquet: pq.ParquetFile) -> bool:
        """Return whether a file has the run's recipe, its columns and its ranges."""
        footer = parquet.metadata.metadata or {}
        if footer.get(FINGERPRINT_KEY, b"").decode() != self.fingerprint:
            return False
        own = parquet.schema_arrow
        if not all(_alike(own.field(field.name).type, field.type) for field in self.fields):
            return False
        if self.calibration is None:
            return True
        ranges = json.loads(footer.get(CALIBRATION_KEY, b"{}")).get("ranges", [])
        return np.array_equal(np.asarray(ranges, np.float32), self.calibration.array)


def _alike(theirs: pa.DataType, ours: pa.DataType) -> bool:
    """Tell whether a column has our type, but that its lists may be of any size."""
    fixed = pa.types.is_fixed_size_list(ours)
    return bool(theirs == ours or (fixed and theirs == pa.list_(ours.value_field)))


class Gathered(NamedTuple):
    """Lines of old files, in the order of the chunks that take them over.

    `table` has `chunk`, `text_hash` and the fields of Carried; of each chunk it has texts by
    `texts`, and `numbers` are these chunks.
    """

    table: pa.Table
    numbers: Ints
    texts: Ints


def carried_of(plan: JobPlan) -> Carried | None:
    """Return what a run may take over; None where the ranges of its vectors are not yet known."""
    dtype, out = plan.job.config.encoder.vector_dtype, plan.job.out
    spec = output_spec(plan)
    calibration = calibration_of(plan) if dtype in CALIBRATED else None
    if dtype in CALIBRATED and calibration is None:
        try:
            calibration = with_quantization(spec, out, vector_dtype=dtype).calibration
        except OutputError:  # its first encoder finds them
            return None
    left_out = _OF_THE_ROW if spec.passages else ()
    names = [name for name in _OF_THE_TEXT if name not in left_out]
    fields = pa.schema([spec.data.field(name) for name in names if name in spec.data.names])
    return Carried(fields, spec.fingerprint, spec.normalized, calibration)


def old_keys(files: Sequence[tuple[int, OldFile]], carried: Carried) -> OldKeys:
    """Return the keys of files' texts, in order; of a file that cannot be used, none."""
    return in_order(all_of([_keys(number, file, carried) for number, file in files], NO_OLD))


def gathered(
    files: Sequence[tuple[int, OldFile]], places: Sequence[Places], carried: Carried
) -> Gathered:
    """Return the lines that chunks take over from files; each file is opened once.

    Args:
        files: in the order of their numbers.
        places: where texts lie; those in other files count for nothing here.
        carried: what is taken over.
    """
    first, last = files[0][0], files[-1][0]
    own = Places(
        *map(np.concatenate, zip(*(one.within(first, last) for one in places), strict=True))
    )
    own = own.take(np.lexsort((own.line, own.file)))
    kinds = [(field.name, field.type) for field in carried.fields]
    empty = pa.schema([(CHUNK, pa.uint32()), (_TEXT_HASH, pa.binary(16)), *kinds])
    tables = [empty.empty_table()]
    for number, file in files:
        wanted = own.within(number, number)
        if len(wanted.file):
            tables += _usable(partial(_lines, file, wanted, carried), file)
    table = pa.concat_tables(tables)
    order = np.argsort(table[CHUNK].to_numpy(), kind="stable")
    table = table.take(pa.array(order)).combine_chunks()
    chunks = table[CHUNK].to_numpy()
    begins = starts_of_texts(table)
    numbers, texts = np.unique(chunks[begins], return_counts=True)
    return Gathered(table, numbers.astype(np.int64), texts.astype(np.int64))


def starts_of_texts(table: pa.Table) -> Ints:
    """Return the first line of each text; without parts, every line is a text.

    Two rows of one text may stand side by side, and so may the lines of one text for two chunks.
    """
    if PART.name not in table.column_names:
        return np.arange(len(table))
    begins = table[PART.name].to_numpy() == 0
    begins |= _changes(*column_numbers(table[_TEXT_HASH]))
    return np.flatnonzero(begins)


def _changes(*columns: npt.NDArray[Any]) -> Flags:
    begins = np.zeros(len(columns[0]), np.bool_)
    begins[:1] = True
    for column in columns:
        begins[1:] |= column[1:] != column[:-1]
    return begins


@contextmanager
def _opened(file: OldFile, carried: Carried) -> Iterator[pq.ParquetFile]:
    """Open an old file; OutputError where it is not what this run may take over."""
    with (
        open_unchanged(file.stored) as handle,
        pq.ParquetFile(handle, page_checksum_verification=True, pre_buffer=True) as parquet,
    ):
        if not carried.allows(parquet):
            raise OutputError(f"{file.stored.url}: has another recipe, other columns or ranges")
        yield parquet


def _usable(read: Callable[[], _Made], file: OldFile) -> list[_Made]:
    """Return what `read` makes of a file, in a list; nothing where the file cannot be used."""
    try:
        return [retried(read, what=file.stored.url)]
    except _UNUSABLE:
        return []


def _keys(number: int, file: OldFile, carried: Carried) -> OldKeys:
    return all_of(_usable(partial(_read_keys, number, file, carried), file), NO_OLD)


def _read_keys(number: int, file: OldFile, carried: Carried) -> OldKeys:
    """Return the texts of a file; a line without a vector is no text's."""
    with _opened(file, carried) as parquet:
        names = [_TEXT_HASH, *([PART.name] if PART.name in carried.fields.names else [])]
        names += ["embedding"] if file.nulls else []
        table = parquet.read(columns=names, use_threads=False)
    lines = starts_of_texts(table)
    counts = np.diff([*lines, len(table)])
    high, low = (column[lines] for column in column_numbers(table[_TEXT_HASH]))
    keys = OldKeys(
        high,
        low,
        np.full(len(lines), number, np.uint32),
        lines.astype(np.uint32),
        counts.astype(np.uint32),
    )
    has = np.ones(len(lines), np.bool_)
    if file.nulls:
        has &= table["embedding"].is_valid().to_numpy()[lines]
    if PART.name in names:
        # A later part with a hash of its own is no text that a row could have.
        has &= table[PART.name].to_numpy()[lines] == 0
    return OldKeys(*(column[has] for column in keys))


def _lines(file: OldFile, wanted: Places, carried: Carried) -> pa.Table:
    """Return the wanted lines of a file; texts whose vectors are not sound are left out."""
    with _opened(file, carried) as parquet:
        metadata = parquet.metadata
        ends = offsets_of(
            np.array([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])
        )
        source, texts = gather_lines(wanted)
        group_of = np.searchsorted(ends, source, side="right") - 1
        groups = np.unique(group_of)
        table = parquet.read_row_groups(
            groups.tolist(), columns=carried.fields.names, use_threads=False
        )
    # Where a group begins in the file, and in what was read of it.
    read_ends = offsets_of(np.diff(ends)[groups])
    which = np.searchsorted(groups, group_of)
    local = source - ends[group_of] + read_ends[which]
    kinds = pa.schema([(field.name, field.type) for field in carried.fields])
    taken = table.select(kinds.names).take(pa.array(local)).cast(kinds)
    good = sound(taken["embedding"], normalized=carried.normalized)
    whole = np.bincount(texts, weights=~good, minlength=len(wanted.file)) == 0
    keep = whole[texts]
    hashes = hashes_of(wanted.high[texts], wanted.low[texts])
    made = pa.table(
        [pa.array(wanted.chunk[texts]), hashes, *taken.columns],
        names=[CHUNK, _TEXT_HASH, *carried.fields.names],
    )
    return made if keep.all() else made.filter(pa.array(keep))


def gather_lines(places: Places) -> tuple[Ints, Ints]:
    """Return the lines at places, one text after the other, and the number of each line's text."""
    counts = places.lines.astype(np.int64)
    texts = np.repeat(np.arange(len(counts)), counts)
    offsets = offsets_of(counts)
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
    return places.line.astype(np.int64)[texts] + within, texts
