"""Whitening of many vectors: seconds, GB/s and memory, beside a pass of numpy over the same files.

Both read the embedding files of an output in one process, a batch at a time. Numpy's pass is the
least that a covariance costs, the product of each batch with itself, in float64 as ours; ours also
merges groups by Chan's update, and whitens. Memory is the peak of the process.

With --flow, a flow is trained on the vectors for one epoch instead, as a worker does it, in a
process of its own whose memory is looked at; and on a tenth of the files in another process.

    python -m benchmarks.fits [--rows 1000000] [--width 1024] [--flow]
"""

import argparse
import multiprocessing
import re
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measuring.claims import Claim, report
from benchmarks.measuring.machine import watched
from embedjob.config.fits.fit_kinds import Flow, Whiten
from embedjob.job.fit_plan import VectorSource
from embedjob.output.manifest import FileList, SnapshotFile
from embedjob.output.snapshot import Snapshot
from embedjob.stages.fits.reduce import groups_of, state_of_group, train
from embedjob.storage.objects import stat
from embedjob.vectors.fits.fit_arithmetic import applied, first_pass
from embedjob.vectors.fits.fitted import Fitted, Training

PACKAGES = ("numpy", "pyarrow")
FILE_ROWS, BATCH_ROWS, GIB = 16_384, 8192, 2**30
# The identity, but for what a million rows leave to chance.
LEAST_LIKE_IDENTITY = 1e-3


def written(folder: Path, *, rows: int, width: int) -> Snapshot:
    """Write an output's files of correlated vectors; return the snapshot that lists them."""
    numbers = np.random.default_rng(0)
    mixing_DD = (np.eye(width) + 0.1 * numbers.normal(size=(width, width))).astype(np.float32)
    files = []
    for number, start in enumerate(range(0, rows, FILE_ROWS)):
        stop = min(start + FILE_ROWS, rows)
        vectors_RD = numbers.standard_normal((stop - start, width), np.float32) @ mixing_DD + 3
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors_RD.ravel()), width)
        table = pa.table(
            {
                "row": pa.array(np.arange(stop - start), pa.uint32()),
                "embedding": embedding,
                "text_hash": pa.array([b"0" * 16] * (stop - start), pa.binary(16)),
            }
        )
        name = f"data/{number:05d}.parquet"
        (folder / "data").mkdir(exist_ok=True)
        pq.write_table(table, folder / name, compression="none", use_dictionary=False)
        stored = stat(str(folder / name))
        assert stored is not None
        shard = f"shard {number}"
        files.append(
            SnapshotFile(
                name, stop - start, stored.size, stored.etag, shard, "e", 0, stop - start, {}
            )
        )
    return Snapshot(epoch=1, fingerprint="f" * 64, files=FileList.of(files), shards=())


def whitened(source: VectorSource) -> Fitted:
    """Return the whitening of all vectors, group by group as workers compute it."""
    step = first_pass(Whiten(kind="whiten", name="w"))
    states = (state_of_group(step, group, source=source, fitted={}) for group in groups_of(source))
    assert not isinstance(step, Training)
    done = step.finish(reduce(step.merge, states))
    assert isinstance(done, Fitted)
    return done


def trained(source: VectorSource, threads: int) -> dict[str, float]:
    """Train a flow for one epoch in this process; return its seconds and its memory."""
    import torch  # before memory is looked at: it has some of its own

    torch.set_num_threads(threads)
    step = first_pass(Flow(kind="flow", name="f", epochs=1, batch_size=1024, levels=3))
    assert isinstance(step, Training)
    before, started = _memory("VmRSS"), time.perf_counter()
    made = train(step, groups_of(source), source, {}, "cpu")
    return {
        "seconds": time.perf_counter() - started,
        "memory before, of libraries, GiB": before,
        "memory at its peak, GiB": _memory("VmHWM"),
        "bits per dimension": made.facts["bits_per_dimension"],
    }


def trained_apart(source: VectorSource, threads: int) -> dict[str, float]:
    """Train a flow in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(trained, source, threads).result()


def _memory(which: str) -> float:
    """Return what this process holds, or has held at most, in GiB; not what a parent of it held."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"{which}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024 / GIB


