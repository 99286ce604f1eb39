"""Commands in processes of their own, to be killed, suspended and woken, and seeds for that."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster import AUTH, ROOT, kill

WAIT_SECONDS = 300.0
SLOW_SEEDS = 3


def seeds(slow: int) -> list[Any]:
    """Return twenty seeds of a test, so many of them in `slow`, the others in `chaos`."""
    return [
        pytest.param(seed, marks=pytest.mark.slow if seed < slow else pytest.mark.chaos)
        for seed in range(20)
    ]


SEEDS = seeds(SLOW_SEEDS)


@dataclass(frozen=True)
class Driver:
    """One command's process, and all that it says."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def until(self, found: Callable[[], object], what: str) -> None:
        """Return once it is found; the process has to be alive all the while."""
        alive = self.until_over_or(found, what)
        assert alive, f"exit {self.process.returncode} before there were {what}\n{self.said()}"

    def until_over_or(self, found: Callable[[], object], what: str, pause: float = 0.02) -> bool:
        """Return whether it was found before the process ended."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not found():
            if self.is_over():
                return False
            assert time.monotonic() < deadline, f"no {what} in {WAIT_SECONDS} s\n{self.said()}"
            time.sleep(pause)
        return True

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def kill_all(self) -> None:
        """The process and all that it has started, as when the power fails."""
        ancestor = psutil.Process(self.process.pid)
        kill([*ancestor.children(recursive=True), ancestor])
        self.process.wait()

    def suspend(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def wake(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@contextmanager
def driver(
    folder: Path, *arguments: str, name: str = "driver", module: str = "embedjob"
) -> Iterator[Driver]:
    """`embedjob` with these arguments, gone at the end with all that it started.

    `module` is another program that takes them.
    """
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **AUTH, "PYTHONPATH": str(ROOT)},
            cwd=folder,
        )
    started = Driver(process, log)
    try:
        yield started
    finally:
        if not started.is_over():
            started.kill_all()


def chance_of(seed: int, name: str) -> random.Random:
    """The numbers of one seed in one test."""
    return random.Random(f"{name} {seed}")
