"""Failures by stage: a chunk that fails in any stage is named alone, in bounded time."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from embedjob import pipeline
from embedjob.errors import RefusedError
from embedjob.job.options import Options
from embedjob.job.result import Result
from embedjob.output.claim import read_claims
from embedjob.output.snapshot import newest_snapshot
from embedjob.stages import read
from embedjob.storage.objects import list_files
from tests import running, troubles
from tests.cluster import Cluster
from tests.encoder.tiny import save_chat
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
GENERATING = [*(f"generate-{how}" for how in WORDS), "generate-busy"]
GENERATE = {
    "kinds": {"shorter": {"instruction": "Say less."}},
    "max_new_tokens": 6,
    "max_prompt_tokens": 200,
}


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
    _require_named_alone(result, CELLS, tmp_path / "out", time.monotonic() - started)


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_chunk_in_trouble_while_texts_are_made_of_it_is_named_alone(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All cells in one run, and in one parcel, with a chunk that is sound."""
    for number, name in enumerate([*GENERATING, "good"]):
        write_shard(tmp_path / "in" / f"{name}.parquet", [f"{name} {i}" for i in range(6 + number)])
    out, chat = tmp_path / "out", save_chat(tmp_path)
    document = running.job(
        tmp_path / "in", out, chat, generate=GENERATE, run={"stall_seconds": STALL_SECONDS}
    )
    monkeypatch.setattr(read, "_PARCELS_PER_ACTOR", 1)
    started = time.monotonic()
    (tmp_path / "log").mkdir()
    options, engine_of = Options(address=cluster.address), troubles.generating(tmp_path / "log")
    result = running.run_with(document, options, engine_of)
    _require_named_alone(result, GENERATING, out, time.monotonic() - started)
    # What was not made was not put.
    assert len(list_files(str(out / "generations"))) == 2
    assert (result.summary.generated, result.summary.generation_fallbacks) != (0, 0)


def _require_named_alone(result: Result, cells: Sequence[str], out: Path, seconds: float) -> None:
    """The chunks of lethal cells are named with what befell them, and the others committed."""
    lethal = sorted(name for name in cells if not name.endswith("busy"))
    assert len(result.faults) == len(lethal), result.faults
    for fault, name in zip(sorted(result.faults), lethal, strict=True):
        stage, _, how = name.partition("-")
        assert f"{name}.parquet: rows 0 to " in fault
        assert WORDS[how] in fault
        assert how == "memory" or f"its {stage} process" in fault
    assert len(written(out)) == len(cells) + 1 - len(lethal)
    # Each hang costs three attempts of half a stall; encoders hang one after the other.
    hangs = sum(name.endswith("hangs") for name in cells)
    assert seconds < 120 + 90 * hangs + 30 * len(lethal)


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
    assert (read_claims(str(out)), written(out), newest_snapshot(str(out))) == ((), {}, None)
