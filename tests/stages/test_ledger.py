from itertools import cycle

import pytest

from embedjob.job.result import Outcome
from embedjob.stages.ledger import MAX_ATTEMPTS, STAGES, LedgerState


def ledger(*dead: str) -> LedgerState:
    return LedgerState(lambda: set(dead))


def begin(state: LedgerState, stage: str, key: str, node: str) -> int | None:
    attempt = state.begin(stage, key, node)
    return attempt and attempt.number


def outcome(key: str, **more: object) -> Outcome:
    stats = {"rows": 10, "forward_tokens": 100, "text_bytes": 1000}
    return Outcome(key=key, shard="s", start=0, stop=10, stats=stats, **more)


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


def test_an_attempt_may_take_many_times_what_others_took_and_less_than_a_stall() -> None:
    state = LedgerState(set, stall_seconds=3600)
    limits = [state.begin(stage, "a", "n", 1000).seconds for stage in STAGES]
    assert limits == [1800] * 4
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


def test_a_repeated_report_changes_nothing() -> None:
    state = ledger()
    state.done(outcome("a", committed="file"))
    state.done(outcome("a", fault="late"))
    assert [end.fault for end in state.outcomes()] == [None]
    assert (state.tally().chunks, state.tally().faults, state.tally().rows) == (1, 0, 10)


def test_what_is_embedded_is_written_although_the_run_is_stopping() -> None:
    state = ledger()
    state.stop("SIGTERM")
    assert [begin(state, "write", "a", "n") for _ in range(2)] == [1, 2]


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


def test_a_task_that_reads_on_has_passed_on_the_chunk_before() -> None:
    """Ray repeats the whole of a task that died: what it had passed on is not to blame."""
    state = ledger()
    for number in range(1, MAX_ATTEMPTS + 3):
        assert (begin(state, "read", "a", "n"), begin(state, "tokenize", "a", "n")) == (1, 1)
        attempt = state.begin("read", "b", "n", before="a")
        assert attempt is not None
        assert attempt.number == number
