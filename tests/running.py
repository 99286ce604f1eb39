"""Whole runs for tests: a tiny model, a job, the command line in this process, and what it left."""

import contextlib
import io
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from embedjob.cli import main
from embedjob.config.job_file import JobSource, Layer
from embedjob.job.options import Console, Options
from embedjob.job.result import Result
from embedjob.pipeline import embed
from embedjob.reports.progress import shown
from embedjob.stages.engine import recipe_engine
from embedjob.stages.session import EngineOf
from tests.connection import join_for
from tests.fakes import SENTENCES, tiny_tokenizer

COUNTED = ("embedded", "reused", "deduplicated", "nulls", "quarantined")
Job = dict[str, Any]


@dataclass(frozen=True)
class Ran:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def summary(self) -> dict[str, Any]:
        """What `--json` printed as its last line."""
        document: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return document


def job(source: str | Path, out: str | Path, model: str | Path, **sections: Job) -> Job:
    """A job that embeds `body` with `doc_id` on one small CPU actor, in chunks of ten rows."""
    base: Job = {
        "input": {"path": str(source), "text": "body", "id": "doc_id"},
        "encoder": {"model": str(model), "templates": ["It says: {text}."], "max_tokens": 24},
        "pool": {"actors": 1, "gpus_per_actor": 0},
        "output": {"path": str(out), "chunk_rows": 10},
        "run": {"wait_for_resources": "60s"},
    }
    return {
        name: {**base.get(name, {}), **sections.get(name, {})} for name in base.keys() | sections
    }


def command(*arguments: str) -> Ran:
    """One command, in this process."""
    place = dict(pairwise(arguments)).get("--address")
    join_for(place)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return Ran(code, out.getvalue(), err.getvalue())


def job_file(document: Job, folder: Path) -> Path:
    """The job as a file."""
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    return path


def run(document: Job, folder: Path, *options: str) -> Ran:
    """`embedjob run --json` of a job, in this process."""
    return command("run", str(job_file(document, folder)), "--json", *options)


def run_with(
    document: Job,
    options: Options,
    engine_of: EngineOf = recipe_engine,
) -> Result:
    """A run with an engine of the test's own."""
    join_for(options.address)
    console = Console(lambda line: sys.stderr.write(f"{line}\n") and None, shown)
    return embed(JobSource((Layer("job.yaml", document),)), options, console, engine_of=engine_of)


def texts(count: int, *, seed: int = 0) -> list[str]:
    """Different sentences of different lengths."""
    words = " ".join(SENTENCES[:8]).split()
    return [
        f"{seed} {i} " + " ".join(words[(7 * i + seed) % 40 :][: 1 + (3 * i) % 13])
        for i in range(count)
    ]


def write_shard(
    path: Path, bodies: Sequence[str | None], *, group_rows: int = 10, **columns: Sequence[Any]
) -> Path:
    """A shard of `doc_id`, `body` and further columns."""
    table = pa.table(
        {
            "doc_id": pa.array([f"{path.stem}-{i}" for i in range(len(bodies))], pa.string()),
            "body": pa.array(bodies, pa.string()),
            **{name: pa.array(values) for name, values in columns.items()},
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group_rows)
    return path


def save_slow_model(folder: Path) -> Path:
    """A Llama that takes a fifth of a second for ten rows: time to do something meanwhile."""
    torch.manual_seed(0)
    size = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 16}
    rest = {"vocab_size": 600, "num_attention_heads": 8, "max_position_embeddings": 80}
    LlamaForCausalLM(LlamaConfig(**size, **rest)).save_pretrained(folder)
    tiny_tokenizer("llama").save(str(folder / "tokenizer.json"))
    return folder


def require_sum(summary: Mapping[str, Any]) -> None:
    """rows = embedded + reused + deduplicated + nulls + quarantined."""
    assert summary["rows"] == sum(summary[key] for key in COUNTED), summary
