import tracemalloc
from dataclasses import replace
from itertools import cycle

import pyarrow as pa
import pytest

from embedjob.job.result import Outcome
from embedjob.output.chunk_file import Committed
from embedjob.output.manifest import COUNTS
from embedjob.stages.ledger import MAX_ATTEMPTS, STAGES, LedgerState


def ledger(*dead: str) -> LedgerState:
    return LedgerState(lambda: set(dead))


def begin(state: LedgerState, stage: str, key: str, node: str) -> int | None:
    attempt = state.begin(stage, key, node)
    return attempt and attempt.number


def outcome(key: str, *, fault: str | None = None) -> Outcome:
    stats = {"rows": 10, "forward_tokens": 100, "text_bytes": 1000}
    kept = None if fault else Committed(key, 10, 100, "etag", {"rows": 10}, written=True)
    return Outcome(key, "s", start=0, stop=10, committed=kept, fault=fault, stats=stats)


def test_attempts_are_counted_by_stage_and_chunk() -> None:
    state = ledger()
    assert [begin(state, "encode", "a", "n") for _ in range(MAX_ATTEMPTS + 1)] == [1, 2, 3, 4]
    assert begin(state, "read", "a", "n") == 1
    assert begin(state, "encode", "b", "n") == 1


def test_an_attempt_that_ended_with_its_node_is_not_counted() -> None:
    state = ledger("spot-1", "spot-2")
    counts = [begin(state, "encode", "a", node) for node in ("spot-1", "spot-2", "spot-1", "ours")]
    assert counts == [1, 1, 1, 1]
    assert begin(state, "encode", "a", "ours") == 2


def test_nothing_begins_once_the_run_is_stopping() -> None:
    state = ledger()
    state.stop("SIGTERM")
    assert begin(state, "read", "a", "n") is None
    assert state.stopping() == "SIGTERM"
    state.stop("later")
    assert state.stopping() == "SIGTERM"


def test_the_first_refusal_stays_and_stops_the_run() -> None:
    state = ledger()
    state.refuse("no model")
    state.refuse("no model on another node")
    assert state.tally().refusal == "no model"
    assert state.stopping() == "no model"


def test_one_bad_node_stops_nothing_while_an_encoder_is_there() -> None:
    state = ledger()
    state.ready("actor")
    assert not any(state.failed_to_load("no room", "bad") for _ in range(20))
    assert state.tally().refusal is None


def test_a_first_encoder_that_fails_is_the_trouble_of_its_node() -> None:
    state = ledger()
    assert [state.failed_to_load("no room", "bad") for _ in range(2)] == [False, False]
    # A good node needs longer to load.
    assert not state.failed_to_load("no room", "bad")
    state.ready("actor")
    assert state.tally().refusal is None


@pytest.mark.parametrize(
    ("nodes", "alone", "loads"), [(["a", "b"], False, 3), (["a"], True, 3), (["a"], False, 9)]
)
def test_an_encoder_that_loads_nowhere_is_refused(
    nodes: list[str], alone: bool, loads: int
) -> None:
    state, where = ledger(), cycle(nodes)
    failed = [state.failed_to_load("no model", next(where), alone=alone) for _ in range(loads)]
    assert failed == [False] * (loads - 1) + [True]
    assert state.tally().refusal == state.stopping() == "no model"


def test_a_run_is_idle_only_while_an_encoder_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("embedjob.stages.ledger.time.monotonic", lambda: now[0])
    state = ledger()
    for seconds, called in ((500, 0), (1, 1), (60, 60), (3000, 0), (1, 1), (30, 30)):
        # So many calls in so many seconds: none while a machine is awaited.
        for _ in range(called):
            now[0] += seconds / called
            state.present()
        now[0] += 0 if called else seconds
    assert state.tally().idle_seconds == 60 + 30
    now[0] += 700
    assert (state.tally().idle_seconds, state.tally().absent_seconds) == (90, 700)
    begin(state, "encode", "a", "n")
    assert state.tally().idle_seconds == 0
    for _ in range(30):
        now[0] += 1
        state.present()
    # A generator gets on while encoders wait for it.
    state.moved()
    assert state.tally().idle_seconds == 0


