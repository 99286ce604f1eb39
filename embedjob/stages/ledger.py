"""Ledger: state that outlives every worker of a run: attempts, outcomes, and whether to stop."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from embedjob.job.result import Outcome, Outcomes, Tally
from embedjob.stages.reuse.repeated import Answer, TextOwners

STAGES = ("read", "generate", "tokenize", "encode", "write")
# What a task has done with a chunk when it begins a stage with the next one.
_PASSED = {
    "read": ("read", "tokenize"),
    "generate": ("generate", "tokenize"),
    "encode": ("encode",),
    "write": ("write",),
}
MAX_ATTEMPTS = 3
# What an attempt may take is so many times what the slowest one took for a chunk of its size, by
# the statistic that says it. READ and WRITE wait for storage, whose troubles know no size.
_SLOWER = 10.0
_SIZES = {"generate": "text_bytes", "tokenize": "text_bytes", "encode": "view_tokens"}
_FEWEST_SECONDS = 120.0
# What a chunk may take, by a deadline, is so many times what chunks of its size took on average:
# a chunk that is put down half-way was embedded for nothing.
_SPARE = 1.25
# An encoder that was not heard of for so long is gone; each calls every second.
_PRESENT_SECONDS = 10.0


class Attempt(NamedTuple):
    """An attempt at a chunk: its number, from 1, and how long it may go without progress.

    `lost_on` says where devices were lost in earlier attempts, if any were.
    """

    number: int
    seconds: float
    lost_on: str = ""


class Pace:
    """How long chunks take, by what they took so far."""

    def __init__(self) -> None:
        """Start without a measurement."""
        self._stats: dict[str, Counter[str]] = {one: Counter() for one in STAGES}

    def measure(self, stage: str, stats: Mapping[str, float]) -> None:
        """Note the summed statistics of chunks that have ended a stage."""
        self._stats[stage].update(stats)

    def seconds(self, stage: str, size: float) -> float:
        """Return what is to be expected from the beginning of a stage to a chunk's file.

        `size` is the chunk's: tokens where the stage is encode, else bytes of text. What was not
        measured yet counts for nothing.
        """
        encoded, generated, put = (self._stats[one] for one in ("encode", "generate", "write"))
        write = _quotient(put["write_seconds"], put["chunks"])
        if stage == "encode":
            return write + size * _quotient(encoded["encode_seconds"], encoded["view_tokens"])
        known = encoded["tokenize_seconds"] + encoded["encode_seconds"]
        per_byte = _quotient(known, encoded["text_bytes"])
        if stage != "tokenize":
            per_byte += _quotient(generated["generate_seconds"], generated["text_bytes"])
        return write + size * per_byte


def _quotient(seconds: float, size: float) -> float:
    return seconds / size if size else 0.0


class LedgerState:
    """Counts attempts and outcomes; the actor's body, and testable without Ray."""

    def __init__(
        self,
        dead_nodes: Callable[[], Set[str]],
        stall_seconds: float = 1800.0,
        until: float = math.inf,
    ) -> None:
        """Start empty.

        `dead_nodes` returns the ids of nodes that are gone; `stall_seconds` are the run's, and
        `until` its deadline, in seconds since 1970.
        """
        self._dead_nodes = dead_nodes
        self._until = until
        self._late = False
        self._pace = Pace()
        self._most_seconds = stall_seconds / 2
        self._slowest: dict[str, float] = {}
        self._attempts: dict[tuple[str, str], list[str]] = {}
        self._outcomes = Outcomes()
        # Hashes: a million names would take 200 MB. Of two equal ones, the second chunk would have
        # no end, which the run reports when it publishes.
        self._ended: set[int] = set()
        self._sums: Counter[str] = Counter()
        self._partial: dict[str, tuple[int, int]] = {}
        self._answers: dict[str, tuple[int, int]] = {}
        self._all_answers = (0, 0)
        self._generated: set[int] = set()  # hashes, as above
        self._in_hand: set[str] = set()
        self._actors: set[str] = set()
        self._notes: dict[str, None] = {}
        self._failed_loads: list[str] = []
        self._lost: list[tuple[str, str]] = []
        self._texts = TextOwners()
        self._stopping: str | None = None
        self._refusal: str | None = None
        self._seen = time.monotonic()
        self._idle = 0.0

    def begin(
        self, stage: str, key: str, node: str, size: float = 0.0, before: str | None = None
    ) -> Attempt | None:
        """Count an attempt at a chunk in a stage; return it, None if there is to be none.

        What has ended is not begun again, a stopping run only writes what is embedded, and by a
        deadline nothing is begun that would probably not be done before it. An
        attempt that ended with its node (a reclaimed spot machine) says nothing against the chunk
        and is not counted; nor are earlier attempts at a stage whose end this beginning shows, nor
        the attempt at the chunk that the same task had `before`: a task that dies is repeated
        whole, and only the chunk that it was at is to blame.
        """
        if hash(key) in self._ended or (self._stopping and stage != STAGES[-1]):
            return None
        if self._is_too_late(stage, size):
            self._late = True
            return None
        self._forgive(stage, before)
        for earlier in STAGES[: STAGES.index(stage)]:
            self._attempts.pop((earlier, key), None)
        return self._count(stage, key, node, size)

    def begin_together(
        self, stages: Sequence[str], sizes: Mapping[str, float], node: str, before: str | None
    ) -> dict[tuple[str, str], Attempt] | None:
        """Count the first attempt at every chunk of a parcel, in all stages of one task.

        None where it is not the first: a process died with the parcel, and each chunk begins by
        itself, so that it shows which is to blame. None also where a deadline leaves no time for
        all of them.
        """
        keys = [(stage, key) for stage in stages for key in sizes]
        known = any(key in self._attempts for key in keys) or any(
            hash(key) in self._ended for key in sizes
        )
        late = self._is_too_late(stages[0], sum(sizes.values()))
        if known or late or (self._stopping and stages[-1] != STAGES[-1]):
            return None
        self._forgive(stages[0], before)
        for earlier in STAGES[: STAGES.index(stages[0])]:
            for key in sizes:
                self._attempts.pop((earlier, key), None)
        return {(stage, key): self._count(stage, key, node, sizes[key]) for stage, key in keys}

    def _forgive(self, stage: str, before: str | None) -> None:
        """Take back the last attempt at the chunk that a task has passed on."""
        for passed in _PASSED[stage] if before else ():
            if tries := self._attempts.get((passed, before or "")):
                tries.pop()

    def _count(self, stage: str, key: str, node: str, size: float) -> Attempt:
        tried = self._attempts.setdefault((stage, key), [])
        if tried:
            dead = self._dead_nodes()
            tried[:] = [earlier for earlier in tried if earlier not in dead]
        tried.append(node)
        self._idle = 0.0
        if stage == "encode":
            self._in_hand.add(key)
        return Attempt(len(tried), self._limit(stage, size), self._lost_on(key))

    def _is_too_late(self, stage: str, size: float) -> bool:
        """Tell whether work of this size would end after the deadline; what is embedded is put."""
        if stage == STAGES[-1]:
            return False
        return time.time() + _SPARE * self._pace.seconds(stage, size) > self._until

    def measured(self, stage: str, stats: Mapping[str, float]) -> None:
        """Note what chunks took that have just ended a stage."""
        self._pace.measure(stage, stats)

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

    def answered(self, key: str, answers: int, tokens: int) -> None:
        """Note how far a generator is inside a chunk: so many answers, of so many new tokens."""
        self._answers[key] = (answers, tokens)
        self._idle = 0.0

    def generated(self, key: str) -> None:
        """Note that nothing is left to be generated for a chunk."""
        self._generated.add(hash(key))
        self._sum_answers(key)
        self._idle = 0.0

    def _sum_answers(self, key: str) -> None:
        answers, tokens = self._answers.pop(key, (0, 0))
        self._all_answers = (self._all_answers[0] + answers, self._all_answers[1] + tokens)

    def moved(self) -> None:
        """Note that something gets on before an encoder has it."""
        self._idle = 0.0

    def goes_on(self) -> None:
        """Note that something gets on that needs no encoder: the run waits for none meanwhile."""
        self._seen, self._idle = time.monotonic(), 0.0

    def unended(self, *keys: str) -> tuple[str, ...]:
        """Return which of these chunks have no end yet."""
        return tuple(key for key in keys if hash(key) not in self._ended)

    def ask_texts(self, key: str, hashes: Sequence[bytes], *, insist: bool) -> list[Answer]:
        """Return what a chunk is to do about texts that others have too, see TextOwners."""
        return self._texts.ask(key, hashes, insist=insist)

    def text_made(self, key: str, hashes: Sequence[bytes], holder: Sequence[Any]) -> None:
        """Note that an object has these texts of a chunk embedded."""
        self._texts.made(key, hashes, holder)

    def abandon(self, *keys: str) -> None:
        """Note that chunks were put down unfinished."""
        for key in keys:
            self._partial.pop(key, None)
            self._in_hand.discard(key)
            self._texts.released(key)

    def done(self, *outcomes: Outcome) -> None:
        """Note the ends of chunks; a repeated report changes nothing."""
        self.abandon(*(outcome.key for outcome in outcomes))
        for outcome in outcomes:
            for stage in STAGES:
                self._attempts.pop((stage, outcome.key), None)
            if hash(outcome.key) not in self._ended:
                self._ended.add(hash(outcome.key))
                self._outcomes.add(outcome)
                self._sums.update(outcome.stats)
                self._measure(outcome.stats)
                if seconds := outcome.stats.get("write_seconds"):
                    self._pace.measure("write", {"write_seconds": seconds, "chunks": 1.0})
        self.goes_on()

    def _measure(self, stats: Mapping[str, float]) -> None:
        for stage, unit in _SIZES.items():
            if seconds := stats.get(f"{stage}_seconds"):
                rate = seconds / max(1.0, stats.get(unit, 0.0))
                self._slowest[stage] = max(rate, self._slowest.get(stage, 0.0))

    def tally(self) -> Tally:
        """Return the state of the run now."""
        partial_rows = sum(rows for rows, _ in self._partial.values())
        partial_tokens = sum(tokens for _, tokens in self._partial.values())
        answers, answer_tokens = zip(*self._answers.values(), self._all_answers, strict=True)
        return Tally(
            chunks=len(self._outcomes),
            faults=len(self._outcomes.faults),
            rows=int(self._sums["rows"]) + partial_rows,
            tokens=int(self._sums["forward_tokens"]) + partial_tokens,
            chunk_tokens=int(self._sums["forward_tokens"]),
            text_bytes=int(self._sums["text_bytes"]),
            reused=int(self._sums["reused"]),
            actors=len(self._actors),
            in_hand=len(self._in_hand),
            refusal=self._refusal,
            idle_seconds=self._idle,
            absent_seconds=time.monotonic() - self._seen,
            answers=sum(answers),
            answer_tokens=sum(answer_tokens),
            chunks_generated=len(self._generated),
            late=self._late,
        )

    def notes(self) -> tuple[str, ...]:
        """Return what encoders warned of while they were loaded, each message once."""
        return tuple(self._notes)

    def outcomes(self) -> Outcomes:
        """Return how chunks ended."""
        return self._outcomes


def _dead_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}


class _LedgerActor(LedgerState):
    """The ledger as an actor: it lives and dies with the driver."""

    def __init__(self, stall_seconds: float, until: float) -> None:
        super().__init__(_dead_nodes, stall_seconds, until)


def new_ledger(stall_seconds: float = 1800.0, until: float = math.inf) -> Any:
    """Start a ledger actor; it requests no CPU, so that it never waits for one."""
    # On the driver's own node: elsewhere, the end of a spot machine would be the end of the run.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(num_cpus=0)(_LedgerActor)
    return actor.options(scheduling_strategy=here).remote(stall_seconds, until)


def outcomes_of(ledger: Any, *, timeout: float) -> tuple[Outcomes, tuple[str, ...]]:
    """Return how chunks ended, and the encoders' notes; RayError if Ray is lost."""
    ended, notes = ray.get([ledger.outcomes.remote(), ledger.notes.remote()], timeout=timeout)
    return ended, notes
