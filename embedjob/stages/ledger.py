"""Ledger: state that outlives every worker of a run: attempts, outcomes, and whether to stop."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from embedjob.job.result import Outcome, Tally

STAGES = ("read", "tokenize", "encode", "write")
# What Ray fuses: a task that reads the next chunk has tokenized the one before.
_ONE_TASK = STAGES[:2]
MAX_ATTEMPTS = 3
# What an attempt may take is so many times what the slowest one took for a chunk of its size, by
# the statistic that says it. READ and WRITE wait for storage, whose troubles know no size.
_SLOWER = 10.0
_SIZES = {"tokenize": "text_bytes", "encode": "view_tokens"}
_FEWEST_SECONDS = 120.0
# An encoder that was not heard of for so long is gone; each calls every second.
_PRESENT_SECONDS = 10.0


class Attempt(NamedTuple):
    """An attempt at a chunk: its number, from 1, and how long it may go without progress.

    `lost_on` says where devices were lost in earlier attempts, if any were.
    """

    number: int
    seconds: float
    lost_on: str = ""


class LedgerState:
    """Counts attempts and outcomes; the actor's body, and testable without Ray."""

    def __init__(self, dead_nodes: Callable[[], Set[str]], stall_seconds: float = 1800.0) -> None:
        """Start empty.

        `dead_nodes` returns the ids of nodes that are gone; `stall_seconds` are the run's.
        """
        self._dead_nodes = dead_nodes
        self._most_seconds = stall_seconds / 2
        self._slowest: dict[str, float] = {}
        self._attempts: dict[tuple[str, str], list[str]] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._ended: Counter[str] = Counter()
        self._partial: dict[str, tuple[int, int]] = {}
        self._in_hand: set[str] = set()
        self._actors: set[str] = set()
        self._notes: dict[str, None] = {}
        self._failed_loads: list[str] = []
        self._lost: list[tuple[str, str]] = []
        self._stopping: str | None = None
        self._refusal: str | None = None
        self._seen = time.monotonic()
        self._idle = 0.0

    def begin(
        self, stage: str, key: str, node: str, size: float = 0.0, before: str | None = None
    ) -> Attempt | None:
        """Count an attempt at a chunk in a stage; return it, None if the run is stopping.

        What is embedded is still written then. An attempt that ended with its node (a reclaimed
        spot machine) says nothing against the chunk and is not counted; nor do earlier attempts at
        a stage whose end this beginning shows, whether of this chunk, or of the one that the same
        task passed on `before`.
        """
        if self._stopping and stage != STAGES[-1]:
            return None
        for earlier in STAGES[: STAGES.index(stage)]:
            self._attempts.pop((earlier, key), None)
        if before is not None:
            for passed in _ONE_TASK:
                self._attempts.pop((passed, before), None)
        tried = self._attempts.setdefault((stage, key), [])
        if tried:
            dead = self._dead_nodes()
            tried[:] = [earlier for earlier in tried if earlier not in dead]
        tried.append(node)
        self._idle = 0.0
        if stage == "encode":
            self._in_hand.add(key)
        return Attempt(len(tried), self._limit(stage, size), self._lost_on(key))

    def lost(self, key: str, device: str) -> None:
        """Note that a device was lost with a chunk: it may be the device's own fault."""
        self._lost.append((key, device))

    def _lost_on(self, key: str) -> str:
        """Return on which devices a chunk was lost, and how many others were lost there."""
        devices = {device for its_key, device in self._lost if its_key == key}
        others = {its_key for its_key, device in self._lost if device in devices} - {key}
        if not devices:
            return ""
        blame = f", as were {len(others)} other chunks: the device may be broken" if others else ""
        return f"lost on {' and '.join(sorted(devices))}{blame}"

    def _limit(self, stage: str, size: float) -> float:
        """Return how long an attempt may go without progress; long, while no rate is known.

        It is less than a stall of the run: one chunk that hangs is no reason to end it.
        """
        slowest = self._slowest.get(stage)
        if slowest is None:
            return self._most_seconds
        return min(max(_SLOWER * slowest * size, _FEWEST_SECONDS), self._most_seconds)

    def present(self) -> str | None:
        """Note that an encoder is there; return why the run is stopping, None while it is not.

        A run stalls only while encoders are there: without any, it waits for a machine.
        """
        now = time.monotonic()
        if now - self._seen < _PRESENT_SECONDS:
            self._idle += now - self._seen
        self._seen = now
        return self.stopping()

    def ready(self, actor: str, notes: Sequence[str] = ()) -> None:
        """Note that an actor has loaded its encoder, perhaps after a restart."""
        self._actors.add(actor)
        self._notes.update(dict.fromkeys(notes))
        self._failed_loads.clear()
        self._seen = time.monotonic()
        self._idle = 0.0

    def refuse(self, message: str) -> None:
        """Stop the run for this reason: nothing can be embedded."""
        self._refusal = self._refusal or message
        self.stop(message)

    def failed_to_load(self, message: str, node: str, *, alone: bool = False) -> bool:
        """Note an encoder that did not load; return whether this stops the run.

        One bad node stops nothing while an encoder is there, nor soon beside others (`alone` says
        that it has none). Several failures in a row on several nodes do, as many on one do.
        """
        self._failed_loads.append(node)
        everywhere = alone or len(set(self._failed_loads)) > 1
        enough = MAX_ATTEMPTS if everywhere else MAX_ATTEMPTS**2
        present = self._actors and time.monotonic() - self._seen < _PRESENT_SECONDS
        if present or len(self._failed_loads) < enough:
            return False
        self.refuse(message)
        return True

    def stop(self, reason: str) -> None:
        """Ask every stage to pass on nothing more."""
        self._stopping = self._stopping or reason

    def stopping(self) -> str | None:
        """Return why the run is stopping; None while it is not."""
        return self._stopping

    def progress(self, key: str, rows: int, tokens: int) -> None:
        """Note how far an encoder is inside a chunk."""
        self._partial[key] = (rows, tokens)
        self._idle = 0.0

    def abandon(self, key: str) -> None:
        """Note that a chunk was put down unfinished."""
        self._partial.pop(key, None)
        self._in_hand.discard(key)

    def done(self, outcome: Outcome) -> None:
        """Note the end of a chunk; a repeated report changes nothing."""
        self.abandon(outcome.key)
        if outcome.key not in self._outcomes:
            self._outcomes[outcome.key] = outcome
            self._ended.update(outcome.stats)
            self._measure(outcome.stats)
        self._idle = 0.0

    def _measure(self, stats: Mapping[str, float]) -> None:
        for stage, unit in _SIZES.items():
            if seconds := stats.get(f"{stage}_seconds"):
                rate = seconds / max(1.0, stats.get(unit, 0.0))
                self._slowest[stage] = max(rate, self._slowest.get(stage, 0.0))

    def tally(self) -> Tally:
        """Return the state of the run now."""
        partial_rows = sum(rows for rows, _ in self._partial.values())
        partial_tokens = sum(tokens for _, tokens in self._partial.values())
        return Tally(
            chunks=len(self._outcomes),
            faults=sum(outcome.fault is not None for outcome in self._outcomes.values()),
            rows=int(self._ended["rows"]) + partial_rows,
            tokens=int(self._ended["forward_tokens"]) + partial_tokens,
            chunk_tokens=int(self._ended["forward_tokens"]),
            text_bytes=int(self._ended["text_bytes"]),
            actors=len(self._actors),
            in_hand=len(self._in_hand),
            refusal=self._refusal,
            idle_seconds=self._idle,
            absent_seconds=time.monotonic() - self._seen,
        )

    def notes(self) -> tuple[str, ...]:
        """Return what encoders warned of while they were loaded, each message once."""
        return tuple(self._notes)

    def outcomes(self) -> list[Outcome]:
        """Return every chunk that ended, in the order of their ends."""
        return list(self._outcomes.values())


def _dead_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}


class _LedgerActor(LedgerState):
    """The ledger as an actor: it lives and dies with the driver."""

    def __init__(self, stall_seconds: float) -> None:
        super().__init__(_dead_nodes, stall_seconds)


def new_ledger(stall_seconds: float = 1800.0) -> Any:
    """Start a ledger actor; it requests no CPU, so that it never waits for one."""
    # On the driver's own node: elsewhere, the end of a spot machine would be the end of the run.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(num_cpus=0)(_LedgerActor)
    return actor.options(scheduling_strategy=here).remote(stall_seconds)


def outcomes_of(ledger: Any, *, timeout: float) -> tuple[tuple[Outcome, ...], tuple[str, ...]]:
    """Return the ended chunks in order, and the encoders' notes; RayError if Ray is lost."""
    ended, notes = ray.get([ledger.outcomes.remote(), ledger.notes.remote()], timeout=timeout)
    return tuple(ended), notes
