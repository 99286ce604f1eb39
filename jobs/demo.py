"""`make demo`: embeds 600 abstracts on this machine, then searches them with three claims."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# Python looks beside this file, and embedjob lies a folder above, installed or not.
sys.path.append(str(Path(__file__).parents[1]))
from embedjob.errors import lacking_module

try:
    import numpy as np
    import pyarrow.parquet as pq
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    import embedjob
    from embedjob.cli import main as embedjob_cli
except ModuleNotFoundError as error:
    if (error.name or "").startswith("embedjob."):
        raise  # a fault of ours
    sys.exit(lacking_module(error))

CONFIG = "jobs/configs/quickstart.yaml"
ABSTRACTS = "jobs/demo/scifact"
QUERIES = "jobs/demo/queries.json"
OUT = "outputs/quickstart"
SHOWN = 3
WORDS = 20


def _nearest(query: np.ndarray, embeddings: np.ndarray) -> list[tuple[int, float]]:
    """The rows nearest to the query with their cosines, best first."""
    scores = embeddings @ query
    return [(int(row), float(scores[row])) for row in np.argsort(-scores)[:SHOWN]]


def _table(claim: dict[str, Any], hits: list[tuple[dict[str, str], float]]) -> Table:
    """One claim and its nearest abstracts, as a table."""
    table = Table(
        title=Text(f"\n{claim['query']}"), title_justify="left", title_style="bold", expand=True
    )
    table.add_column("cosine", justify="right")
    table.add_column("judged relevant")
    table.add_column("title", ratio=2)
    table.add_column("first words", ratio=3)
    for abstract, cosine in hits:
        words = " ".join(abstract["abstract"].split()[:WORDS])
        relevant = "yes" if abstract["doc_id"] in claim["relevant"] else ""
        table.add_row(f"{cosine:.3f}", relevant, Text(abstract["title"]), Text(f"{words} ..."))
    return table


def _search(console: Console) -> None:
    """Prints the nearest abstracts of the shipped claims."""
    claims = json.loads(Path(QUERIES).read_text(encoding="utf-8"))
    encoder = embedjob.Encoder.from_output(OUT)
    queries = encoder.encode([claim["query"] for claim in claims], role="query")
    rows = embedjob.open_snapshot(OUT).to_table(columns=["id", "embedding"])
    embeddings = np.stack(rows["embedding"].to_numpy())
    abstracts = {row["doc_id"]: row for row in pq.read_table(ABSTRACTS).to_pylist()}
    ids = rows["id"].to_pylist()
    for claim, query in zip(claims, queries, strict=True):
        hits = [(abstracts[ids[row]], cosine) for row, cosine in _nearest(query, embeddings)]
        console.print(_table(claim, hits))


def _report(console: Console, *, seconds: float, done_before: bool) -> None:
    """Prints what was done and where the files are."""
    files = sorted(Path(OUT, "data").glob("*/*.parquet"))
    console.print()
    if done_before:
        console.print(
            f"Embedded before: every chunk already has its file, so this run only read {OUT}"
            f" ({seconds:.0f} s). Remove {OUT} to embed again."
        )
    else:
        console.print(f"Embedded in {seconds:.0f} s, start of Ray and loading included.")
    console.print(f"Embeddings: {len(files)} files such as {files[0]}")
    console.print(f"Published:  {sorted(Path(OUT, 'snapshots').glob('*.json'))[-1]}")
    console.print(f"Config:     {CONFIG}; see also `.venv/bin/embedjob preview {CONFIG}`")


def main() -> int:
    """The exit code of the run, or 0 once the results are shown."""
    os.chdir(Path(__file__).parent.parent)
    console = Console()
    before = set(Path(OUT, "data").glob("*/*.parquet"))
    start = time.monotonic()
    code = embedjob_cli(["run", CONFIG])
    if code:
        return code
    seconds = time.monotonic() - start
    _search(console)
    made = set(Path(OUT, "data").glob("*/*.parquet")) - before
    _report(console, seconds=seconds, done_before=not made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
