"""A published output, made by the project's own functions."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embedjob.config.job import Input
from embedjob.config.recipe import Recipe
from embedjob.input.reading import read_chunk
from embedjob.job.publishing import snapshot_of
from embedjob.output.calibration import Calibration
from embedjob.output.claim import Claim, Probes, put_claim
from embedjob.output.committing import commit
from embedjob.output.file_names import data_directory
from embedjob.output.schema import schema_text
from embedjob.output.snapshot import publish
from embedjob.storage.objects import list_files
from embedjob.vectors.quantizing import CALIBRATED, quantize
from tests.shards import FINGERPRINT, WIDTH, finished, output_spec, plan_of, spread, write_shard

CALIBRATION = Calibration.of(np.array([[-1] * WIDTH, [0.9] * WIDTH], np.float32), vectors=9)


def as_passages(rows: pa.Table) -> pa.Table:
    """Three passages of each row, of which one is bad."""
    table = spread(finished(rows), 3)
    places = zip(table["row"].to_pylist(), table["part"].to_pylist(), strict=True)
    lost = [place == (13, 1) for place in places]
    reasons = table["reason"].to_pylist()
    reason = ["model_error" if one else old for one, old in zip(lost, reasons, strict=True)]
    at = table.schema.get_field_index("reason")
    table = table.set_column(at, "reason", pa.array(reason, pa.string()))
    start = pa.array([10 * part for part in table["part"].to_pylist()], pa.uint32())
    stop = pa.array([10 * part + 10 for part in table["part"].to_pylist()], pa.uint32())
    return table.append_column("char_start", start).append_column("char_stop", stop)


def output(
    tmp_path: Path,
    encode: Callable[[pa.Table], pa.Table] = finished,
    vector_list: Any = "fixed",
    **knobs: Any,
) -> Path:
    """Two shards of 25 texts, one of which is null, embedded and published below `tmp_path`."""
    for number in range(2):
        texts = [None if row == 3 else f"{number} {row}" for row in range(25)]
        write_shard(tmp_path / "in" / f"{number}.parquet", {"t": texts}, group_rows=5)
    job_input, out = Input(path=str(tmp_path / "in"), text="t"), tmp_path / "out"
    plan = plan_of(job_input)
    ours = output_spec(job_input, plan.types, **knobs)
    ours = replace(ours, vector_list=vector_list)
    dtype = knobs.get("vector_dtype", "float32")
    if dtype != "float32":
        by = partial(quantize, dtype=dtype, ranges_2D=CALIBRATION.array)
        ours = replace(ours, quantize=by, calibration=CALIBRATION if dtype in CALIBRATED else None)
    for chunk in plan.left:
        rows = read_chunk(chunk, job_input)
        commit(str(out), chunk, encode(rows), rows_in=len(rows), spec=ours)
    recipe = Recipe(model="m", **knobs).model_dump(mode="json", exclude_none=True)
    claim = Claim(
        chunk_rows=10,
        fingerprint=FINGERPRINT,
        recipes={"document": recipe},
        digests={},
        schema=schema_text(ours.stored),
        probes=Probes((), (), ()),
        versions={},
        calibration=ours.calibration,
    )
    put_claim(str(out), claim)
    listed = list_files(data_directory(str(out), FINGERPRINT))
    publish(str(out), snapshot_of(plan, epoch=1, listed=listed))
    return out
