"""What a night costs whose corpus was written anew with few changes: texts encoded, bytes, seconds.

120,000 rows behind an encoder that counts texts and takes 2 ms for each, or none; tonight 1 % are
edited, 1 % deleted, 1 % new, of which some are there twice, in three layouts: edited in place, cut
into other files in order, shuffled at random. Every row has another kept value than yesterday. What
a night leaves is compared with an output that was embedded from nothing. Bytes are those that
gathering asks storage for. The join of keys is measured alone, and beside Ray Data's own on the
same keys.

    python -m benchmarks.night [--rows 120000] [--keys 10000000] [--only nights]
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import pipeline
from benchmarks.measuring.claims import Claim, report
from benchmarks.measuring.machine import watched

PACKAGES = ("ray", "pyarrow", "numpy")
WIDTH, CHUNK_ROWS, GROUP_ROWS = 384, 2048, 1024
MILLISECONDS = 2.0
GIB = 2**30
# What a night takes beside encoding, on two cores: two passes of Ray Data and the pre-pass.
CONSTANT_SECONDS = 15.0
WORDS = pipeline.WORDS
# Bytes that gathering may read at most, over the bytes of the vectors.
LIMITS = {"in place": 1.3, "re-sharded": 1.3, "shuffled": 4.0}


@dataclass(frozen=True)
class HashTokenizer:
    """Two ids per text, of its hash: so that each text has a vector of its own."""

    splitter: None = None

    def views(self, texts: list[str]) -> Any:
        """Views of two tokens."""
        from embedjob.text.conversations import text_hash
        from embedjob.text.views import TokenViews

        count = len(texts)
        ids = np.frombuffer(b"".join(text_hash(text)[:8] for text in texts), np.uint32)
        return TokenViews(
            views_per_text=1,
            prefixes=(np.zeros(0, np.uint32),),
            prefix=np.full(count, -1, np.int32),
            ids=ids.copy(),
            offsets=2 * np.arange(count + 1, dtype=np.int64),
            common=np.zeros(count, np.int32),
            span=np.tile(np.array([0, 2], np.int32), (count, 1)),
            truncated=np.zeros(count, np.bool_),
        )


@dataclass(frozen=True)
class CountingEncoder:
    """A unit vector of each text's ids, with digits as a model's; notes how many texts it has."""

    log: str
    milliseconds: float

    def encode_views(
        self, views: Any, *, stop: Callable[[], bool], on_progress: Callable[[int, int], None]
    ) -> Any:
        """Embeddings, after so many milliseconds for each."""
        from embedjob.stages.claiming import PROBE_TEXTS
        from embedjob.vectors.encoded import Encoded

        if views.texts != len(PROBE_TEXTS):
            with Path(self.log).open("a") as log:
                log.write(f"{views.texts}\n")
            time.sleep(views.texts * self.milliseconds / 1e3)
        one, two = views.ids.reshape(-1, 2).astype(np.float64).T
        angle = one[:, None] * np.sqrt(np.arange(2, WIDTH + 2)) + two[:, None]
        vectors = np.sin(angle).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        tokens = int(views.lengths.sum())
        stats = {"forward_tokens": tokens, "padded_tokens": tokens, "distinct_views": views.texts}
        return Encoded(vectors, {}, stats)


@dataclass(frozen=True)
class CountingEngine:
    """The encoder behind the tokenizer."""

    log: str
    milliseconds: float
    long_text: str = "truncate"

    def load_tokenizer(self) -> HashTokenizer:
        """The tokenizer."""
        return HashTokenizer()

    def load_encoder(self) -> CountingEncoder:
        """The encoder."""
        return CountingEncoder(self.log, self.milliseconds)


def make_model(folder: Path) -> None:
    """A model of width 384, never run, behind the tokenizer of all-MiniLM-L6-v2."""
    pipeline.WIDTH = WIDTH
    pipeline.make_model(folder)


def corpus(rows: int) -> list[str]:
    """Distinct texts of yesterday."""
    random = np.random.default_rng(0)
    words = random.integers(0, len(WORDS), (rows, 12)).tolist()
    return [f"{i} {' '.join(WORDS[w] for w in row)}?" for i, row in enumerate(words)]


def tonight(texts: list[str]) -> tuple[list[str], int]:
    """The corpus with 1 % edited, 1 % deleted and 1 % new; and how many rows have a new text.

    Of the new rows, one in ten has the text of another one, far from it.
    """
    random, count = np.random.default_rng(1), len(texts) // 100
    chosen = random.choice(len(texts), 2 * count, replace=False)
    edited, deleted = set(chosen[:count].tolist()), set(chosen[count:].tolist())
    kept = [
        f"{text} edited" if place in edited else text
        for place, text in enumerate(texts)
        if place not in deleted
    ]
    at = sorted(random.choice(len(kept), count, replace=False).tolist(), reverse=True)
    for number, place in enumerate(at):
        kept.insert(place, f"a new text of number {number % (count * 9 // 10)}")
    return kept, 2 * count


def write(folder: Path, texts: list[str], *, per_shard: int, name: str) -> None:
    """Parquet shards of the texts, each row with the name and its number as a kept value."""
    folder.mkdir(parents=True)
    for shard, start in enumerate(range(0, len(texts), per_shard)):
        some = texts[start : start + per_shard]
        ids = range(start, start + len(some))
        kept = [f"{name} {number}" for number in ids]
        table = pa.table({"id": pa.array(ids, pa.int64()), "body": some, "kept": kept})
        pq.write_table(table, folder / f"{name}-{shard:05}.parquet", row_group_size=GROUP_ROWS)


def write_layouts(work: Path, texts: list[str]) -> tuple[list[str], int]:
    """Yesterday's shards, and tonight's in three layouts; what `tonight` gives."""
    after, new = tonight(texts)
    write(work / "yesterday", texts, per_shard=20_000, name="part")
    write(work / "in place", after, per_shard=20_000, name="part")
    write(work / "re-sharded", after, per_shard=13_700, name="spark")
    order = np.random.default_rng(2).permutation(len(after))
    write(work / "shuffled", [after[i] for i in order], per_shard=20_000, name="mixed")
    return after, new


def source(work: Path, name: str, out: str) -> Any:
    """The job over one layout."""
    from embedjob.config.job_file import JobSource, Layer

    job = {
        "input": {"path": str(work / name), "text": "body", "id": "id", "keep": ["kept"]},
        "encoder": {"model": str(work / "model"), "max_tokens": 128},
        "pool": {"gpus_per_actor": 0, "actors": 1},
        "output": {"path": str(work / out), "chunk_rows": CHUNK_ROWS},
    }
    return JobSource((Layer("benchmark", job),))


def run(work: Path, name: str, out: str, address: str, milliseconds: float = 0.0) -> dict[str, Any]:
    """One run; its summary, and the texts that its encoder was given as `given`."""
    from embedjob.job.options import Console, Options
    from embedjob.pipeline import embed

    log = work / f"{name}-{out}-{milliseconds}.log"

    @contextmanager
    def shown(_: Any) -> Iterator[Callable[[Any], None]]:
        yield lambda tally: None

    result = embed(
        source(work, name, out),
        Options(address=address, new_input=True),
        Console(print, shown),
        engine_of=lambda config, threads: CountingEngine(str(log), milliseconds),
    )
    assert not result.faults, result.verdict
    given = sum(map(int, log.read_text().split())) if log.exists() else 0
    return {**result.summary.as_dict(), "given": given}


def embed_here(work: Path, name: str, out: str) -> None:
    """Yesterday's output, made in this process: gathering asks storage for its files alone."""
    from embedjob.input.reading import read_chunk
    from embedjob.job.output import output_spec
    from embedjob.job.planning import plan_job
    from embedjob.job.publishing import snapshot_of
    from embedjob.output.committing import commit
    from embedjob.output.file_names import data_directory
    from embedjob.output.snapshot import publish
    from embedjob.stages.chunk_state import ChunkState
    from embedjob.stages.tokenize import tokenize_rows
    from embedjob.stages.write import assemble_rows
    from embedjob.storage.objects import list_files

    plan = plan_job(source(work, name, out))
    encoder, spec = CountingEncoder(os.devnull, 0.0), output_spec(plan)
    for chunk in plan.chunks:
        read = read_chunk(chunk, plan.job.config.input)
        rows, views = tokenize_rows(read, HashTokenizer(), "truncate")
        encoded = encoder.encode_views(views, stop=lambda: False, on_progress=lambda *_: None)
        table = assemble_rows(ChunkState(chunk, rows, encoded=encoded))
        commit(plan.job.out, chunk, table, rows_in=len(read), spec=spec)
    listed = list_files(data_directory(plan.job.out, plan.job.fingerprint))
    publish(plan.job.out, snapshot_of(plan, epoch=1, listed=listed))


