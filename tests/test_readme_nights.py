"""The commands of the README's `Night after night`, in order, twice: as it is, and with changes."""

import re
import shlex
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import running
from tests.cluster import Cluster
from tests.running import Job, texts, write_shard

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
JOBS = {
    "night.yaml": "A night",
    "passages.yaml": "Passages, and an edit",
    "table.yaml": "A table",
}


def blocks(page: str, title: str, language: str) -> list[str]:
    section = page.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def write_jobs(model: Path) -> None:
    """The pages' own jobs, each on a corpus of its own; the tiny model has 80 positions."""
    for name, title in JOBS.items():
        job: dict[str, Any] = yaml.safe_load(blocks(OPERATIONS, title, "yaml")[0])
        if "split" in job["encoder"]:
            job["input"]["path"] = "documents"
            job["encoder"] |= {"max_tokens": 76}
            job["encoder"]["split"]["max_tokens"] = 60
        job["encoder"]["model"] = str(model)
        Path(name).write_text(yaml.safe_dump(job))


def run_all(cluster: Cluster) -> list[Job]:
    """The summary of each command. The deadline is a moment by which a tiny corpus is done."""
    later = (datetime.now().astimezone() + timedelta(minutes=30)).isoformat()
    summaries = []
    for line in blocks(README, "Night after night", "sh")[0].splitlines():
        program, *words = shlex.split(line.replace("=06:00", f"={later}"), comments=True)
        assert program == "embedjob"
        ran = running.command(*words, "--json", "--address", cluster.address)
        assert ran.code == 0, ran.err
        summaries.append(ran.summary)
    return summaries


def test_what_the_readme_shows_costs_what_has_changed(
    cluster: Cluster, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deltalake", reason="pip install 'embedjob[lakehouse]'")
    monkeypatch.chdir(tmp_path)
    write_jobs(model)
    bodies, table = texts(30), blocks(OPERATIONS, "A table", "python")
    long = [" ".join(f"Sentence {s} of document {d}." for s in range(40)) for d in range(3)]
    write_shard(Path("corpus/a.parquet"), bodies, lang=["en"] * 30)
    write_shard(Path("documents/a.parquet"), long, title=["A title"] * 3)
    names: dict[str, Any] = {}
    exec(table[0], names)
    night, split, deadline, rows = run_all(cluster)
    assert (night["embedded"], deadline["chunks_written"], rows["embedded"]) == (30, 0, 3)

    Path("corpus/a.parquet").unlink()
    write_shard(Path("corpus/b.parquet"), ["edited", *bodies[1:]], lang=["de"] * 30)
    long[1] = long[1].replace("Sentence 20 of", "Another one of")
    write_shard(Path("documents/a.parquet"), long, title=["A title"] * 3)
    exec(table[1], names)
    night, edited, deadline, rows = run_all(cluster)
    assert (night["embedded"], night["reused"], deadline["chunks_written"]) == (1, 29, 0)
    # Of a file with two documents that are as they were, one document is embedded, in part.
    assert (edited["embedded"], edited["rows"]) == (1, 3)
    assert abs(edited["passages"] - split["passages"]) <= 2
    assert (rows["embedded"], rows["reused"]) == (1, 1)
