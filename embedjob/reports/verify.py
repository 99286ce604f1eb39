"""Verification: read an output again, every byte of it, and list what is not as promised."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedjob.errors import EmbedjobError, OutputError, amount
from embedjob.output.chunk_file import (
    CALIBRATION_KEY,
    COUNTS_KEY,
    FINGERPRINT_KEY,
    VOCABULARY_KEY,
    committed,
)
from embedjob.output.claim import Claim, read_claims
from embedjob.output.file_names import is_left_by_others
from embedjob.output.head_columns import INDICES, ROUTER, VALUES, head_column_problems
from embedjob.output.manifest import SnapshotFile
from embedjob.output.row_checks import first_lines, lines_in_order, passage_problems
from embedjob.output.schema import PART, schema_text, vectors_of
from embedjob.output.snapshot import Snapshot, published, read_snapshot
from embedjob.reports.derived_checks import derived_problems
from embedjob.storage.objects import (
    Stored,
    absolute,
    join,
    list_files,
    open_unchanged,
)

PARTS = ("data", "quarantine")
_THREADS = 4
NORM_TOLERANCE = 2e-3
_EXAMPLES = 3


@dataclass(frozen=True)
class Report:
    """The result of `verify`: files and rows that a reader would see, and every broken promise.

    `notes` are no faults: files that embedjob did not write and does not read.
    """

    files: int
    rows: int
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Return whether there is no problem."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {"ok": self.ok, **asdict(self)}


@dataclass(frozen=True)
class Checked:
    """The problems of one file; its columns are None where it cannot be read."""

    url: str
    problems: tuple[str, ...]
    columns: Mapping[str, str] | None = None


def verify(out: str) -> Report:
    """Read an output and return the report; OutputError where there is no output."""
    out = absolute(out)
    claims = {claim.fingerprint: claim for claim in read_claims(out)}
    snapshots = [read_snapshot(out, epoch) for epoch in published(out)]
    # A run over an empty input publishes without a model, which alone could put the claim.
    if not claims and (not snapshots or snapshots[-1].files):
        raise OutputError(f"{out}: has no _embedjob.json; give the output of a run")
    listed = {file.url: file for part in PARTS for file in list_files(join(out, part))}
    others = [url for url in listed if is_left_by_others(url.removeprefix(f"{out}/"))]
    listed = {url: file for url, file in listed.items() if url not in {*others}}
    notes = tuple(_left_by_others(others))
    problems = [*_orphans(out, listed, snapshots)]
    if not snapshots:
        problems.append(f"{out}: no snapshot is published; no run has ended here")
        return Report(0, 0, tuple(problems), notes)
    newest = snapshots[-1]
    problems += _coverage(newest)
    claim = claims.get(newest.fingerprint)
    if claim is None and newest.files:
        unclaimed = f"no claim has fingerprint {newest.fingerprint[:12]} of snapshot {newest.epoch}"
        return Report(0, 0, (*problems, f"{out}: {unclaimed}; was it deleted?"), notes)
    with ThreadPoolExecutor(_THREADS) as pool:
        checked = [*pool.map(partial(_file, out, listed=listed, claim=claim), newest.files)]
    problems += [problem for file in checked for problem in file.problems]
    problems += _odd_columns(checked)
    derived = derived_problems(out, [*claims.values()])
    problems += derived.problems
    notes += derived.notes
    rows = sum(file.counts["rows"] - file.counts["quarantined"] for file in newest.files)
    return Report(len(newest.files), rows, tuple(problems), notes)


def _left_by_others(urls: Sequence[str]) -> Iterator[str]:
    if urls:
        shown = ", ".join(sorted(urls)[:_EXAMPLES])
        yield f"left here by a file browser or a disk: {len(urls):,}, such as {shown}"


def _orphans(out: str, listed: Mapping[str, Stored], snapshots: list[Snapshot]) -> Iterator[str]:
    named = {join(out, path) for snapshot in snapshots for path in snapshot.paths}
    # Before the first snapshot there is nothing that `prune` could tell apart.
    pruned = ", or `prune` will delete it" if snapshots else ""
    for url in sorted(set(listed) - named):
        yield f"{url}: orphan: no snapshot names it; the next run will list it{pruned}"


def _coverage(snapshot: Snapshot) -> Iterator[str]:
    """Yield rows that two files hold, or that no file holds although the shard is complete."""
    ranges: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for file in snapshot.files:
        ranges[file.shard, file.shard_etag].append((file.start, file.stop))
    for shard in snapshot.shards:
        spans = sorted(ranges.get((shard["url"], shard["etag"]), ()))
        row = 0
        for start, stop in spans:
            if start < row or (start > row and shard["complete"]):
                what = "two files hold" if start < row else "no file holds"
                yield f"{shard['url']}: {what} rows {min(start, row)} to {max(start, row)}"
            row = stop
        if row < shard["rows"] and shard["complete"]:
            yield f"{shard['url']}: no file holds rows {row} to {shard['rows']}"


def _file(
    out: str,
    file: SnapshotFile,
    *,
    listed: Mapping[str, Stored],
    claim: Claim | None,
) -> Checked:
    assert claim is not None  # with a file comes a claim
    url = join(out, file.path)
    if url not in listed:
        return Checked(url, (f"{url}: is missing",))
    stored = listed[url]
    same = (stored.etag, stored.size) == (file.etag, file.bytes)
    moved = () if same else (f"{url}: is not the object that was published (other etag or size)",)
    try:
        with open_unchanged(stored) as source:
            parquet = pq.ParquetFile(source, page_checksum_verification=True)
            table, metadata = parquet.read(), parquet.metadata
        bad, lost = _set_aside(out, file, listed, claim)
        problems = (*_contents(stored, file, table, metadata, claim), *lost)
        if _split(claim) and not lost:
            found = passage_problems(table, bad, file.counts)
            problems += tuple(f"{url}: {problem}" for problem in found)
        problems += tuple(f"{url}: {problem}" for problem in _ranges(table, metadata, claim))
    except (EmbedjobError, OSError, pa.ArrowException) as error:
        return Checked(url, (*moved, f"{url}: cannot be read: {error}"))
    return Checked(url, (*moved, *problems), schema_text(table.schema))


def _odd_columns(checked: Sequence[Checked]) -> Iterator[str]:
    """Yield files whose columns differ from the columns of the first file."""
    columns = [(file.url, file.columns) for file in checked if file.columns is not None]
    for url, names in columns:
        if names != columns[0][1]:
            yield f"{url}: its columns are {names}, but {columns[0][1]} in {columns[0][0]}"


def _contents(
    stored: Stored, file: SnapshotFile, table: pa.Table, metadata: pq.FileMetaData, claim: Claim
) -> Iterator[str]:
    if COUNTS_KEY not in (metadata.metadata or {}):
        yield f"{stored.url}: is a Parquet file that embedjob did not write"
        return
    counts = committed(stored, metadata).counts
    if (metadata.metadata or {}).get(FINGERPRINT_KEY, b"").decode() != claim.fingerprint:
        yield f"{stored.url}: its footer names another fingerprint"
    columns = schema_text(table.schema)
    for name in ("embedding", INDICES, VALUES, ROUTER):
        if columns.get(name) != claim.schema.get(name):
            promised = claim.schema.get(name)
            what = "embeddings" if name == "embedding" else name
            yield f"{stored.url}: its {what} are {columns.get(name)}, not {promised}"
            return
    parts = [PART.name] if PART.name in claim.schema else []
    lacking = [name for name in ("row", "shard", *parts) if name not in table.column_names]
    if lacking:
        yield f"{stored.url}: it has no column {', '.join(lacking)}"
        return
    rows = len(first_lines(table))
    # Of passages, a row may be in both files.
    whole = _split(claim) or rows + counts["quarantined"] == counts["rows"]
    if len(table) != file.rows or not whole:
        counted = f"{rows} rows" + (f" in {len(table)} lines" if parts else "")
        bad = counts["quarantined"]
        yield f"{stored.url}: has {counted} and {bad} quarantined, but its footer counts {counts}"
    yield from (f"{stored.url}: {problem}" for problem in _rows(table, file, claim))
    yield from (f"{stored.url}: {problem}" for problem in _head_problems(table, metadata, claim))


def _head_problems(table: pa.Table, metadata: pq.FileMetaData, claim: Claim) -> Iterator[str]:
    """Yield problems of the heads' columns; without heads, kept columns may have their names."""
    if not claim.recipes["document"].get("heads"):
        return
    names = [name for name in (INDICES, VALUES, ROUTER) if name in table.column_names]
    vocabulary = metadata.metadata.get(VOCABULARY_KEY)
    made = table.select(["embedding", *names])
    for place, what in head_column_problems(
        made, vocabulary=int(vocabulary) if vocabulary else None
    ):
        yield f"row {table['row'][place]} {what}"