def numpys(source: VectorSource) -> npt.NDArray[np.float64]:
    """Return the sum of the products of all vectors, in one pass."""
    total = 0.0
    for file in source.snapshot.files:
        parquet = pq.ParquetFile(f"{source.out}/{file.path}")
        for batch in parquet.iter_batches(BATCH_ROWS, columns=["embedding"]):
            rows_RD = batch["embedding"].flatten().to_numpy().reshape(len(batch), -1)
            wide_RD = rows_RD.astype(np.float64)
            total = total + wide_RD.T @ wide_RD
    return np.asarray(total)


def peak() -> float:
    """Return the most memory that this process has held, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2, help="as the environment sets it")
    parser.add_argument("--flow", action="store_true", help="train a flow instead")
    asked = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as place,
        watched(PACKAGES, threads=asked.threads) as machine,
    ):
        folder = Path(place)
        snapshot = written(folder, rows=asked.rows, width=asked.width)
        source = VectorSource(str(folder), snapshot)
        measure = flow_claims if asked.flow else whitening_claims
        claims, figures = measure(source, asked)
    report(claims, figures, asked=vars(asked), machine=machine)


def flow_claims(
    source: VectorSource, asked: argparse.Namespace
) -> tuple[list[Claim], dict[str, Any]]:
    """Train on all vectors, and on a tenth of them."""
    files = [*source.snapshot.files]
    tenth = replace(source.snapshot, files=FileList.of(files[: max(1, len(files) // 10)]))
    runs = {
        f"flow, {sum(file.rows for file in one.snapshot.files):,} rows": trained_apart(
            one, asked.threads
        )
        for one in (source, replace(source, snapshot=tenth))
    }
    whole, part = runs.values()
    figures = {f"{run}: {name}": value for run, one in runs.items() for name, value in one.items()}
    beyond = whole["memory at its peak, GiB"] - whole["memory before, of libraries, GiB"]
    size = asked.rows * asked.width * 4 / GIB
    flat = whole["memory at its peak, GiB"] / part["memory at its peak, GiB"]
    return [
        Claim("flow: memory for all vectors over memory beyond libraries", size / beyond),
        Claim("flow: memory beside that of a tenth of the rows", flat, ceiling=1.25),
    ], figures


def whitening_claims(
    source: VectorSource, asked: argparse.Namespace
) -> tuple[list[Claim], dict[str, Any]]:
    """Whiten beside a pass of numpy."""
    size = asked.rows * asked.width * 4 / 1e9
    started = time.perf_counter()
    numpys(source)
    of_numpy = time.perf_counter() - started
    before = peak()
    started = time.perf_counter()
    fitted = whitened(source)
    ours = time.perf_counter() - started
    grown = peak() - before
    # A part of them is enough to see the identity to its own chance, and all would not fit.
    covariance = covariance_after(source, fitted)
    off = float(np.abs(covariance - np.eye(asked.width)).max())
    figures = {
        "numpy, seconds": of_numpy,
        "numpy, GB/s": size / of_numpy,
        "ours, seconds": ours,
        "ours, GB/s": size / ours,
        "memory beyond that of the passes before, GiB": grown,
        "memory of the whole process, GiB": peak(),
        "largest difference of the covariance from the identity": off,
    }
    return [
        Claim("whitening over numpy's pass, speed", of_numpy / ours, floor=0.5),
        Claim("memory for all vectors over memory used", size / GIB * 1e9 / max(grown, 1e-9)),
        Claim("covariance beside the identity, off by", off, ceiling=LEAST_LIKE_IDENTITY),
    ], figures


def covariance_after(source: VectorSource, fitted: Fitted) -> npt.NDArray[np.float64]:
    """Return the covariance of all vectors after whitening, in one more pass."""
    rows, total, products = 0, 0.0, 0.0
    for file in source.snapshot.files:
        parquet = pq.ParquetFile(f"{source.out}/{file.path}")
        for batch in parquet.iter_batches(BATCH_ROWS, columns=["embedding"]):
            flat = batch["embedding"].flatten().to_numpy().reshape(len(batch), -1)
            after_RD = applied(fitted, flat).astype(np.float64)
            rows += len(after_RD)
            total = total + after_RD.sum(axis=0)
            products = products + after_RD.T @ after_RD
    mean = np.asarray(total) / rows
    return (np.asarray(products) - rows * np.outer(mean, mean)) / (rows - 1)


if __name__ == "__main__":
    main()
