"""What the README shows is what there is: its recipes run, its config ships, its commands exist."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = README + (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
ROWS = 5
# One option of each command that only that command has; the others belong to `run`.
OPTIONS = {"--keep": "prune", "--grace": "prune", "--json": "verify"}


def _section(title: str) -> str:
    return README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def _write_file(path: Path, *, first: int, rows: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = list(range(first, first + rows))
    vectors = pa.array([[float(n), 1.0] for n in numbers], pa.list_(pa.float32(), 2))
    columns = {
        "row": pa.array(numbers, pa.uint32()),
        "id": [f"d{n}" for n in numbers],
        "title": [f"title {n}" for n in numbers],
        "embedding": vectors,
        "tokens": pa.array(numbers, pa.uint32()),
    }
    pq.write_table(pa.table(columns), path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output whose newest snapshot leaves out one of the files that lie there."""
    out = tmp_path / "out"
    names = [f"data/0123456789ab/{name}.parquet" for name in ("old", "a", "b")]
    for number, (name, rows) in enumerate(zip(names, (7, 2, 3), strict=True)):
        _write_file(out / name, first=10 * number, rows=rows)
    (out / "snapshots").mkdir()
    for epoch, listed in ((9, names[:1]), (10, names[1:])):
        head = out / "snapshots" / f"{epoch:08d}.json"
        head.write_text("{}")
        head.with_suffix("").mkdir()
        for part, name in enumerate(listed):
            table = pa.table({"path": [name], "rows": [1]})
            pq.write_table(table, head.with_suffix("") / f"files-{part:05d}.parquet")
    return out


def test_reading_recipes_read_the_newest_snapshot(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    listing, duckdb, polars, lancedb = _blocks(_section("The output"), "python")
    listing, count = re.subn(r'OUT = ".*"', f"OUT = {str(out)!r}", listing)
    assert count == 1
    names: dict[str, Any] = {}
    exec(listing, names)
    assert [Path(file).stem for file in names["files"]] == ["a", "b"]
    exec(duckdb, names)
    assert len(names["documents"]) == ROWS
    assert "title 22" in capsys.readouterr().out
    exec(polars, names)
    assert names["documents"]["id"].to_list() == ["d10", "d11", "d20", "d21", "d22"]
    exec(lancedb, names)
    assert names["table"].count_rows() == ROWS
    nearest = names["table"].search([11.0, 1.0], vector_column_name="embedding").limit(1)
    assert nearest.to_list()[0]["id"] == "d11"


def test_the_job_shown_is_the_job_that_ships() -> None:
    (shown,) = _blocks(_section("A job"), "yaml")
    assert shown == (ROOT / "jobs" / "configs" / "quickstart.yaml").read_text(encoding="utf-8")


def test_files_named_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@cache
def _help(*command: str) -> str:
    """What `embedjob COMMAND --help` prints; fails the test if there is no such command."""
    done = subprocess.run(
        [sys.executable, "-m", "embedjob", *command, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"},
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, f"embedjob {' '.join(command)}: {done.stderr}"
    return done.stdout


def test_commands_named_exist() -> None:
    commands = set(re.findall(r"(?<=[`/])embedjob ([a-z]+)(?= [A-Z`-]|`)", PROSE))
    assert {"run", "preview", "verify", "methods"} <= commands
    for command in sorted(commands):
        _help(command)


def test_options_named_exist() -> None:
    ours = re.findall(r"`(--[a-z-]+)", PROSE) + re.findall(r"JOB\.yaml (--[a-z-]+)", PROSE)
    assert "--takeover" in ours
    for option in sorted(set(ours)):
        assert option in _help(OPTIONS.get(option, "run")), option


def test_search_works_without_ray_as_shown() -> None:
    (program,) = _blocks(_section("Search"), "python")
    if not (ROOT / "outputs" / "quickstart" / "snapshots").is_dir():
        compile(program, "README.md", "exec")
        pytest.skip("`make demo` makes the output that this searches")
    asks = program + "\nimport sys\nassert 'ray' not in sys.modules\n"
    done = subprocess.run(
        [sys.executable, "-c", asks], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Febrile seizures" in done.stdout
