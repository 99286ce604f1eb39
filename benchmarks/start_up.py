"""Three rows of all-MiniLM on a local Ray as a whole process: start-up is nearly all of it.

The peer is what Ray's documentation shows, with one actor of sentence-transformers: it pays for
Ray, torch and transformers as well, and checks and keeps nothing. It and ours run in turns, from
the start of Python to its exit, and give the same vectors; with `--old` another checkout does, too.
"Run" is what the summary counts, "around it" the interpreter, the imports and the end of the
process.

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
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measuring.claims import Claim, report
from benchmarks.measuring.jobs import Place, Setting, peer
from benchmarks.measuring.machine import watched
from benchmarks.measuring.texts import MINILM
from benchmarks.measuring.turns import Turns, least_cosine, take_turns

ROOT = Path(__file__).parents[1]
PACKAGES = ("ray", "torch", "transformers", "sentence-transformers")
TEXTS = ("How do I learn to cook?", "What is the best way to save money?", "Why is the sky blue?")
# Of the peer's time, and of another checkout's.
PEER, AIM = 1.0, 0.6


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


def start_peer(job: Path) -> npt.NDArray[np.float32]:
    """Run Ray Data's own pipeline over the job's shard, in a process; return its vectors."""
    with tempfile.TemporaryDirectory(dir=job.parent) as out:
        places = [str(job.parent / "in"), f"{out}/out"]
        subprocess.run(
            [sys.executable, "-m", "benchmarks.start_up", "--peer", *places],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return np.stack(pq.read_table(f"{out}/out")["embedding"].to_numpy())


def measure(trees: Mapping[str, Path], rounds: int) -> tuple[Turns[Any], dict[str, float]]:
    """Start the peer and the job by every tree in turns; return the turns, and median seconds."""
    starts: dict[str, list[Start]] = {way: [] for way in trees}

    def timed(way: str, job: Path) -> npt.NDArray[np.float32]:
        starts[way].append(start(trees[way], job))
        return starts[way][-1].vectors

    with tempfile.TemporaryDirectory() as folder:
        job = write_job(Path(folder))
        ways: dict[str, Any] = {"peer": partial(start_peer, job)}
        ways |= {way: partial(timed, way, job) for way in trees}
        turns: Turns[Any] = take_turns(ways, rounds=rounds)
    figures = {f"{way}, whole process, s": turns.median(way) for way in ways}
    for way, taken in starts.items():
        figures[f"{way}, run, s"] = statistics.median(one.run for one in taken)
        figures[f"{way}, around it, s"] = statistics.median(one.around for one in taken)
    return turns, figures


def compared(turns: Turns[Any], with_way: str, most: float) -> Claim:
    """Return the claim that the new start takes at most so much of another way's time."""
    return Claim(
        f"start-up, new over {with_way}",
        turns.ratio("new", with_way),
        spread=turns.ratios("new", with_way),
        ceiling=most,
        cosine=least_cosine(turns.results[with_way], turns.results["new"]),
    )


def main() -> None:
    """Prints every figure, and all of them as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--old", type=Path, help="another checkout, to be run in turns with this")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    cores = os.cpu_count() or 1
    if asked.peer:
        peer(Place("local", *asked.peer), Setting(1, cores, len(TEXTS), len(TEXTS)))
        return
    trees = {"new": ROOT}
    if asked.old:
        trees = {"old": asked.old.resolve(), "new": ROOT}
    with watched(PACKAGES, threads=cores) as machine:
        turns, figures = measure(trees, asked.rounds)
    claims = [compared(turns, "peer", PEER)]
    claims += [compared(turns, "old", AIM)] if asked.old else []
    report(claims, figures, asked=vars(asked), machine=machine)


if __name__ == "__main__":
    main()
