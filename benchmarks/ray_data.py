"""A whole job of ours against Ray Data with sentence-transformers, Parquet to Parquet, in turns.

The peer is what Ray's documentation shows: read_parquet, map_batches of a class that holds the
model in an ActorPoolStrategy, write_parquet; with the best batch sizes and number of actors of
several, found on a small sample. Both run all-MiniLM in float32 on one local Ray that this program
starts. Rows per second are marginal: (rows of a large run - rows of a small one) over the same of
seconds, so that start-up, which is reported apart, does not blur them.

    python -m benchmarks.ray_data [--corpora reuters quora reviews] [--rounds 2] [--scale 1.0]
"""

import argparse
import itertools
import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measuring.claims import Claim, report
from benchmarks.measuring.encoders import Batch, Vectors, minilm_peer, peer_encode
from benchmarks.measuring.jobs import Place, Setting, ours, peer
from benchmarks.measuring.machine import watched
from benchmarks.measuring.texts import corpus, duplicates, sample
from benchmarks.measuring.turns import Turns, least_cosine, quickest, take_turns
from benchmarks.measuring.workers import Workers

PACKAGES = ("ray", "torch", "transformers", "sentence-transformers", "pyarrow")
# Reviews, which are all cut, have none: what they give is reported.
FLOORS = {"reuters": 1.2, "quora": 1.35, "reviews": None}
ROWS = {"reuters": (160, 640), "quora": (1024, 8192), "reviews": (96, 384)}
SIZES = ("small", "large")
FILES = 4
STORE_BYTES = 500 * 10**6


class Drivers:
    """Two processes that each drive one side's jobs, one after the other, on one Ray."""

    def __init__(self, work: Path, address: str) -> None:
        """Starts them."""
        spawn = multiprocessing.get_context("spawn")
        self._sides = {name: ProcessPoolExecutor(1, mp_context=spawn) for name in ("ours", "peer")}
        self._work, self._address = work, address
        self._numbers = itertools.count()

    def run(self, side: str, job: Callable[[Place], Any], rows: str) -> tuple[Path, Any]:
        """Where a job left its vectors, and what it returned."""
        out = self._work / f"{side}-{next(self._numbers)}"
        place = Place(self._address, str(self._work / rows), str(out))
        return out, self._sides[side].submit(job, place).result()

    def end(self) -> None:
        """Ends them."""
        for side in self._sides.values():
            side.shutdown()


def store(texts: Sequence[str], folder: Path) -> None:
    """The texts as Parquet, in as many files for small and large."""
    folder.mkdir(parents=True)
    borders = np.linspace(0, len(texts), FILES + 1).astype(int).tolist()
    for start, stop in itertools.pairwise(borders):
        ids = pa.array(range(start, stop), pa.int64())
        table = pa.table({"id": ids, "text": texts[start:stop]})
        pq.write_table(table, folder / f"{start:08}.parquet")


def vectors(out: Path) -> Vectors:
    """All embeddings of a folder of Parquet files in the order of their ids."""
    files = sorted(out.rglob("*.parquet"))
    table = pa.concat_tables(pq.read_table(f, columns=["id", "embedding"]) for f in files)
    order = np.argsort(table["id"].to_numpy())
    return np.stack(table["embedding"].to_pylist()).astype(np.float32)[order]


