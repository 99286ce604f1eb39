"""Ledger: state that outlives every worker of a run: attempts, outcomes, and whether to stop."""

import time
from collections import Counter
from collections.abc import Callable, Sequence, Set
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from embedjob.job.result import Outcome, Tally

STAGES = ("read", "tokenize", "encode", "write")
MAX_ATTEMPTS = 3


class LedgerState:
    """Counts attempts and outcomes; the actor's body, and testable without Ray."""

    def __init__(self, dead_nodes: Callable[[], Set[str]]) -> None:
        """Start empty; `dead_nodes` returns the ids of nodes that are gone."""
        self._dead_nodes = dead_nodes
        self._attempts: dict[tuple[str, str], list[str]] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._ended: Counter[str] = Counter()
        self._partial: dict[str, tuple[int, int]] = {}
        self._in_hand: set[str] = set()
        self._actors: set[str] = set()
        self._notes: dict[str, None] = {}
        self._failed_loads = 0
        self._stopping: str | None = None
        self._refusal: str | None = None
        self._moved = time.monotonic()

    def begin(self, stage: str, key: str, node: str) -> int | None:
        """Count an attempt at a chunk in a stage; return its number, None if the run is stopping.

        What is embedded is still written then. An attempt that ended with its node (a reclaimed
        spot machine) says nothing against the chunk and is not counted; nor do earlier attempts at
        a stage whose end this beginning shows.
        """
        if self._stopping and stage != STAGES[-1]:
            return None
        for earlier in STAGES[: STAGES.index(stage)]:
            self._attempts.pop((earlier, key), None)
        tried = self._attempts.setdefault((stage, key), [])
        if tried:
            dead = self._dead_nodes()
            tried[:] = [earlier for earlier in tried if earlier not in dead]
        tried.append(node)
        self._moved = time.monotonic()
        if stage == "encode":
            self._in_hand.add(key)
        return len(tried)

    def ready(self, actor: str, notes: Sequence[str] = ()) -> None:
        """Note that an actor has loaded its encoder, perhaps after a restart."""
        self._actors.add(actor)
        self._notes.update(dict.fromkeys(notes))
        self._failed_loads = 0
        self._moved = time.monotonic()

    def refuse(self, message: str) -> None:
        """Stop the run for this reason: nothing can be embedded."""
        self._refusal = self._refusal or message
        self.stop(message)

    def failed_to_load(self, message: str) -> bool:
        """Note an encoder that did not load; return whether this stops the run.

        It does if none has loaded yet. Later it is the trouble of one node, unless several fail in
        a row.
        """
        self._failed_loads += 1
        if self._actors and self._failed_loads < MAX_ATTEMPTS:
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
        self._moved = time.monotonic()

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
        self._moved = time.monotonic()

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
            idle_seconds=time.monotonic() - self._moved,
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

    def __init__(self) -> None:
        super().__init__(_dead_nodes)


def new_ledger() -> Any:
    """Start a ledger actor; it requests no CPU, so that it never waits for one."""
    # On the driver's own node: elsewhere, the end of a spot machine would be the end of the run.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(num_cpus=0)(_LedgerActor)
    return actor.options(scheduling_strategy=here).remote()


def outcomes_of(ledger: Any, *, timeout: float) -> tuple[tuple[Outcome, ...], tuple[str, ...]]:
    """Return the ended chunks in order, and the encoders' notes; RayError if Ray is lost."""
    ended, notes = ray.get([ledger.outcomes.remote(), ledger.notes.remote()], timeout=timeout)
    return tuple(ended), notes
