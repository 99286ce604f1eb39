"""The night of docs/operations.md: its commands, in order, over a corpus that is written anew."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from tests import running
from tests.cluster import Cluster
from tests.outputs import published
from tests.running import texts, write_shard

ROOT = Path(__file__).parent.parent
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
ROWS, EDITED = 60, 5


def _section(title: str) -> str:
    return OPERATIONS.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.ray
@pytest.mark.slow
def test_a_night_goes_as_it_is_written(
    cluster: Cluster, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = _section("A night")
    (job,) = _blocks(section, "yaml")
    first, second = (block.splitlines() for block in _blocks(section, "sh"))
    document = yaml.safe_load(job)
    document["encoder"] = {"model": str(model)}
    monkeypatch.chdir(tmp_path)
    Path("night.yaml").write_text(yaml.safe_dump(document))
    bodies = texts(ROWS)
    write_shard(Path("corpus/a.parquet"), bodies, lang=["en"] * ROWS)
    ran = [_run(line, cluster) for line in first]
    assert [one["reused"] for one in ran] == [0]

    Path("corpus/a.parquet").unlink()
    tonight = [f"{text} edited" for text in bodies[:EDITED]] + bodies[EDITED:]
    for half, some in enumerate((tonight[::2], tonight[1::2])):
        rows = len(some)
        write_shard(Path(f"corpus/spark-{half}.parquet"), some, lang=["de"] * rows, more=[1] * rows)
    night, _, another, _ = (_run(line, cluster) for line in second)
    assert (night["reused"], night["embedded"]) == (ROWS - EDITED, EDITED)
    assert {*published("vectors")["lang"].to_pylist()} == {"de"}
    assert (another["reused"], another["embedded"]) == (ROWS, 0)
    assert len(published("vectors-2")) == ROWS


def _run(line: str, cluster: Cluster) -> dict[str, int]:
    """The summary of a run; of another command, nothing."""
    name, *arguments = shlex.split(line)
    assert name == "embedjob"
    is_run = arguments[0] == "run"
    options = ["--json", "--address", cluster.address] if is_run else []
    ended = running.command(*arguments, *options)
    assert ended.code == 0, ended.err
    return ended.summary if is_run else {}
