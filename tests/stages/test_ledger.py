from embedjob.job.result import Outcome
from embedjob.stages.ledger import MAX_ATTEMPTS, LedgerState


def ledger(*dead: str) -> LedgerState:
    return LedgerState(lambda: set(dead))


def outcome(key: str, **more: object) -> Outcome:
    stats = {"rows": 10, "forward_tokens": 100, "text_bytes": 1000}
    return Outcome(key=key, shard="s", start=0, stop=10, stats=stats, **more)


def test_attempts_are_counted_by_stage_and_chunk() -> None:
    state = ledger()
    assert [state.begin("encode", "a", "n") for _ in range(MAX_ATTEMPTS + 1)] == [1, 2, 3, 4]
    assert state.begin("read", "a", "n") == 1
    assert state.begin("encode", "b", "n") == 1


def test_an_attempt_that_ended_with_its_node_is_not_counted() -> None:
    state = ledger("spot-1", "spot-2")
    counts = [state.begin("encode", "a", node) for node in ("spot-1", "spot-2", "spot-1", "ours")]
    assert counts == [1, 1, 1, 1]
    assert state.begin("encode", "a", "ours") == 2


def test_nothing_begins_once_the_run_is_stopping() -> None:
    state = ledger()
    state.stop("SIGTERM")
    assert state.begin("read", "a", "n") is None
    assert state.stopping() == "SIGTERM"
    state.stop("later")
    assert state.stopping() == "SIGTERM"


def test_the_first_refusal_stays_and_stops_the_run() -> None:
    state = ledger()
    state.refuse("no model")
    state.refuse("no model on another node")
    assert state.tally().refusal == "no model"
    assert state.stopping() == "no model"


def test_one_bad_node_stops_nothing_once_an_encoder_has_loaded() -> None:
    ledger = LedgerState(set)
    ledger.ready("actor")
    # A long night loses more nodes than that, and gets others.
    for _ in range(3):
        assert not ledger.failed_to_load("no room")
        ledger.ready("actor")
    assert [ledger.failed_to_load("no room") for _ in range(3)] == [False, False, True]
    assert ledger.tally().refusal == "no room"
    first = LedgerState(set)
    assert first.failed_to_load("no such model")
    assert first.tally().refusal == first.stopping() == "no such model"


def test_what_several_encoders_warn_of_is_noted_once() -> None:
    ledger = LedgerState(set)
    ledger.ready("first", ("slower layers",))
    ledger.ready("second", ("slower layers", "padded"))
    assert ledger.notes() == ("slower layers", "padded")


def test_a_chunk_is_in_hand_from_encode_until_it_ended() -> None:
    state = ledger()
    state.begin("read", "a", "n")
    assert state.tally().in_hand == 0
    state.begin("encode", "a", "n")
    state.begin("encode", "b", "n")
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
    assert [state.begin("write", "a", "n") for _ in range(2)] == [1, 2]


def test_attempts_at_a_stage_are_forgotten_once_the_next_one_begins() -> None:
    state = ledger()
    assert [state.begin("read", "a", "n") for _ in range(2)] == [1, 2]
    assert state.begin("tokenize", "a", "n") == 1
    # The tokenizer dies, and Ray Data reads again: what is counted is the stage that dies.
    assert (state.begin("read", "a", "n"), state.begin("tokenize", "a", "n")) == (1, 2)
    assert (state.begin("read", "a", "n"), state.begin("tokenize", "a", "n")) == (1, 3)