def require_equal(work: Path, name: str, out: str) -> None:
    """An output holds what one holds that has embedded the same layout from nothing."""
    from embedjob.output.snapshot import open_snapshot

    embed_here(work, name, f"full {name}")
    tables = [
        open_snapshot(str(work / one))
        .to_table()
        .sort_by([("shard", "ascending"), ("row", "ascending")])
        for one in (out, f"full {name}")
    ]
    assert tables[0].equals(tables[1]), f"{name}: the night left other rows than a full run"


def gathered_bytes(work: Path, name: str, out: str) -> tuple[float, int]:
    """Bytes that gathering asks storage for, over the bytes of the vectors; and how many these are.

    Vectors are float32, and compress little.
    """
    from embedjob.job.planning import plan_job
    from embedjob.job.reusable import old_files
    from embedjob.stages.reuse import old_vectors, take_over, text_keys
    from embedjob.stages.tokenize import distinct_texts

    plan = plan_job(source(work, name, out))
    files, carried = old_files(plan), old_vectors.carried_of(plan)
    assert carried is not None
    texts = partial(distinct_texts, engine=CountingEngine(os.devnull, 0.0))
    keys, _ = take_over.new_keys([*enumerate(plan.left)], plan.job.config.input, texts)
    old = old_vectors.old_keys(files.take(range(len(files))), carried)
    places, _ = text_keys.join_partition(0, 1, [keys], [old])
    numbers, lines = np.unique(places.file, return_counts=True)
    wanted = dict(zip(numbers.tolist(), lines.tolist(), strict=True))
    fetched = taken = 0
    whole = old_vectors.open_unchanged

    @contextmanager
    def counted(file: Any) -> Iterator[BinaryIO]:
        nonlocal fetched
        with whole(file) as handle:
            read = handle.read

            def count(size: int = -1) -> bytes:
                nonlocal fetched
                data = read(size)
                fetched += len(data)
                return data

            handle.read = count  # type: ignore[method-assign]
            yield handle

    old_vectors.open_unchanged = counted
    try:
        for group in take_over.gather_groups(wanted, carried):
            taken += len(old_vectors.gathered(files.take(group), [places], carried).table)
    finally:
        old_vectors.open_unchanged = whole
    return fetched / (taken * WIDTH * 4), taken


