"""Progress: a bar on a terminal, elsewhere a line every ten seconds."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from embedjob.errors import amount
from embedjob.job.generation_plan import PlannedGeneration
from embedjob.job.planning import JobPlan
from embedjob.job.result import Tally

LINE_SECONDS = 10.0


@dataclass(frozen=True)
class Total:
    """The work that the plan leaves to do; `generation` is None where nothing is generated."""

    chunks: int
    rows: int
    text_bytes: int
    generation: PlannedGeneration | None = None


@dataclass(frozen=True)
class Estimate:
    """Total tokens, tokens per second so far, and seconds left; None before the first token."""

    tokens: float | None
    rate: float | None
    seconds: float | None


def estimate(now: Tally, total: Total, elapsed: float) -> Estimate:
    """Estimate the time left from tokens: texts differ in length, and tokens take the time.

    Total tokens = tokens seen per byte of text in finished chunks x bytes in the plan, or, before
    any chunk is finished, tokens seen per row x rows in the plan.
    """
    if not now.tokens or elapsed <= 0:
        return Estimate(None, None, None)
    if now.text_bytes and now.chunk_tokens:
        tokens = now.chunk_tokens / now.text_bytes * total.text_bytes
    else:
        tokens = now.tokens / max(1, now.rows) * total.rows
    tokens = max(tokens, float(now.tokens))
    rate = now.tokens / elapsed
    return Estimate(tokens, rate, (tokens - now.tokens) / rate)


def generating(now: Tally, total: Total, first: Tally, elapsed: float) -> str | None:
    """Return how far generation is, None where it is over, or where nothing is generated.

    The time left is that for as many answers as there may be, at the rate of the `elapsed` seconds
    since `first`, the tally of the first answers: before it, models were loaded.
    """
    left = total.chunks - now.chunks_generated - now.faults
    if total.generation is None or not total.generation.texts or left <= 0:
        return None
    made = now.answers - first.answers
    rate = seconds = None
    if made and elapsed > 0:
        rate = (now.answer_tokens - first.answer_tokens) / elapsed
        seconds = max(0, total.generation.texts - now.answers) * elapsed / made
    return (
        f"generated {now.answers:,} of at most {total.generation.texts:,} texts,"
        f" {now.answer_tokens:,} tokens, {'-' if rate is None else f'{rate:,.0f}'} tokens/s,"
        f" ETA at most {_clock(seconds)}"
    )


def line(now: Tally, total: Total, elapsed: float, generated: str | None = None) -> str:
    """Return one line of progress for a log; `generated` says how far generation is."""
    guess = estimate(now, total, elapsed)
    rate = "-" if guess.rate is None else f"{guess.rate:,.0f}"
    parts = [
        f"progress: {now.rows:,}/{total.rows:,} rows",
        f"{now.chunks:,}/{total.chunks:,} chunks",
        f"{now.tokens:,} tokens",
        f"{rate} tokens/s",
        f"ETA {_clock(guess.seconds)}",
        amount(now.actors, "encoder"),
    ]
    parts += [f"{now.reused:,} reused"] if now.reused else []
    parts += [amount(now.faults, "fault")] if now.faults else []
    return ", ".join(parts) + (f"; {generated}" if generated else "")


@contextmanager
def shown(plan: JobPlan) -> Iterator[Callable[[Tally], None]]:
    """Yield a function that shows a tally: a bar where stderr is a terminal, else lines."""
    left = plan.left
    total = Total(
        chunks=len(left),
        rows=sum(chunk.rows for chunk in left),
        text_bytes=sum(chunk.text_bytes for chunk in left),
        generation=plan.generation,
    )
    if sys.stderr.isatty():
        with _bar(total) as show:
            yield show
    else:
        yield _Lines(total)


@contextmanager
def hidden(_: JobPlan) -> Iterator[Callable[[Tally], None]]:
    """Yield a function that shows nothing of a tally."""
    yield lambda tally: None


class _Lines:
    """Prints a line at the start of encoding, every ten seconds, and at the end."""

    def __init__(self, total: Total) -> None:
        self._total = total
        self._clock, self._generator = _Clock(), _GeneratorClock(total)
        self._printed = 0.0
        self._finished = False

    def __call__(self, now: Tally) -> None:
        elapsed = self._clock.elapsed(now)
        generated = self._generator.status(now)
        finishes = now.chunks == self._total.chunks and not self._finished
        if time.monotonic() - self._printed >= LINE_SECONDS or finishes:
            self._printed = time.monotonic()
            self._finished = self._finished or finishes
            sys.stderr.write(line(now, self._total, elapsed, generated) + "\n")
            sys.stderr.flush()


@contextmanager
def _bar(total: Total) -> Iterator[Callable[[Tally], None]]:
    clock, generator = _Clock(), _GeneratorClock(total)
    columns = (
        TextColumn("[bold]embedding"),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=None, status="starting Ray and loading the encoder")

        def show(now: Tally) -> None:
            guess = estimate(now, total, clock.elapsed(now))
            generated = generator.status(now)
            if guess.tokens is None or guess.rate is None:
                if generated and now.answers:
                    progress.update(task, status=generated)
                return
            status = (
                f"{now.rows:,}/{total.rows:,} rows  {now.tokens:,} tokens"
                f"  {guess.rate:,.0f} tokens/s  ETA {_clock(guess.seconds)}"
            ) + (f"  {generated}" if generated else "")
            progress.update(task, total=guess.tokens, completed=now.tokens, status=status)

        yield show


class _Clock:
    """Seconds since the first encoder was ready: start-up is not counted as the model's speed."""

    def __init__(self) -> None:
        self._since: float | None = None

    def elapsed(self, now: Tally) -> float:
        if self._since is None and now.actors:
            self._since = time.monotonic()
        return 0.0 if self._since is None else time.monotonic() - self._since


class _GeneratorClock:
    """How far generation is, by what was made since the first answers."""

    def __init__(self, total: Total) -> None:
        self._total = total
        self._first: Tally | None = None
        self._since = 0.0

    def status(self, now: Tally) -> str | None:
        if self._first is None and now.answers:
            self._first, self._since = now, time.monotonic()
        elapsed = time.monotonic() - self._since
        return generating(now, self._total, self._first or now, elapsed)


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
