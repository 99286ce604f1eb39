"""Real shards, chunks and finished rows for the tests of this folder."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedjob.config.job import Input, Job, Output, Run
from embedjob.config.recipe import Recipe
from embedjob.input.chunks import Chunk, Shard
from embedjob.input.columns import Standing, columns_of
from embedjob.input.footers import Decoder, Footer
from embedjob.input.json_lines import is_json_lines, scan_lines
from embedjob.input.listing import find_files, read_batch
from embedjob.job.input_listing import InputListing
from embedjob.job.planning import JobPlan, plan
from embedjob.job.resolve import IdentifiedJob
from embedjob.models.architecture import HeadWidths, ModelInfo
from embedjob.output.schema import OutputSpec, output_spec_of
from embedjob.output.snapshot import Snapshot
from embedjob.storage.objects import Stored

FINGERPRINT = "f" * 64
WIDTH = 4


def write_shard(
    path: Path, columns: Mapping[str, Any] | pa.Table, *, group_rows: int = 1000
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
    pq.write_table(table, path, row_group_size=group_rows)


def footers_of(shards: Sequence[Shard], job_input: Input) -> dict[str, Footer | str]:
    """The footers, decoded in this process, which is faster to start than another."""
    wanted = columns_of(job_input).wanted
    lines = [shard for shard in shards if is_json_lines(shard.url)]
    others = [shard.stored for shard in shards if shard not in lines]
    scanned = {shard.url: scan_lines(shard.stored, wanted) for shard in lines}
    return read_batch(others, Decoder(wanted).decode_all) | scanned


def job_of(job_input: Input, *, chunk_rows: int = 10, limit: int | None = None) -> IdentifiedJob:
    """A job of this input, whose model is never opened."""
    config = Job(
        input=job_input,
        encoder=Recipe(model="m"),
        output=Output(path="out", chunk_rows=chunk_rows),
        run=Run(limit=limit),
    )
    return IdentifiedJob(
        config=config,
        recipes={"document": config.encoder},
        origins={},
        folder=Path("m"),
        input_paths=(str(job_input.path),),
        model=ModelInfo(WIDTH, 1, causal=True, max_positions=None, parameters=None),
        width=WIDTH,
        heads=HeadWidths(),
        digests={},
        fingerprint=FINGERPRINT,
    )


def plan_of(
    job_input: Input,
    *,
    chunk_rows: int = 10,
    limit: int | None = None,
    listed: Sequence[Stored] = (),
    served: Snapshot | None = None,
    standing: Standing | None = None,
) -> JobPlan:
    shards = tuple(find_files(job_input.path).shards)
    listing = InputListing(shards, footers_of(shards, job_input))
    job = job_of(job_input, chunk_rows=chunk_rows, limit=limit)
    return plan(job, listing, listed=listed, served=served, standing=standing)


def output_spec(job_input: Input, types: Mapping[str, pa.DataType], **recipe: Any) -> OutputSpec:
    return output_spec_of(
        job_input,
        Recipe(model="m", **recipe),
        types=types,
        width=WIDTH,
        fingerprint=FINGERPRINT,
        output=Output(path="out"),
    )


def finished(
    rows: pa.Table, *, bad: Mapping[int, str] | None = None, dtype: Any = np.float32
) -> pa.Table:
    """What ENCODE makes of READ's rows: unit vectors that tell the rows apart."""
    numbers = rows.column("row").to_pylist()
    reasons = [(bad or {}).get(number) for number in numbers]
    reasons = [a or b for a, b in zip(reasons, rows.column("reason").to_pylist(), strict=True)]
    vectors = np.zeros((len(numbers), WIDTH), dtype)
    for place, number in enumerate(numbers):
        vectors[place, number % WIDTH] = 1
    texts = rows.column("text").to_pylist()
    bad_rows = pa.array([reason is not None for reason in reasons], pa.bool_())
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), WIDTH, mask=bad_rows)
    hashes = [hashlib.blake2b((text or "").encode(), digest_size=16).digest() for text in texts]
    return (
        rows.drop_columns(["text", "reason"])
        .append_column("text_hash", pa.array(hashes, pa.binary(16)))
        .append_column("tokens", pa.array([len(text or "") for text in texts], pa.uint32()))
        .append_column("truncated", pa.array([False] * len(texts), pa.bool_()))
        .append_column("excerpt", pa.array([text and text[:200] for text in texts], pa.string()))
        .append_column("reason", pa.array(reasons, pa.string()))
        .append_column("detail", pa.nulls(len(texts), pa.string()))
        .append_column("embedding", embedding)
    )


def strings(*values: bytes | None) -> pa.Array:
    raw = pa.array(values, pa.large_binary())
    return pa.Array.from_buffers(pa.large_string(), len(values), raw.buffers())


def only(chunks: Sequence[Chunk]) -> Chunk:
    (chunk,) = chunks
    return chunk


def spread(table: pa.Table, lines: int) -> pa.Table:
    """The same rows in so many lines each, the bad ones in one."""
    good = table.column("reason").is_null().to_numpy()
    counts = np.where(good, lines, 1)
    source = np.repeat(np.arange(len(table)), counts)
    part = np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)
    return table.take(pa.array(source)).append_column("part", pa.array(part, pa.uint32()))