def best_setting(drivers: Drivers, name: str, small: Sequence[str], cores: int) -> Setting:
    """The peer's quickest: rows per call and batch size in one process, then its actors on Ray.

    The calls are such that there is one for every actor of the small run at least.
    """
    few = list(small[: len(small) // cores])
    single = Workers(partial(peer_encode, minilm_peer), count=1, threads=1).ready()

    def calls(setting: Setting) -> None:
        for start in range(0, len(few), setting.rows_per_call):
            single(Batch(few[start : start + setting.rows_per_call], setting.batch_size))

    per_call = [max(1, len(small) // (calls_each * cores)) for calls_each in (2, 1)]
    settings = [Setting(cores, 1, *each) for each in itertools.product(per_call, (16, 32, 64))]
    calls(settings[0])
    best = quickest(settings, calls, warm=False)
    single.end()
    layouts = (best, best._replace(actors=1, threads=cores))
    run = partial(drivers.run, "peer", rows=f"{name}-small")
    return quickest(layouts, lambda one: run(job=partial(peer, setting=one)), warm=False)


def compare(name: str, drivers: Drivers, work: Path, asked: argparse.Namespace) -> Any:
    """Our marginal ratio on one corpus, and what it rests on."""
    whole = corpus(name)
    counts = {size: int(asked.scale * rows) for size, rows in zip(SIZES, ROWS[name], strict=True)}
    texts = {size: sample(whole, rows) for size, rows in counts.items()}
    for size in SIZES:
        store(texts[size], work / f"{name}-{size}")
    setting = asked.peer and Setting(*asked.peer)
    if setting is None:
        setting = best_setting(drivers, name, texts["small"], asked.threads)
    jobs = {"peer": partial(peer, setting=setting), "ours": ours}
    drivers.run("ours", ours, f"{name}-small")
    turns = take_turns(
        {
            f"{side} {size}": partial(drivers.run, side, jobs[side], f"{name}-{size}")
            for size, side in itertools.product(SIZES, jobs)
        },
        rounds=asked.rounds,
    )
    more = len(texts["large"]) - len(texts["small"])
    rates = {side: more / _marginal(turns, side) for side in jobs}
    each = {side: [more / one for one in _marginals(turns, side)] for side in jobs}
    outs = {side: turns.results[f"{side} large"][0] for side in jobs}
    summary = turns.results["ours large"][1]
    claim = Claim(
        f"all-MiniLM, {name}, whole job against Ray Data + sentence-transformers",
        rates["ours"] / rates["peer"],
        spread=[one / other for one, other in zip(each["ours"], each["peer"], strict=True)],
        floor=FLOORS[name],
        cosine=least_cosine(vectors(outs["peer"]), vectors(outs["ours"] / "data")),
    )
    figures = {f"{name}, {side}, marginal rows/s": rate for side, rate in rates.items()}
    for side in jobs:
        small = turns.median(f"{side} small")
        figures[f"{name}, {side}, start-up, s"] = small - len(texts["small"]) / rates[side]
    figures |= {
        f"{name}, peer's setting": str(setting),
        f"{name}, duplicates": duplicates(texts["large"]),
        f"{name}, duplicates found in chunks": summary["deduplicated"] / summary["rows"],
        f"{name}, our time": summary["time_share"],
    }
    return [claim], figures


def _marginals(turns: Turns[Any], side: str) -> list[float]:
    pairs = zip(turns.seconds[f"{side} large"], turns.seconds[f"{side} small"], strict=True)
    return [large - small for large, small in pairs]


def _marginal(turns: Turns[Any], side: str) -> float:
    return turns.median(f"{side} large") - turns.median(f"{side} small")


def main() -> None:
    """Prints every figure, and all of them as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpora", nargs="+", choices=FLOORS, default=list(FLOORS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="cores of the local Ray")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="rows, as a multiple of the default"
    )
    parser.add_argument(
        "--peer", nargs=4, type=int, metavar=Setting._fields, help="known best, not searched for"
    )
    asked = parser.parse_args()
    corpus("quora")
    from ray.cluster_utils import Cluster

    resources = {"num_cpus": asked.threads, "object_store_memory": STORE_BYTES}
    claims: list[Claim] = []
    figures: dict[str, Any] = {}
    with watched(PACKAGES, threads=asked.threads) as machine, tempfile.TemporaryDirectory() as work:
        cluster = Cluster(initialize_head=True, head_node_args=resources)
        drivers = Drivers(Path(work), cluster.address)
        try:
            for name in asked.corpora:
                found, measured = compare(name, drivers, Path(work), asked)
                claims += found
                figures |= measured
        finally:
            drivers.end()
            cluster.shutdown()
    report(claims, figures, asked=vars(asked), machine=machine)


if __name__ == "__main__":
    main()