def _ranges(table: pa.Table, metadata: pq.FileMetaData, claim: Claim) -> Iterator[str]:
    """Yield problems of the ranges by which a file's vectors were quantised."""
    if claim.recipes["document"].get("vector_dtype") not in ("int8", "uint8"):
        return
    claimed = claim.calibration.ranges if claim.calibration else []
    stamped = json.loads((metadata.metadata or {}).get(CALIBRATION_KEY, b"{}"))
    if stamped.get("ranges", []) != claimed:
        yield "its footer has other ranges than the claim"
    width = _width(table)
    whole = [len(side) for side in claimed] == [width, width]
    if not whole or any(low > high for low, high in zip(*claimed, strict=True)):
        yield f"the claim has no ranges for vectors of {width} numbers; was it edited?"


def _width(table: pa.Table) -> int:
    """Return the numbers of an embedding; 0 where they have no common width."""
    if "embedding" not in table.column_names:
        return 0
    kind = table.schema.field("embedding").type
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    widths = pc.unique(pc.list_value_length(table["embedding"]).drop_null())
    return int(widths[0].as_py()) if len(widths) == 1 else 0


def _set_aside(
    out: str, file: SnapshotFile, listed: Mapping[str, Stored], claim: Claim
) -> tuple[pa.Table | None, tuple[str, ...]]:
    """Return the chunk's bad rows, if there are any, and the problems of their file."""
    bad = file.counts["quarantined"]
    url = join(out, file.path.replace("data/", "quarantine/", 1))
    if not bad:
        return None, ()
    promised = f"should hold {amount(bad, 'quarantined row')}"
    if url not in listed:
        return None, (f"{url}: is missing, and {promised}",)
    try:
        with open_unchanged(listed[url]) as source:
            table = pq.ParquetFile(source, page_checksum_verification=True).read()
    except (EmbedjobError, OSError, pa.ArrowException) as error:
        return None, (f"{url}: cannot be read: {error}",)
    rows = len(table["row"].unique()) if _split(claim) else len(table)
    return table, () if rows == bad else (f"{url}: has {amount(rows, 'row')}, and {promised}",)


