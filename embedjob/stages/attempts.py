"""Attempts: every stage counts its attempts at a chunk, and an attempt that hangs is ended.

The count is kept by the ledger, where no crash of a worker loses it.
"""

import faulthandler
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from embedjob.stages.chunk_state import Failure
from embedjob.stages.ledger import MAX_ATTEMPTS, Attempt

# Of an attempt's time, what storage in trouble may take: the rest is for the work itself.
STORAGE_SHARE = 0.8
# The attempts at the parcel in hand that were counted together, by stage and chunk.
_begun: dict[tuple[str, str], Attempt] = {}


def begin_parcel(
    stages: Sequence[str], sizes: Mapping[str, float], ledger: Any, *, before: str | None = None
) -> None:
    """Count the first attempts at all chunks of a parcel in one call, for `begin_attempt` to give.

    `sizes` are those of its chunks by key. Where a process died with the parcel, this does nothing.
    """
    _begun.clear()
    if len(sizes) > 1:
        node = ray.get_runtime_context().get_node_id()
        begun = ray.get(ledger.begin_together.remote(stages, sizes, node, before))
        _begun.update(begun or {})


def begin_attempt(
    stage: str, key: str, ledger: Any, *, size: float = 0.0, before: str | None = None
) -> Attempt | Failure:
    """Count an attempt at a chunk; return it, or why there is to be none.

    `size` is the chunk's, in tokens or bytes of text, for the limit of the attempt; `before` is the
    chunk that the same task has just passed on.
    """
    attempt = _begun.pop((stage, key), None)
    if attempt is None:
        node = ray.get_runtime_context().get_node_id()
        attempt = ray.get(ledger.begin.remote(stage, key, node, size, before))
    if attempt is None:
        return Failure("abandoned", "the run is stopping")
    if attempt.number > MAX_ATTEMPTS:
        lost = f" ({attempt.lost_on})" if stage == "encode" and attempt.lost_on else ""
        return Failure(
            "fault",
            f"its {stage} process died {MAX_ATTEMPTS} times{lost}; no further attempt is made (a"
            f" process that does not get on for {attempt.seconds:.0f} s is ended, too)",
        )
    return attempt


@contextmanager
def limited(seconds: float) -> Iterator[Callable[[], None]]:
    """End this process if, for `seconds`, the block neither ends nor calls what it is given.

    The stacks of all threads go to the process's log. The watch needs no thread of Python, since
    what hangs may hold the interpreter's lock.
    """
    often, armed = min(1.0, seconds / 4), float("-inf")

    def moved() -> None:
        nonlocal armed
        if time.monotonic() - armed >= often:
            armed = time.monotonic()
            faulthandler.dump_traceback_later(seconds, exit=True, file=2)

    moved()
    try:
        yield moved
    finally:
        faulthandler.cancel_dump_traceback_later()
