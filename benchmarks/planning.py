"""Planning and publishing of many chunks by one driver: seconds, memory, and bytes of the manifest.

Listings and footers are simulated, so storage takes no time; every function is the project's own.
Each step's memory is the peak of the process until then, what is simulated included: the listings,
which a run holds too, and the outcomes, which a run's ledger keeps.

    python -m benchmarks.planning [--shards 100000]
"""

import argparse
import hashlib
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from benchmarks.measuring.claims import Claim, report
from benchmarks.measuring.machine import watched
from embedjob.config.job import Input, Job, Output
from embedjob.config.recipe import Recipe
from embedjob.input.chunks import Shard
from embedjob.input.columns import columns_of
from embedjob.input.footers import Footer
from embedjob.job.input_listing import InputListing
from embedjob.job.output import is_published
from embedjob.job.planning import JobPlan, plan
from embedjob.job.publishing import snapshot_of
from embedjob.job.resolve import IdentifiedJob
from embedjob.job.result import Outcome, Outcomes
from embedjob.models.architecture import HeadWidths, ModelInfo
from embedjob.output.chunk_file import Committed
from embedjob.output.manifest import remembered
from embedjob.output.snapshot import newest_snapshot, publish
from embedjob.storage.objects import Stored

PACKAGES = ("pyarrow",)
CHUNK_ROWS, CHUNKS_PER_SHARD = 16_384, 10
FINGERPRINT = "f" * 64
SCHEMA = pa.schema([("text", pa.string()), *((f"column {i}", pa.string()) for i in range(9))])
COUNTS = {
    **{"rows": CHUNK_ROWS, "embedded": CHUNK_ROWS - 384, "deduplicated": 384, "quarantined": 0},
    **{"nulls": 0, "tokens": 4_000_000, "truncated": 12},
}
GIB = 2**30


class Steps:
    """Seconds and peak memory of every step, by name."""

    def __init__(self) -> None:
        """Begin without steps."""
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure the block."""
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        self.peak[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def hexadecimal(text: str) -> str:
    """Return 32 hex digits, as the etags of S3 have."""
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def job() -> IdentifiedJob:
    """Return a job whose model is never opened."""
    config = Job(
        input=Input(path="s3://corpus/docs/", text="text"),
        encoder=Recipe(model="m"),
        output=Output(path="s3://corpus-embeddings/docs/", chunk_rows=CHUNK_ROWS),
    )
    return IdentifiedJob(
        config=config,
        recipes={"document": config.encoder},
        origins={},
        folder=Path("m"),
        input_paths=("s3://corpus/docs/",),
        model=ModelInfo(384, 1, causal=True, max_positions=None, parameters=None),
        width=384,
        heads=HeadWidths(),
        digests={},
        fingerprint=FINGERPRINT,
    )


def listing_of(shards: int) -> InputListing:
    """Return shards of ten row groups, each one chunk."""
    listed = tuple(
        Shard(f"s3://corpus/docs/part-{i:06d}.parquet", 10**8, hexadecimal(f"shard {i}"))
        for i in range(shards)
    )
    groups = (CHUNK_ROWS,) * CHUNKS_PER_SHARD, (30_000_000,) * CHUNKS_PER_SHARD
    return InputListing(listed, {one.url: Footer(*groups, SCHEMA, 20_000) for one in listed})


def committed(first: JobPlan) -> tuple[list[Stored], Outcomes]:
    """Return the files of all chunks, as a listing and as the outcomes of a run have them."""
    folder = f"s3://corpus-embeddings/docs/data/{FINGERPRINT[:12]}"
    files = [
        Stored(
            f"{folder}/{chunk.name}", 26_000_000 + chunk.start % 999_983, hexadecimal(chunk.name)
        )
        for chunk in first.chunks
    ]
    ends = Outcomes()
    for chunk, file in zip(first.chunks, files, strict=True):
        kept = Committed(file.name, CHUNK_ROWS, file.size, file.etag, COUNTS, written=True)
        ends.add(Outcome(chunk.key, chunk.shard.url, chunk.start, chunk.stop, kept))
    return files, ends


def measure(shards: int, out: str) -> tuple[Steps, float]:
    """Take a corpus through its first run and an unchanged night; return the steps and MB."""
    steps, mine, listing = Steps(), job(), listing_of(shards)
    with steps.step("plan of the first run"):
        first = plan(mine, listing, listed=())
    with steps.step("simulate a listing and outcomes"):
        files, ends = committed(first)
    del first
    with steps.step("plan under the lease, all chunks committed"):
        whole = plan(mine, listing, listed=files)
    with steps.step("snapshot"):
        snapshot = snapshot_of(whole, epoch=1, listed=files, outcomes=ends)
    with steps.step("publish"):
        publish(out, snapshot)
    del whole, ends, snapshot
    with steps.step("read the newest snapshot"):
        served = newest_snapshot(out)
    assert served is not None
    with steps.step("plan of an unchanged night"):
        known = remembered(served.shards, served.footers, columns_of(mine.config.input).wanted)
        footers = {shard.url: known[shard.url, shard.etag] for shard in listing.shards}
        night = plan(mine, InputListing(listing.shards, footers), listed=files, served=served)
    with steps.step("find that nothing is to do"):
        assert not night.left
        assert is_published(night, served)
    parts = Path(out, "snapshots").rglob("*")
    return steps, sum(part.stat().st_size for part in parts if part.is_file()) / 1e6


def main() -> None:
    """Prints every figure, and all of them as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=100_000)
    asked = parser.parse_args()
    with watched(PACKAGES, threads=1) as machine, tempfile.TemporaryDirectory() as folder:
        steps, megabytes = measure(asked.shards, str(Path(folder, "out")))
    share = asked.shards / 100_000
    first = "plan of the first run"
    night = ("read the newest snapshot", "plan of an unchanged night", "find that nothing is to do")
    unchanged = sum(steps.seconds[name] for name in night)
    claims = [
        Claim(f"{first}, s", steps.seconds[first], ceiling=60 * share),
        Claim(f"{first}, peak GiB", steps.peak[first], ceiling=2),
        Claim("an unchanged night, s", unchanged, ceiling=60 * share),
        Claim("manifest, MB", megabytes, ceiling=60 * share),
    ]
    figures = {f"{name}, s": seconds for name, seconds in steps.seconds.items()}
    figures |= {f"{name}, peak GiB": peak for name, peak in steps.peak.items()}
    report(claims, figures, asked=vars(asked), machine=machine)


if __name__ == "__main__":
    main()
