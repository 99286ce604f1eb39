import io
from dataclasses import replace

import pytest
from rich.console import Console

from embedjob.job.result import Outcomes, Result, RunFacts, summarize
from embedjob.reports.summary import show_summary
from tests.job.outcomes import outcome


def shown(result: Result) -> str:
    told = io.StringIO()
    show_summary(result, Console(file=told, width=200))
    return told.getvalue()


def test_how_well_the_device_was_used_is_told_where_it_is_known() -> None:
    facts = RunFacts(1, 0, 10.0, "f" * 64)
    known = {"model_flops": 3e12, "peak_flops": 10e12, "prefix_tokens_saved": 1234}
    ends = [outcome("a", stats=known)]
    said = shown(Result(summarize(Outcomes(ends), facts), "the/output", (), "published"))
    assert "30% of the device's peak" in said
    assert "1,234 shared and not run" in said
    assert "20.0% duplicates" in said
    assert "peak" not in shown(result("a"))


def result(*keys: str, faults: tuple[str, ...] = (), verdict: str = "published") -> Result:
    facts = RunFacts(
        chunks_planned=5, chunks_done_before=2, seconds=10.0, fingerprint="f" * 64, snapshot=None
    )
    ends = [outcome(key) for key in keys] + [outcome(fault, fault="lost") for fault in faults]
    return Result(summarize(Outcomes(ends), facts), "the/output", faults, verdict)


def test_what_was_done_is_on_one_screen() -> None:
    said = shown(result("a", "b", faults=("c",)))
    assert "5 planned, 2 done before, 2 written, 1 failed" in said
    assert "20 rows, 12 embedded, 4 deduplicated, 2 nulls, 2 quarantined" in said
    assert "the/output" in said
    assert "f" * 12 in said
    assert "nothing to do" not in said
    assert len(said.splitlines()) < 24


@pytest.mark.parametrize(("faults", "idle"), [((), True), (("a: lost",), False)])
def test_a_run_without_work_says_why(faults: tuple[str, ...], idle: bool) -> None:
    said = shown(result(faults=faults, verdict="every chunk has its file"))
    assert ("nothing to do: every chunk has its file" in said) is idle


def test_what_an_encoder_warned_of_is_shown_as_it_was_written() -> None:
    noted = replace(result("a"), notes=("[slower] layers of BertLayer",))
    assert shown(noted).count("[slower] layers of BertLayer") == 1
