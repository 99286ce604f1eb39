"""The reuse of vectors in this process, without Ray: its own functions, one after the other."""

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedjob.errors import EmbedjobError
from embedjob.job.planning import JobPlan
from embedjob.job.reusable import old_files
from embedjob.output.snapshot import published, read_snapshot
from embedjob.stages.reuse.old_vectors import carried_of, gathered, old_keys
from embedjob.stages.reuse.take_over import new_keys
from embedjob.stages.reuse.text_keys import join_partition
from embedjob.storage.objects import stat

PARTS = 3


def old_lines(plan: JobPlan) -> Mapping[str, pa.Table]:
    """The lines that each chunk takes over, by its name."""
    files, carried = old_files(plan), carried_of(plan)
    if not len(files) or carried is None:
        return {}
    bare = plan.job.config.input.model_copy(update={"id": None, "keep": ()})
    texts, _ = new_keys([*enumerate(plan.left)], bare, row_texts)
    every = files.take(range(len(files)))
    olds = old_keys(every, carried)
    places = [join_partition(part, PARTS, [texts], [olds])[0] for part in range(PARTS)]
    made = gathered(every, places, carried).table
    return {
        plan.left[number].key: made.filter(pc.equal(made["chunk"], number)).drop_columns(["chunk"])
        for number in set(made["chunk"].to_pylist())
    }


def row_texts(rows: pa.Table) -> Sequence[str]:
    """The distinct good texts of rows, where each is embedded whole."""
    texts: Sequence[str] = rows.filter(rows["reason"].is_null())["text"].unique().to_pylist()
    return texts


def hashes_there(out: str) -> set[bytes]:
    """The hashes of all texts with a vector in a file that a snapshot names, read row by row."""
    found: set[bytes] = set()
    for epoch in published(out):
        try:
            snapshot = read_snapshot(out, epoch)
        except (EmbedjobError, OSError):
            continue
        for file in snapshot.files:
            stored = stat(f"{out}/{file.path}")
            if stored is None or stored.etag != file.etag:
                continue
            rows = pq.read_table(stored.url, columns=["text_hash", "embedding"]).to_pylist()
            found |= {row["text_hash"] for row in rows if row["embedding"] is not None}
    return found
