"""Commit: check one chunk, then create its files, bad rows first, good rows last."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedjob.errors import ChunkError, OutputError
from embedjob.input.chunks import Chunk
from embedjob.input.column_types import plain_type
from embedjob.output.chunk_file import (
    FINGERPRINT_KEY,
    Committed,
    committed,
    data_table,
    file_bytes,
    file_metadata,
    quarantine_table,
)
from embedjob.output.file_names import data_directory, quarantine_directory, with_generation
from embedjob.output.row_checks import check_head_columns, check_rows, checked_vectors, first_lines
from embedjob.output.schema import PART, STORED, OutputSpec
from embedjob.storage.objects import Stored, create, join, read_bytes, stat


def commit(out: str, chunk: Chunk, table: pa.Table, *, rows_in: int, spec: OutputSpec) -> Committed:
    """Check a chunk and put its file; return it, or the file that was there and agrees with it.

    `rows_in` is the number of rows that READ gave. ChunkError when the rows do not add up, when a
    vector is not as promised, or when the file that is there holds something else.
    """
    check_rows(table, chunk, rows_in=rows_in, spec=spec)
    vectors = checked_vectors(table, chunk, spec=spec)
    check_head_columns(table, chunk, spec=spec)
    counts = count_rows(table, spec=spec)
    _put_quarantine(out, chunk, table, spec=spec, counts=counts)
    data = data_table(table, vectors, chunk.shard, spec=spec)
    name = with_generation(chunk.name, chunk.generation)
    url = join(data_directory(out, spec.fingerprint), name)
    written = create(url, file_bytes(data, chunk.shard, spec=spec, counts=counts))
    file = stat(url)
    if file is None:
        raise ChunkError(f"{url}: was deleted as soon as it was written; is a prune running?")
    if written:
        return Committed(name, len(data), file.size, file.etag, counts, written=True)
    return _agreed(file, len(data), spec)


def count_rows(table: pa.Table, *, spec: OutputSpec) -> dict[str, int]:
    """Count the chunk's rows by what became of them, and the tokens of the good rows.

    A row of several lines counts once. Rows with a vector of another file are `reused`, whether
    their texts are distinct or not. Of passages, a row with a bad line counts as bad; it is
    embedded where one of its passages is new, and else reused where one has such a vector.
    """
    if spec.passages:
        return _count_passages(table, nulls=spec.on_bad_row == "null")
    table = first_lines(table)
    good = table.column("reason").is_null()
    kept = table.filter(good)
    bad, made = len(table) - len(kept), kept
    reused: dict[str, int] = {}
    if STORED in table.column_names:
        made = kept.filter(kept.column(STORED).is_null())
        reused = {"reused": len(kept) - len(made)}
    embedded = pc.count_distinct(made.column("text_hash")).as_py()
    return {
        "rows": len(table),
        "embedded": embedded,
        **reused,
        "deduplicated": len(made) - embedded,
        "quarantined": 0 if spec.on_bad_row == "null" else bad,
        "nulls": bad if spec.on_bad_row == "null" else 0,
        "tokens": pc.sum(kept.column("tokens")).as_py() or 0,
        "truncated": pc.sum(kept.column("truncated")).as_py() or 0,
    }


def _place(spec: OutputSpec) -> list[str]:
    """Return the columns that say which line of a chunk a bad one is."""
    return ["row", PART.name] if spec.passages else ["row"]


def _count_passages(table: pa.Table, *, nulls: bool) -> dict[str, int]:
    """Count rows by what became of their passages, and the tokens of the good passages."""
    rows, bad = table.column("row").to_numpy(), table.column("reason").is_valid().to_numpy()
    reuses = STORED in table.column_names
    taken = table.column(STORED).is_valid().to_numpy() if reuses else np.zeros(len(rows), np.bool_)
    made = ~bad & ~taken
    hashes = table.column("text_hash").combine_chunks().filter(pa.array(made))
    _, firsts = np.unique(pc.dictionary_encode(hashes).indices.to_numpy(), return_index=True)
    lost = np.unique(rows[bad])
    embedded = np.setdiff1d(rows[made][firsts], lost)
    reused = np.setdiff1d(rows[taken], np.concatenate([lost, embedded]))
    cut = ~bad & table.column("truncated").to_numpy()
    every = len(np.unique(rows))
    return {
        "rows": every,
        "embedded": len(embedded),
        **({"reused": len(reused)} if reuses else {}),
        "deduplicated": every - len(lost) - len(embedded) - len(reused),
        "quarantined": 0 if nulls else len(lost),
        "nulls": len(lost) if nulls else 0,
        "tokens": int(table.column("tokens").to_numpy()[~bad].sum()),
        "truncated": len(np.setdiff1d(rows[cut], lost)),
    }


def _agreed(file: Stored, rows: int, spec: OutputSpec) -> Committed:
    """Return the file that is there, if its rows, schema and fingerprint are the same as ours."""
    try:
        metadata = file_metadata(file)
        existing = committed(file, metadata)
    except OutputError as error:
        raise ChunkError(f"{error}; `run --repair` makes the chunk again") from error
    schema = metadata.schema.to_arrow_schema()
    fingerprint = metadata.metadata[FINGERPRINT_KEY].decode()
    for what, theirs, ours in (
        ("rows", existing.rows, rows),
        ("fingerprint", fingerprint[:12], spec.fingerprint[:12]),
        ("columns", _described(schema), _described(spec.stored)),
    ):
        if theirs != ours:
            raise ChunkError(
                f"{file.url}: the name is taken by a file with {what} {theirs}, but this chunk has"
                f" {ours}; `run --repair` makes the chunk again"
            )
    return existing


def _put_quarantine(
    out: str, chunk: Chunk, table: pa.Table, *, spec: OutputSpec, counts: Mapping[str, int]
) -> None:
    """Put the bad rows; ChunkError when other bad rows of this chunk are there already."""
    name = with_generation(chunk.name, chunk.generation)
    url = join(quarantine_directory(out, spec.fingerprint), name)
    rows: list[dict[str, int]] = []
    if counts["quarantined"]:
        bad = table.filter(table.column("reason").is_valid())
        file = quarantine_table(bad, chunk.shard, spec=spec)
        if create(url, file_bytes(file, chunk.shard, spec=spec, counts=counts)):
            return
        rows = bad.select(_place(spec)).to_pylist()
    elif stat(url) is None:
        return
    existing = pq.read_table(pa.BufferReader(read_bytes(url)), columns=_place(spec))
    if existing.to_pylist() != rows:
        raise ChunkError(
            f"{url}: an earlier attempt at this chunk quarantined other rows ({len(existing)} then,"
            f" {len(rows)} now); `run --repair` makes the chunk again"
        )


def _described(schema: pa.Schema) -> str:
    """Return the columns with their plain types: Parquet has names of its own for list items."""
    return ", ".join(f"{field.name}: {plain_type(field.type)}" for field in schema)
