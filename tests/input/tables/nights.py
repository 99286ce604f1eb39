"""What a job reads of a table, and nights over it, without a model and without Ray."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedjob.config.job import Input, InputTable
from embedjob.input.reading import read_chunk
from embedjob.job.input_listing import InputListing, list_input
from embedjob.job.output import is_published
from embedjob.job.planning import JobPlan, plan
from embedjob.job.publishing import snapshot_of
from embedjob.output.committing import commit
from embedjob.output.file_names import data_directory
from embedjob.output.snapshot import Snapshot, newest_snapshot, publish
from embedjob.storage.objects import list_files
from tests.shards import FINGERPRINT, finished, job_of, output_spec


def input_of(format: Any, uri: Any, **given: Any) -> Input:
    table = {name: given.pop(name) for name in ("version", "catalog") if name in given}
    columns = {"text": "t", "id": "n", **given}
    return Input(table=InputTable(format=format, uri=str(uri), **table), **columns)


def planned(job_input: Input, out: str = "out", chunk_rows: int = 3) -> JobPlan:
    served = newest_snapshot(out) if out != "out" else None
    listing: InputListing = list_input(job_input, served)
    listed = [] if out == "out" else list_files(data_directory(out, FINGERPRINT))
    return plan(job_of(job_input, chunk_rows=chunk_rows), listing, listed=listed, served=served)


def rows_of(job_input: Input) -> Counter[tuple[Any, ...]]:
    """Every row that a job reads: id, text, and what it keeps."""
    made = planned(job_input)
    assert not made.faults, made.faults
    found: Counter[tuple[Any, ...]] = Counter()
    for chunk in made.chunks:
        table = read_chunk(chunk, job_input)
        names = ["id", "text", *(f"keep.{name}" for name in job_input.keep)]
        columns = [table.column(name) for name in names]
        for name, column in zip(job_input.keep, columns[2:], strict=True):
            assert column.type == made.types[name] or column.null_count == len(column)
        found.update(zip(*(column.to_pylist() for column in columns), strict=True))
    return found


def own_rows(table: Any, *names: str) -> Counter[tuple[Any, ...]]:
    """The same rows as the format's own library reads them."""
    read = pa.table(table)
    return Counter(zip(*(read[name].to_pylist() for name in names), strict=True))


@dataclass
class Nights:
    """An output, and what each night has embedded."""

    out: str
    embedded: list[list[str]] = field(default_factory=list)

    def night(self, job_input: Input) -> Snapshot:
        made = planned(job_input, self.out)
        assert not made.faults, made.faults
        spec = output_spec(job_input, made.types)
        done: list[str] = []
        for chunk in made.left:
            rows = read_chunk(chunk, job_input)
            done += rows["text"].to_pylist()
            commit(self.out, chunk, finished(rows), rows_in=len(rows), spec=spec)
        self.embedded.append(sorted(done))
        listed = list_files(data_directory(self.out, FINGERPRINT))
        epoch = 1 if made.served is None else made.served.epoch + 1
        publish(self.out, snapshot_of(made, epoch=epoch, listed=listed))
        served = newest_snapshot(self.out)
        assert served is not None
        assert is_published(planned(job_input, self.out), served)
        return served

    def ids(self, snapshot: Snapshot) -> list[int]:
        """The ids that a reader of a snapshot sees."""
        tables = [
            pq.read_table(f"{self.out}/{file.path}", columns=["id"]) for file in snapshot.files
        ]
        return sorted(pa.concat_tables(tables)["id"].to_pylist())