def _rows(table: pa.Table, file: SnapshotFile, claim: Claim) -> Iterator[str]:
    rows = table["row"].to_numpy().astype(np.int64)
    if not lines_in_order(table, gaps=_split(claim)):
        yield "its rows are repeated or out of order"
    if len(rows) and (rows[0] < file.start or rows[-1] >= file.stop):
        yield f"rows {rows[0]} to {rows[-1]} are not all inside {file.start} to {file.stop}"
    if pc.any(pc.not_equal(table["shard"], file.shard)).as_py():
        yield "it holds rows of another shard"
    try:
        vectors = vectors_of(table["embedding"]).astype(np.float32)
    except ValueError as error:
        yield str(error)
        return
    if not np.isfinite(vectors).all():
        yield "a vector is not finite"
    elif len(vectors) and _is_floating(table) and _normalized(claim):
        worst = float(np.abs(np.linalg.norm(vectors, axis=1) - 1).max())
        if worst > NORM_TOLERANCE:
            yield f"a vector's norm is off by {worst:.2g}"


def _is_floating(table: pa.Table) -> bool:
    return bool(pa.types.is_floating(table.schema.field("embedding").type.value_type))


def _split(claim: Claim) -> bool:
    return claim.recipes["document"].get("long_text") == "split"


def _normalized(claim: Claim) -> bool:
    finish = claim.recipes["document"].get("finish") or [{}]
    return "normalize" in finish[-1]
