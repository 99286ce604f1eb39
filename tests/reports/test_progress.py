import io
import sys
from dataclasses import replace

import pytest

from embedjob.config.job import Input
from embedjob.input.chunks import Chunk, Shard
from embedjob.job.generation_plan import PlannedGeneration
from embedjob.job.input_listing import InputListing
from embedjob.job.planning import JobPlan
from embedjob.job.result import Tally
from embedjob.reports.progress import Estimate, Total, estimate, generating, line, shown
from tests.shards import job_of

TOTAL = Total(chunks=4, rows=400, text_bytes=8000)


def tally(**more: object) -> Tally:
    nothing = {
        "chunks": 0,
        "faults": 0,
        "rows": 0,
        "tokens": 0,
        "chunk_tokens": 0,
        "text_bytes": 0,
        "actors": 0,
        "in_hand": 0,
        "refusal": None,
        "idle_seconds": 0.0,
    }
    return Tally(**{**nothing, **more})


def test_nothing_is_promised_before_the_first_token() -> None:
    assert estimate(tally(actors=1), TOTAL, 5.0) == Estimate(None, None, None)
    assert estimate(tally(tokens=10), TOTAL, 0.0) == Estimate(None, None, None)


def test_before_a_chunk_is_done_tokens_are_foreseen_by_rows() -> None:
    guess = estimate(tally(rows=100, tokens=500), TOTAL, 10.0)
    assert guess == Estimate(tokens=2000.0, rate=50.0, seconds=30.0)


def test_then_by_bytes_of_text_so_that_long_rows_count_for_more() -> None:
    # A quarter of the rows were short ones: an eighth of the bytes, 250 tokens.
    now = tally(chunks=1, rows=100, tokens=250, chunk_tokens=250, text_bytes=1000)
    guess = estimate(now, TOTAL, 10.0)
    assert guess == Estimate(tokens=2000.0, rate=25.0, seconds=70.0)


def test_a_bad_guess_never_goes_below_what_was_seen() -> None:
    now = tally(rows=400, tokens=9000, chunk_tokens=10, text_bytes=8000)
    guess = estimate(now, TOTAL, 10.0)
    assert (guess.tokens, guess.seconds) == (9000.0, 0.0)


def test_a_line_says_rows_tokens_rate_and_eta() -> None:
    now = tally(chunks=1, rows=100, tokens=500_000, actors=2)
    assert line(now, TOTAL, 100.0) == (
        "progress: 100/400 rows, 1/4 chunks, 500,000 tokens, 5,000 tokens/s, ETA 0:05:00,"
        " 2 encoders"
    )
    assert line(tally(rows=100, reused=90), TOTAL, 1.0).endswith(", 0 encoders, 90 reused")
    assert line(tally(), TOTAL, 0.0).endswith("- tokens/s, ETA -, 0 encoders")
    assert line(tally(faults=3), TOTAL, 0.0).endswith("0 encoders, 3 faults")
    assert line(tally(actors=1, faults=1), TOTAL, 0.0).endswith(", 1 encoder, 1 fault")


GENERATING = replace(TOTAL, generation=PlannedGeneration(texts=1000, tokens=50_000))


def test_while_a_generator_works_a_line_says_how_far_it_is() -> None:
    first = tally(answers=100, answer_tokens=1_000)
    now = tally(answers=350, answer_tokens=13_500, chunks_generated=1)
    said = generating(now, GENERATING, first, 50.0)
    # 250 answers in 50 seconds, and at most 650 are left.
    assert said == (
        "generated 350 of at most 1,000 texts, 13,500 tokens, 250 tokens/s, ETA at most 0:02:10"
    )
    whole = line(now, GENERATING, 0.0, said)
    assert whole.endswith(f"0 encoders; {said}")
    nothing = generating(first, GENERATING, first, 0.0)
    assert nothing is not None
    assert nothing.endswith("- tokens/s, ETA at most -")


def test_once_all_is_generated_or_failed_it_is_said_no_more() -> None:
    first = tally(answers=100)
    assert generating(tally(answers=900, chunks_generated=4), GENERATING, first, 1.0) is None
    failed = tally(answers=900, chunks_generated=3, faults=1)
    assert generating(failed, GENERATING, first, 1.0) is None
    assert generating(tally(answers=900), TOTAL, first, 1.0) is None
    put = replace(TOTAL, generation=PlannedGeneration(0, 0))
    assert generating(tally(), put, first, 1.0) is None


def test_off_a_terminal_lines_come_at_once_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    told = io.StringIO()
    monkeypatch.setattr(sys, "stderr", told)
    shard = Shard("in/a.parquet", 10, "etag")
    chunk = Chunk(shard, 0, 10, (0, 1), 0, "a-name.parquet", 30, 100)
    plan = JobPlan(
        job=job_of(Input(path="in", text="t")),
        listing=InputListing((shard,), {}),
        chunks=(chunk,),
        left=(chunk,),
        faults=(),
        empty=(),
        types={},
        corpus=(chunk,),
        projection="",
    )
    with shown(plan) as show:
        for _ in range(5):
            show(tally(actors=1, rows=4, tokens=8))
        for _ in range(5):
            show(tally(actors=1, rows=10, tokens=20, chunks=1))
    first, last = told.getvalue().splitlines()
    assert first.startswith("progress: 4/10 rows, 0/1 chunks, 8 tokens")
    assert last.startswith("progress: 10/10 rows, 1/1 chunks, 20 tokens")