def simulated(keys: int) -> tuple[list[Any], list[Any]]:
    """Keys of as many new texts as old ones, in tasks' portions; nine in ten are the same."""
    from embedjob.stages.reuse.text_keys import OldKeys, TextKeys, in_order

    random, portion = np.random.default_rng(3), 500_000
    news, olds = [], []
    for start in range(0, keys, portion):
        count = min(portion, keys - start)
        high, low = (random.integers(0, 2**64, count, np.uint64) for _ in range(2))
        number = np.arange(count, dtype=np.uint32)
        ones = np.ones(count, np.uint32)
        olds.append(in_order(OldKeys(high, low, (start + number) // 16_384, number % 16_384, ones)))
        changed = random.random(count) < 0.1
        low = np.where(changed, low + np.uint64(1), low)
        news.append(in_order(TextKeys(high, low, (start + number) // 16_384)))
    return news, olds


def joined_by_ours(keys: int, parts: int) -> tuple[int, float]:
    """The texts that our join finds in two threads, partition by partition; and its seconds."""
    from embedjob.stages.reuse.text_keys import join_partition

    news, olds = simulated(keys)
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        found = [*pool.map(lambda part: join_partition(part, parts, news, olds), range(parts))]
    return sum(len(places.file) for places, _ in found), time.monotonic() - started


def joined_by_our_tasks(keys: int, parts: int) -> tuple[int, float]:
    """The same as a run does it: a Ray task for each partition, keys and places in Ray's store."""
    import ray

    from embedjob.stages.reuse.text_keys import join_partition

    news, olds = simulated(keys)
    sides = [[ray.put(one) for one in side] for side in (news, olds)]
    count = len(news)
    del news, olds

    def places(part: int, *given: Any) -> tuple[Any, int]:
        made, _ = join_partition(part, parts, given[:count], given[count:])
        return made, len(made.file)

    started = time.monotonic()
    task = ray.remote(places).options(num_cpus=1, num_returns=2)
    made = [task.remote(part, *sides[0], *sides[1]) for part in range(parts)]
    return sum(ray.get([found for _, found in made])), time.monotonic() - started


def joined_by_ray_data(keys: int, parts: int, kind: str) -> tuple[int, float]:
    """The same through `ray.data.Dataset.join`, of hashes in a column of 16 bytes.

    `kind` is inner for the texts that have an old line, left_anti for those that have none.
    """
    import ray

    from embedjob.stages.reuse.text_keys import hashes_of

    news, olds = simulated(keys)
    # Its partitions hash no fixed-size binary.
    sides = [
        [
            ray.put(
                pa.table(
                    {
                        "text_hash": hashes_of(one.high, one.low).cast(pa.binary()),
                        **{name: pa.array(getattr(one, name)) for name in names},
                    }
                )
            )
            for one in side
        ]
        for side, names in ((news, ("chunk",)), (olds, ("file", "line", "lines")))
    ]
    del news, olds
    started = time.monotonic()
    left, right = (ray.data.from_arrow_refs(side) for side in sides)
    both = left.join(right, kind, num_partitions=parts, on=("text_hash",))
    return both.count(), time.monotonic() - started


@contextmanager
def cluster(store: int) -> Iterator[str]:
    """The address of a Ray of two CPUs."""
    pipeline.STORE_BYTES = store
    with pipeline.cluster() as address:
        yield address


def measure_joins(keys: int) -> tuple[dict[str, float], list[Claim]]:
    """Seconds and the peak memory of our join, with all keys in one process."""
    texts, seconds = joined_by_ours(keys, max(4, keys // 500_000))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    name = f"{keys:,} keys joined with as many"
    figures = {f"{name}: texts": texts, f"{name}: s": seconds}
    return figures, [Claim(f"{name}: peak GiB of the process", peak, ceiling=2)]


def _wait() -> None:
    time.sleep(1.0)


def measure_dataset_join(keys: int) -> dict[str, float]:
    """Our join in this process and as Ray tasks, and Ray Data's, on the same keys and two CPUs."""
    import ray

    figures: dict[str, float] = {}
    parts = max(4, keys // 500_000)
    ways: dict[str, Callable[[], tuple[int, float]]] = {
        "ours, Ray tasks": partial(joined_by_our_tasks, keys, parts),
        "Dataset.join inner": partial(joined_by_ray_data, keys, parts, "inner"),
        "Dataset.join left_anti": partial(joined_by_ray_data, keys, parts, "left_anti"),
    }
    texts, figures[f"ours, two threads, {keys:,} keys, s"] = joined_by_ours(keys, parts)
    for name, way in ways.items():
        with cluster(2 * GIB) as address, pipeline.watched() as used:
            ray.init(address=address, log_to_driver=False)
            try:
                # Else the first join would pay for the start of workers.
                ray.get([ray.remote(_wait).remote() for _ in range(2)])
                found, seconds = way()
            finally:
                ray.shutdown()
        assert found == (keys - texts if "anti" in name else texts), (name, found, texts)
        figures[f"{name}, {keys:,} keys, s"] = seconds
        figures[f"{name}, {keys:,} keys, peak GiB of all processes"] = used.together / GIB
    return figures


def measure_bytes(work: Path, rows: int) -> list[Claim]:
    """What gathering asks storage for, in each layout of tonight's corpus."""
    make_model(work / "model")
    after, new = write_layouts(work, corpus(rows))
    embed_here(work, "yesterday", "out")
    claims = []
    for name, limit in LIMITS.items():
        ratio, taken = gathered_bytes(work, name, "out")
        assert taken == len(after) - new
        claims.append(Claim(f"{name}: bytes gathered / bytes of vectors", ratio, ceiling=limit))
    return claims


def measure_nights(work: Path, rows: int) -> tuple[dict[str, float], list[Claim]]:
    """Runs of yesterday and of tonight's layouts, each upon an output of yesterday's."""
    make_model(work / "model")
    after, new = write_layouts(work, corpus(rows))
    figures: dict[str, float] = {"constant, s": CONSTANT_SECONDS}
    claims = []
    distinct = len({*after} - {*corpus(rows)})
    assert distinct < new
    with cluster(pipeline.STORE_BYTES * 2) as address:
        for name in LIMITS:
            out = f"out {name}"
            full = run(work, "yesterday", out, address)
            assert full["given"] == rows
            night = run(work, name, out, address, MILLISECONDS)
            assert night["given"] == distinct, (night["given"], distinct)
            assert night["reused"] == len(after) - new
            require_equal(work, name, out)
            figures[f"{name}: seconds of the night"] = night["seconds"]
            figures[f"{name}: texts encoded"] = night["given"]
            figures[f"{name}: seconds of yesterday's run, null time"] = full["seconds"]
            share = (night["seconds"] - CONSTANT_SECONDS) / (rows * MILLISECONDS / 1e3)
            claims.append(Claim(f"{name}: (night - constant) / full encoding", share, ceiling=0.08))
        again = run(work, name, out, address)
        figures["unchanged: seconds"] = again["seconds"]
        assert again["chunks_written"] == 0
    return figures, claims


def main() -> None:
    """Prints every figure, and all of them as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=120_000)
    parser.add_argument("--keys", type=int, default=10_000_000)
    parser.add_argument("--peer-keys", type=int, default=1_000_000)
    parser.add_argument("--only", choices=("joins", "bytes", "nights", "peer"))
    asked = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    figures: dict[str, float] = {}
    claims: list[Claim] = []
    with watched(PACKAGES, threads=2) as machine, tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if asked.only in (None, "joins"):
            figures, claims = measure_joins(asked.keys)
        if asked.only in (None, "bytes"):
            claims += measure_bytes(work / "bytes", asked.rows)
        if asked.only in (None, "nights"):
            more, promised = measure_nights(work / "nights", asked.rows)
            figures, claims = figures | more, claims + promised
        if asked.only in (None, "peer"):
            figures |= measure_dataset_join(asked.peer_keys)
    report(claims, figures, asked=vars(asked), machine=machine)


if __name__ == "__main__":
    main()
