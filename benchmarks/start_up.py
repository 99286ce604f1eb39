"""Three rows of all-MiniLM on a local Ray as a whole process: start-up is nearly all of it.

With another checkout as `--old` both run in turns, from the start of Python to its exit, and must
give the same vectors; without it there are only seconds. "Run" is what the summary counts,
"around it" the interpreter, the imports and the end of the process.

    python -m benchmarks.start_up [--old PATH] [--rounds 3]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measuring.claims import Claim, report
from benchmarks.measuring.machine import watched
from benchmarks.measuring.texts import MINILM
from benchmarks.measuring.turns import Turns, least_cosine, take_turns

ROOT = Path(__file__).parents[1]
PACKAGES = ("ray", "torch", "transformers")
TEXTS = ("How do I learn to cook?", "What is the best way to save money?", "Why is the sky blue?")
AIM = 0.6


@dataclass(frozen=True)
class Start:
    """One whole process: the run's seconds, those around it, and its vectors [rows, width]."""

    run: float
    around: float
    vectors: npt.NDArray[np.float32]


def write_job(work: Path) -> Path:
    """Write a shard of the texts and a job file over it; return the job file."""
    shard = work / "in" / "texts.parquet"
    shard.parent.mkdir()
    pq.write_table(pa.table({"text": TEXTS}), shard)
    job = {
        "input": {"path": str(shard.parent), "text": "text"},
        "encoder": {"model": MINILM, "dtype": "float32"},
        "pool": {"gpus_per_actor": 0},
        "output": {"path": str(work / "out")},
    }
    # JSON is YAML, too.
    file = work / "job.yaml"
    file.write_text(json.dumps(job), encoding="utf-8")
    return file


def start(tree: Path, job: Path) -> Start:
    """Run the job once by the checkout in `tree`, to an output of its own."""
    with tempfile.TemporaryDirectory(dir=job.parent) as out:
        command = [sys.executable, "-m", "embedjob", "run", str(job), "--json"]
        started = time.perf_counter()
        done = subprocess.run(
            [*command, "--set", f"output.path={out}/out"],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        whole = time.perf_counter() - started
        (file,) = Path(out, "out", "data").glob("*/*.parquet")
        vectors = np.stack(pq.read_table(file)["embedding"].to_numpy())
    run = float(json.loads(done.stdout.splitlines()[-1])["seconds"])
    return Start(run, whole - run, vectors)


def measure(trees: Mapping[str, Path], rounds: int) -> tuple[Turns[Start], dict[str, float]]:
    """Start the job by every tree in turns; return the turns, and median seconds of each part."""
    starts: dict[str, list[Start]] = {way: [] for way in trees}

    def timed(way: str, job: Path) -> Start:
        starts[way].append(start(trees[way], job))
        return starts[way][-1]

    with tempfile.TemporaryDirectory() as folder:
        job = write_job(Path(folder))
        turns = take_turns({way: partial(timed, way, job) for way in trees}, rounds=rounds)
    figures: dict[str, float] = {}
    for way, taken in starts.items():
        figures[f"{way}, whole process, s"] = turns.median(way)
        figures[f"{way}, run, s"] = statistics.median(one.run for one in taken)
        figures[f"{way}, around it, s"] = statistics.median(one.around for one in taken)
    return turns, figures


def compared(turns: Turns[Start]) -> Claim:
    """Return the claim that the new start takes at most AIM of the old one's time."""
    old, new = turns.results["old"].vectors, turns.results["new"].vectors
    return Claim(
        "start-up, new over old",
        turns.ratio("new", "old"),
        spread=turns.ratios("new", "old"),
        ceiling=AIM,
        cosine=least_cosine(old, new),
    )


def main() -> None:
    """Prints every figure, and all of them as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--old", type=Path, help="another checkout, to be run in turns with this")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    trees = {"new": ROOT}
    if asked.old:
        trees = {"old": asked.old.resolve(), "new": ROOT}
    with watched(PACKAGES, threads=os.cpu_count() or 1) as machine:
        turns, figures = measure(trees, asked.rounds)
    claims = [compared(turns)] if asked.old else []
    report(claims, figures, asked=vars(asked), machine=machine)


if __name__ == "__main__":
    main()
