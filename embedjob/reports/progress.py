"""Progress: a bar on a terminal, elsewhere a line every ten seconds."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from embedjob.job.planning import JobPlan
from embedjob.job.result import Tally

LINE_SECONDS = 10.0


@dataclass(frozen=True)
class Total:
    """The work that the plan leaves to do."""

    chunks: int
    rows: int
    text_bytes: int


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


def line(now: Tally, total: Total, elapsed: float) -> str:
    """Return one line of progress for a log."""
    guess = estimate(now, total, elapsed)
    rate = "-" if guess.rate is None else f"{guess.rate:,.0f}"
    parts = [
        f"progress: {now.rows:,}/{total.rows:,} rows",
        f"{now.chunks:,}/{total.chunks:,} chunks",
        f"{now.tokens:,} tokens",
        f"{rate} tokens/s",
        f"ETA {_clock(guess.seconds)}",
        f"{now.actors} encoders",
    ]
    return ", ".join(parts) + (f", {now.faults} faults" if now.faults else "")


@contextmanager
def shown(plan: JobPlan) -> Iterator[Callable[[Tally], None]]:
    """Yield a function that shows a tally: a bar where stderr is a terminal, else lines."""
    left = plan.left
    total = Total(
        chunks=len(left),
        rows=sum(chunk.rows for chunk in left),
        text_bytes=sum(chunk.text_bytes for chunk in left),
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
        self._clock = _Clock()
        self._printed = 0.0
        self._finished = False

    def __call__(self, now: Tally) -> None:
        elapsed = self._clock.elapsed(now)
        finishes = now.chunks == self._total.chunks and not self._finished
        if time.monotonic() - self._printed >= LINE_SECONDS or finishes:
            self._printed = time.monotonic()
            self._finished = self._finished or finishes
            sys.stderr.write(line(now, self._total, elapsed) + "\n")
            sys.stderr.flush()


@contextmanager
def _bar(total: Total) -> Iterator[Callable[[Tally], None]]:
    clock = _Clock()
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
            if guess.tokens is None or guess.rate is None:
                return
            status = (
                f"{now.rows:,}/{total.rows:,} rows  {now.tokens:,} tokens"
                f"  {guess.rate:,.0f} tokens/s  ETA {_clock(guess.seconds)}"
            )
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


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
