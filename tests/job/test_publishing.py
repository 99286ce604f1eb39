"""What a run says of the snapshot that it published."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from embedjob.config.job import Input
from embedjob.job.options import Options
from embedjob.job.publishing import FAULTS_SHOWN, verdict_of
from embedjob.job.result import Result
from embedjob.output.snapshot import newest_snapshot
from embedjob.reports.summary import show_summary
from embedjob.reports.verify import verify
from tests.output.worlds import World


class Filtered(World):
    """A world whose job takes the rows of one id alone."""

    wanted = ""

    def job_input(self, name: str) -> Input:
        given = super().job_input(name)
        passing = (("n", "=", self.wanted),) if self.wanted else None
        return given.model_copy(update={"filter": passing})


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Filtered]:
    with Filtered(tmp_path).running() as world:
        assert isinstance(world, Filtered)
        yield world


def ran(world: World, options: Options | None = None) -> Result:
    operation = world.run(options or Options())
    assert operation.code == 0, operation.error
    result: Result = operation.result
    return result


def shown(result: Result) -> str:
    said = io.StringIO()
    show_summary(result, Console(file=said, width=200))
    return said.getvalue()


def test_a_first_run_over_shards_without_rows_says_so(world: Filtered) -> None:
    for name in ("in/a", "in/b"):
        world.write(name, 0, 1)
    result = ran(world)
    said = "the published snapshot is empty: the input has no row in 2 shards"
    assert result.verdict.splitlines() == [
        f"published {world.out}/snapshots/00000001.json",
        said,
    ]
    assert said in shown(result)
    assert json.loads(Path(world.out, "runs", "00000001.json").read_text())["rows"] == 0
    assert "the newest snapshot is empty: the input has no row in 2 shards" in ran(world).verdict
    report = verify(world.out)
    assert (report.problems, report.files, report.rows) == ((), 0, 0)


def test_a_first_run_of_whose_rows_none_passes_says_so(world: Filtered) -> None:
    world.write("in/a", 7, 1)
    world.wanted = "nobody"
    result = ran(world)
    assert "the published snapshot is empty: input.filter lets none of 7 rows pass" in shown(result)
    assert verify(world.out).ok


def test_a_corpus_that_becomes_empty_on_purpose_is_said_too(world: Filtered) -> None:
    world.write("in/a", 7, 1)
    assert "empty" not in shown(ran(world))
    world.write("in/a", 0, 2)
    result = ran(world, Options(allow_shrink=True))
    assert result.verdict.endswith("is empty: the input has no row in 1 shard")
    snapshot = newest_snapshot(world.out)
    assert snapshot is not None
    assert len(snapshot.files) == 0


def test_rows_that_are_all_bad_are_rows(world: Filtered) -> None:
    world.write("in/a", 3, 1)
    world.wanted = "1-2"  # the row without text
    assert "empty" not in shown(ran(world))


@pytest.mark.parametrize(
    ("number", "ends"),
    [
        (1, ["fault: a", "1 fault; everything else is committed; nothing was published"]),
        (
            FAULTS_SHOWN + 3,
            [
                "fault: a",
                "further faults: 3",
                f"{FAULTS_SHOWN + 3} faults; everything else is committed; nothing was published",
            ],
        ),
    ],
)
def test_faults_are_shown_and_counted(number: int, ends: list[str]) -> None:
    said = verdict_of(["a"] * number, None).splitlines()
    assert said[-len(ends) :] == ends
    assert len(said) == min(number, FAULTS_SHOWN) + len(ends) - 1
