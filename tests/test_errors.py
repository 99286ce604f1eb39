"""Exit codes by kind of error, errors told in one line, and numbers with their nouns."""

import pytest

from embedjob import errors

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type)]


@pytest.mark.parametrize("kind", KINDS)
def test_refusals_end_with_2_an_interruption_with_3_and_faults_with_1(
    kind: type[errors.EmbedjobError],
) -> None:
    refused = issubclass(kind, errors.RefusedError)
    interrupted = issubclass(kind, errors.InterruptedRunError)
    assert issubclass(kind, errors.EmbedjobError)
    assert kind("said").exit_code == (2 if refused else 3 if interrupted else 1)
    assert not (refused and issubclass(kind, errors.FaultError))


def test_an_error_is_told_in_one_short_line() -> None:
    told = errors.in_one_line(OSError(28, "No space\n  left\ton device"))
    assert told == "OSError: [Errno 28] No space left on device"
    assert errors.in_one_line(ValueError("x" * 900), most=20) == f"ValueError: {'x' * 20}"


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (0, "0 files"),
        (1, "1 file"),
        (2, "2 files"),
        (11, "11 files"),
        (2_000_001, "2,000,001 files"),
    ],
)
def test_an_amount_has_its_noun_in_the_right_number(number: int, told: str) -> None:
    assert errors.amount(number, "file") == told
