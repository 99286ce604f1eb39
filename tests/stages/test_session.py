"""A first run that ends before its flow has begun: its ledger may not have started yet.

Covers: embedjob.stages.session
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import pytest

from embedjob.config.job import Input
from embedjob.errors import ResourceError
from embedjob.job.options import Console
from embedjob.job.result import StagesEnd
from embedjob.stages import session
from tests.shards import job_of


def ended(until: datetime | None) -> StagesEnd:
    """How the parts of a first run end that has one chunk to do."""

    @contextmanager
    def shown(_: Any) -> Iterator[Callable[[Any], None]]:
        yield lambda tally: None

    job = job_of(Input(path="in", text="t"))
    plan: Any = SimpleNamespace(job=job, served=None, left=("a chunk",), until=until)
    unused: Any = None
    run = session._Run(
        plan=plan,
        flow=unused,
        look=unused,
        claim=unused,
        ledger=unused,
        console=Console(lambda line: None, shown),
        engine_of=unused,
    )
    return session._run_parts(run, frozenset(), cast(Any, SimpleNamespace(lost=lambda: None)))


@pytest.fixture(autouse=True)
def _no_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any, **__: Any) -> NoReturn:
        pytest.fail("the ledger was asked")

    for name in ("outcomes_of", "supervise"):
        monkeypatch.setattr(session, name, asked)


def test_a_refusal_of_the_pool_has_an_end_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise ResourceError("pool: no node has that")

    monkeypatch.setattr(session, "size_pools", refuse)
    end = ended(None)
    assert (str(end.error), end.late) == ("pool: no node has that", None)
    # None would say that Ray was lost, and the run would keep no summary.
    assert end.outcomes is not None
    assert not end.outcomes.committed


def test_a_deadline_that_passed_while_ray_started_begins_no_flow() -> None:
    end = ended(datetime.fromtimestamp(time.time(), timezone.utc) - timedelta(seconds=1))
    assert end.error is None
    assert end.late is not None
    assert end.late.startswith("no encoder was ready in time")
