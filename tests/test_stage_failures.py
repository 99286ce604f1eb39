"""Failures by stage: a chunk that fails in any stage is named alone, in bounded time."""

import shutil
import time
from pathlib import Path

import pytest

from embedjob import pipeline
from embedjob.errors import RefusedError
from embedjob.job.options import Options
from embedjob.output.claim import read_claims
from embedjob.output.snapshot import newest
from embedjob.stages import read
from tests import running, troubles
from tests.cluster import Cluster
from tests.engines import replacing
from tests.outputs import written
from tests.running import write_shard

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STALL_SECONDS = 40
WORDS = {"dies": "died 3 times", "hangs": "died 3 times", "memory": "MemoryError: no room"}
CELLS = [
    *(f"{stage}-{how}" for stage in ("read", "tokenize", "encode", "write") for how in WORDS),
    "read-busy",
    "write-busy",
]


@pytest.mark.timeout(1200)
def test_a_chunk_in_trouble_is_named_alone_and_the_others_are_committed(
    cluster: Cluster, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All cells in one run: a shard for each, and one that is sound; five travel together."""
    for number, name in enumerate(CELLS):
        rows = troubles.ROWS.get(name, 6 + number)
        write_shard(tmp_path / "in" / f"{name}.parquet", [f"{name} {i}" for i in range(rows)])
    write_shard(tmp_path / "in" / "good.parquet", [f"good {i}" for i in range(30)])
    document = running.job(
        tmp_path / "in", tmp_path / "out", model, run={"stall_seconds": STALL_SECONDS}
    )
    document["output"]["chunk_rows"] = 30
    (tmp_path / "log").mkdir()
    monkeypatch.setattr(pipeline, "flow", troubles.flow(tmp_path / "log"))
    monkeypatch.setattr(read, "_PARCELS_PER_ACTOR", (len(CELLS) + 1) // 5)
    started = time.monotonic()
    options = Options(address=cluster.address)
    result = running.run_with(document, options, troubles.troubled)
    lethal = sorted(name for name in CELLS if not name.endswith("busy"))
    assert len(result.faults) == len(lethal), result.faults
    for fault, name in zip(sorted(result.faults), lethal, strict=True):
        stage, _, how = name.partition("-")
        assert f"{name}.parquet: rows 0 to " in fault
        assert WORDS[how] in fault
        assert how == "memory" or f"its {stage} process" in fault
    assert len(written(tmp_path / "out")) == len(CELLS) + 1 - len(lethal)
    # Each hang costs three attempts of half a stall; encoders hang one after the other.
    hangs = sum(name.endswith("hangs") for name in CELLS)
    assert time.monotonic() - started < 120 + 90 * hangs + 30 * len(lethal)


def test_weights_that_change_after_the_plan_are_never_claimed(
    cluster: Cluster, model: Path, tmp_path: Path
) -> None:
    own, out = Path(shutil.copytree(model, tmp_path / "model")), tmp_path / "out"
    weights = own / "model.safetensors"
    other = bytearray(weights.read_bytes())
    # The exponent of a number: the model loads, and gives other vectors.
    other[-1] ^= 1
    write_shard(tmp_path / "in" / "a.parquet", running.texts(20))
    document, options = running.job(tmp_path / "in", out, own), Options(address=cluster.address)
    changed = r"model\.safetensors is another file on node .* than in the plan"
    with pytest.raises(RefusedError, match=changed):
        running.run_with(document, options, replacing(weights, bytes(other)))
    assert (read_claims(str(out)), written(out), newest(str(out))) == ((), {}, None)
