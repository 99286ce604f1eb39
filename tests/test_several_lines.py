"""A job whose rows have several lines: real Ray, real Parquet, and `verify` at the end."""

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from embedjob.encoder.encoder import Encoder
from embedjob.output.snapshot import newest_snapshot, open_snapshot
from embedjob.reports.verify import verify
from tests import running
from tests.cluster import Cluster
from tests.outputs import published
from tests.running import texts, write_shard

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_long_texts_are_embedded_part_by_part(
    cluster: Cluster, model: Path, tmp_path: Path
) -> None:
    """Twelve rows in two chunks: long ones, one of them twice, short ones and a null."""
    bodies: list[str | None] = [text + " fox" * (5 * row) for row, text in enumerate(texts(12))]
    bodies[3], bodies[8] = None, bodies[6]
    write_shard(tmp_path / "in" / "a.parquet", bodies, group_rows=10)
    late = {"templates": ["{text}"], "max_tokens": 16, "long_text": "late_chunk"}
    document = running.job(
        tmp_path / "in",
        tmp_path / "out",
        model,
        encoder=late,
        run={"max_quarantined": 0.2},
    )
    ran = running.run(document, tmp_path, "--address", cluster.address)
    assert ran.code == 0, ran.err
    running.require_sum(ran.summary)
    counted = [ran.summary[key] for key in ("rows", "embedded", "deduplicated", "quarantined")]
    assert counted == [12, 10, 1, 1]

    out = str(tmp_path / "out")
    report = verify(out)
    assert (report.problems, report.files, report.rows) == ((), 2, 11)
    table = published(out)
    assert table.column_names[-3:] == ["part", "char_start", "char_stop"]
    assert open_snapshot(out).count_rows() == len(table)
    snapshot = newest_snapshot(out)
    assert snapshot is not None
    assert snapshot.counts["rows"] == 12
    assert sum(file.rows for file in snapshot.files) == len(table)

    good = [body for body in bodies if body is not None]
    encoder = Encoder.from_output(out)
    vectors, lines = encoder.encode_parts(good)
    assert lines.counts.max() > 3
    rows = np.repeat([row for row, body in enumerate(bodies) if body is not None], lines.counts)
    assert table["row"].to_pylist() == rows.tolist()
    assert pc.max(table["part"]).as_py() == lines.counts.max() - 1
    chars = np.stack([table["char_start"].to_numpy(), table["char_stop"].to_numpy()], axis=1)
    assert lines.chars is not None
    assert chars.tolist() == lines.chars.tolist()
    found = np.stack(table["embedding"].to_pylist())
    assert (found * vectors).sum(axis=1).min() >= 0.99999
    query = encoder.encode(["fox"], role="query")
    assert query.shape == (1, 32)

    again = running.run(document, tmp_path, "--address", cluster.address)
    assert (again.code, again.summary["chunks_written"]) == (0, 0)