def test_an_attempt_may_take_many_times_what_others_took_and_less_than_a_stall() -> None:
    state = LedgerState(set, stall_seconds=3600)
    limits = [state.begin(stage, "a", "n", 1000).seconds for stage in STAGES]
    assert limits == [1800] * len(STAGES)
    stats = {"encode_seconds": 100.0, "view_tokens": 1000.0}
    state.done(Outcome(key="b", shard="s", start=0, stop=10, stats=stats))
    limits = [state.begin("encode", key, "n", size).seconds for key, size in SIZES.items()]
    assert limits == [120, 500, 1800]
    assert state.begin("write", "a", "n", 1).seconds == 1800


SIZES = {"small": 1, "middle": 500, "large": 10**6}


def test_what_several_encoders_warn_of_is_noted_once() -> None:
    ledger = LedgerState(set)
    ledger.ready("first", ("slower layers",))
    ledger.ready("second", ("slower layers", "padded"))
    assert ledger.notes() == ("slower layers", "padded")


def test_a_chunk_is_in_hand_from_encode_until_it_ended() -> None:
    state = ledger()
    begin(state, "read", "a", "n")
    assert state.tally().in_hand == 0
    begin(state, "encode", "a", "n")
    begin(state, "encode", "b", "n")
    assert state.tally().in_hand == 2
    state.done(outcome("a"))
    state.abandon("b")
    assert state.tally().in_hand == 0


def test_progress_counts_ended_chunks_and_what_is_being_encoded() -> None:
    state = ledger()
    state.progress("a", 4, 40)
    state.progress("b", 1, 10)
    assert (state.tally().rows, state.tally().tokens) == (5, 50)
    state.done(outcome("a"))
    tally = state.tally()
    assert (tally.rows, tally.tokens, tally.chunk_tokens) == (11, 110, 100)
    assert tally.text_bytes == 1000


