"""A whole run in trouble, compared with the run of the same job that nothing troubled."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from embedjob.job.options import Options
from embedjob.output.snapshot import newest_snapshot, open_snapshot
from tests import running
from tests.cluster import Cluster
from tests.engines import counting, texts_encoded
from tests.running import Job


@dataclass(frozen=True)
class Done:
    """What a run published, the texts that went through its encoders, and its seconds."""

    rows: pa.Table
    files: list[tuple[str, int]]
    encoded: int
    seconds: float

    def beside(self, quiet: "Done") -> str:
        """The price of the trouble."""
        extra = self.encoded / quiet.encoded - 1
        return f"{extra:.0%} texts encoded again; {self.seconds:.1f} s, quiet {quiet.seconds:.1f} s"

    def require_equal(self, quiet: "Done") -> None:
        """The same files of the same rows, and the same vectors."""
        assert self.files == quiet.files
        columns = [name for name in quiet.rows.column_names if name != "embedding"]
        assert self.rows.select(columns) == quiet.rows.select(columns)
        ours, theirs = (np.stack(rows["embedding"].to_pylist()) for rows in (self.rows, quiet.rows))
        assert np.abs(ours - theirs).max() < 1e-6


def done(
    document: Job, cluster: Cluster, log: Path, *, calm: Callable[[], object] = lambda: None
) -> Done:
    """Run a job to its end; `calm` ends the trouble before the output is read."""
    started = time.monotonic()
    result = running.run_with(document, Options(address=cluster.address), counting(log))
    seconds = time.monotonic() - started
    calm()
    out = document["output"]["path"]
    assert result.faults == ()
    assert running.command("verify", out, "--json").summary["problems"] == []
    snapshot = newest_snapshot(out)
    assert snapshot is not None
    files = [(file.name, file.rows) for file in snapshot.files]
    return Done(open_snapshot(out).to_table(), files, texts_encoded(log), seconds)
