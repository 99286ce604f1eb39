"""Log levels of transformers: low while a model is read, and as before afterwards."""

from collections.abc import Iterator

import pytest
from transformers.utils import logging

from embedjob.models.quiet import quiet


def levels() -> tuple[int, bool]:
    return logging.get_verbosity(), logging.is_progress_bar_enabled()


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    verbosity, bars = levels()
    yield
    logging.set_verbosity(verbosity)
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()


@pytest.mark.parametrize("bars", [True, False])
def test_levels_come_back_even_after_an_error(bars: bool) -> None:
    logging.set_verbosity_info()
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
    with pytest.raises(OSError, match="cut short"):
        _fail_quietly()
    assert levels() == (logging.INFO, bars)


def _fail_quietly() -> None:
    with quiet():
        assert levels() == (logging.ERROR, False)
        raise OSError("cut short")