def test_work_that_needs_no_encoder_is_no_absence_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither while old vectors are gathered, nor while chunks end that need no other."""
    now = [0.0]
    monkeypatch.setattr("embedjob.stages.ledger.time.monotonic", lambda: now[0])
    ledger = LedgerState(set)
    now[0] = 500.0
    assert ledger.tally().absent_seconds == 500.0
    ledger.goes_on()
    assert ledger.tally().absent_seconds == 0.0
    now[0] = 900.0
    ledger.done(Outcome("a", "s", 0, 1, fault="x", stats={"reused": 3}))
    assert ledger.tally().absent_seconds == 0.0
    assert ledger.tally().reused == 3


def test_what_has_not_ended_is_left_for_encoders() -> None:
    ledger = LedgerState(set)
    ledger.begin("read", "a", "node")
    ledger.abandon("a")
    ledger.done(Outcome("b", "s", 0, 1, fault="x"))
    assert ledger.unended("a", "b", "c") == ("a", "c")


def test_a_repeated_report_changes_nothing() -> None:
    state = ledger()
    state.done(outcome("a"))
    state.done(outcome("a", fault="late"))
    assert (state.outcomes().committed, state.outcomes().faults) == (1, [])
    assert (state.tally().chunks, state.tally().faults, state.tally().rows) == (1, 0, 10)


def test_what_is_embedded_is_written_although_the_run_is_stopping() -> None:
    state = ledger()
    state.stop("SIGTERM")
    assert [begin(state, "write", "a", "n") for _ in range(2)] == [1, 2]


def test_a_chunk_that_has_ended_is_not_begun_again() -> None:
    """Ray repeats whole tasks, also those whose chunks were committed."""
    state = ledger()
    state.done(outcome("a"))
    assert [begin(state, stage, "a", "n") for stage in STAGES] == [None] * len(STAGES)
    assert begin(state, "write", "b", "n") == 1


def test_the_ledger_of_many_chunks_takes_at_most_300_bytes_for_each() -> None:
    """Names and etags as long as those of S3; what is kept of a chunk is kept once."""
    state, chunks = ledger(), 4096
    counts = {name: 16_384 for name in COUNTS if name != "reused"}
    stats = {f"statistic {number}": 0.5 + number for number in range(16)}
    tracemalloc.start()
    try:
        before = pa.total_allocated_bytes() + tracemalloc.get_traced_memory()[0]
        for number in range(chunks):
            key = (
                f"docs_part-{number // 10:06d}-{'0' * 16}-{'1' * 16}-{number:010d}-{0:010d}.parquet"
            )
            for stage in STAGES:
                begin(state, stage, key, "node")
            kept = Committed(key, 16_384, 10**8, f"{number:032x}", dict(counts), written=True)
            state.done(Outcome(key, f"s3://corpus/{key}", 0, 9, kept, stats=dict(stats)))
        taken = pa.total_allocated_bytes() + tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert state.tally().chunks == chunks
    assert 150 < taken / chunks <= 300


def test_attempts_at_a_stage_are_forgotten_once_the_next_one_begins() -> None:
    state = ledger()
    assert [begin(state, "read", "a", "n") for _ in range(2)] == [1, 2]
    assert begin(state, "tokenize", "a", "n") == 1
    # The tokenizer dies, and Ray Data reads again: what is counted is the stage that dies.
    assert (begin(state, "read", "a", "n"), begin(state, "tokenize", "a", "n")) == (1, 2)
    assert (begin(state, "read", "a", "n"), begin(state, "tokenize", "a", "n")) == (1, 3)


def test_a_device_that_lost_other_chunks_too_is_named_as_the_reason() -> None:
    state = ledger()
    assert state.begin("encode", "a", "n").lost_on == ""
    state.lost("a", "GPU 3 of node x")
    assert state.begin("encode", "a", "n").lost_on == "lost on GPU 3 of node x"
    state.lost("b", "GPU 3 of node x")
    state.lost("c", "GPU 1 of node y")
    lost_on = state.begin("encode", "a", "n").lost_on
    assert lost_on == "lost on GPU 3 of node x, as were 1 other chunks: the device may be broken"


def test_a_task_that_goes_on_has_passed_on_the_chunk_before() -> None:
    """Ray repeats the whole of a task that died: what it had passed on is not to blame."""
    state = ledger()
    for number in range(1, MAX_ATTEMPTS + 3):
        assert (begin(state, "read", "a", "n"), begin(state, "tokenize", "a", "n")) == (1, 1)
        attempt = state.begin("read", "b", "n", before="a")
        assert attempt is not None
        assert attempt.number == number


def test_a_parcel_begins_together_once_and_then_chunk_by_chunk() -> None:
    state, sizes = ledger(), {"a": 1.0, "b": 2.0}
    task = ("read", "tokenize")
    first = state.begin_together(task, sizes, "n", None)
    assert first is not None
    assert {key: attempt.number for key, attempt in first.items()} == {
        (stage, key): 1 for stage in task for key in "ab"
    }
    assert state.begin_together(task, sizes, "n", None) is None
    assert [begin(state, stage, "a", "n") for stage in task] == [2, 2]
    assert state.begin_together(task, {"c": 1.0, "d": 1.0}, "n", None) is not None
    # What is encoded has been tokenized.
    assert state.begin_together(("encode",), sizes, "n", None) is not None
    assert state.tally().in_hand == 2
    assert begin(state, "read", "a", "n") == 1


def test_a_parcel_with_an_ended_chunk_does_not_begin_together_nor_does_one_of_a_stopping_run() -> (
    None
):
    state, sizes = ledger(), {"a": 1.0, "b": 2.0}
    state.done(outcome("a"))
    assert state.begin_together(("write",), sizes, "n", None) is None
    state.stop("SIGTERM")
    other = {"c": 1.0, "d": 2.0}
    assert state.begin_together(("encode",), other, "n", None) is None
    assert state.begin_together(("write",), other, "n", None) is not None


@pytest.mark.parametrize("stage", ["encode", "write"])
def test_a_chunk_is_blamed_for_its_own_deaths_alone_and_for_all_of_them(stage: str) -> None:
    """Tasks of three chunks that die at any of them by chance do not go on for ever."""
    state, deaths = ledger(), iter("bacabcbacb")

    def killed() -> list[str]:
        """One task: the chunks that it gives up."""
        victim, given_up, before = next(deaths, None), [], None
        for key in "abc":
            attempt = state.begin(stage, key, "n", before=before)
            assert attempt is not None
            if attempt.number > MAX_ATTEMPTS:
                given_up.append(key)
            elif key == victim:
                return given_up
            before = key
        return given_up

    ends = [killed() for _ in range(11)]
    assert ends[:8] == [[]] * 8
    assert ends[8:] == [["a", "b"], ["a", "b", "c"], ["a", "b", "c"]]


def test_answers_of_generators_are_counted_while_they_come() -> None:
    state = ledger()
    state.answered("a", 3, 30)
    state.answered("b", 2, 20)
    state.answered("a", 5, 50)
    tally = state.tally()
    assert (tally.answers, tally.answer_tokens, tally.chunks_generated) == (7, 70, 0)
    # A process died with the chunk: it begins anew.
    state.answered("a", 1, 10)
    assert (state.tally().answers, state.tally().answer_tokens) == (3, 30)
    state.answered("a", 6, 60)
    state.generated("a")
    state.generated("a")
    state.generated("c")  # it was there already
    tally = state.tally()
    assert (tally.answers, tally.answer_tokens, tally.chunks_generated) == (8, 80, 2)
    state.done(outcome("a"))
    assert (state.tally().answers, state.tally().chunks_generated) == (8, 2)


def report(state: LedgerState, *, tokens: float, seconds: float, text_bytes: float = 0.0) -> None:
    """What an encoder says of a chunk that it has done."""
    took = {"encode_seconds": seconds, "view_tokens": tokens, "text_bytes": text_bytes}
    state.measured("encode", took)


def test_by_a_deadline_nothing_begins_that_would_end_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr("embedjob.stages.ledger.time.time", lambda: now[0])
    state = LedgerState(set, until=1100.0)
    # Nothing is known yet: the first chunk shows it.
    assert state.begin("encode", "first", "n", 10**9) is not None
    report(state, tokens=100, seconds=10)
    # A tenth of a second for a token: what takes 90 s on average may take more than 100.
    assert state.begin("encode", "large", "n", 900) is None
    assert state.tally().late
    assert state.begin("encode", "small", "n", 700) is not None
    now[0] = 1099.0
    assert state.begin("encode", "later", "n", 10) is None
    assert state.begin("write", "small", "n", 0) is not None
    now[0] = 1101.0
    assert state.begin("read", "empty", "n", 0) is None
    assert state.begin("write", "first", "n", 0) is not None


def test_a_chunk_is_not_read_whose_later_stages_would_end_too_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("embedjob.stages.ledger.time.time", lambda: 1000.0)
    state = LedgerState(set, until=1100.0)
    state.measured("generate", {"generate_seconds": 40.0, "text_bytes": 1000.0})
    state.measured(
        "encode",
        {
            "tokenize_seconds": 1.0,
            "encode_seconds": 9.0,
            "view_tokens": 100.0,
            "text_bytes": 1000.0,
        },
    )
    # 0.05 s for a byte from READ on, 0.01 s once its texts are generated.
    sizes = {"read": 1600.0, "generate": 1600.0, "tokenize": 8000.0}
    for stage, size in sizes.items():
        assert state.begin(stage, f"{stage} more", "n", size * 1.1) is None
        assert state.begin(stage, f"{stage} less", "n", size * 0.9) is not None
    # With what a put takes, less is possible.
    state.done(replace(outcome("put"), stats={"write_seconds": 50.0}))
    assert state.begin("encode", "a", "n", 400.0) is None
    assert state.begin("encode", "b", "n", 300.0) is not None


def test_small_chunks_begin_together_only_where_there_is_time_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("embedjob.stages.ledger.time.time", lambda: 1000.0)
    state = LedgerState(set, until=1100.0)
    report(state, tokens=100, seconds=10)
    sizes = {"a": 400.0, "b": 300.0, "c": 200.0}
    assert state.begin_together(("encode",), sizes, "n", None) is None
    assert not state.tally().late
    # One by one, those begin that can be done.
    assert [begin(state, "encode", key, "n") for key in sizes] == [1, 1, 1]
    assert state.begin_together(("encode",), {"d": 400.0, "e": 300.0}, "n", None) is not None


def test_without_a_deadline_no_chunk_is_too_large() -> None:
    state = ledger()
    report(state, tokens=1, seconds=10**9)
    assert state.begin("encode", "a", "n", 10**9) is not None
    assert not state.tally().late
