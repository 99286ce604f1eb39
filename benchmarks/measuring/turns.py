"""Two or more ways to the same result, run in turns: A B A B."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
S = TypeVar("S")


@dataclass
class Turns(Generic[T]):
    """The seconds of every turn of each way, and what its last one gave."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    results: dict[str, T] = field(default_factory=dict)

    def median(self, way: str) -> float:
        """The median seconds of a way."""
        return statistics.median(self.seconds[way])

    def ratio(self, slow: str, fast: str) -> float:
        """Median seconds of `slow` over those of `fast`."""
        return self.median(slow) / self.median(fast)

    def ratios(self, slow: str, fast: str) -> list[float]:
        """The same ratio, turn by turn: its spread says how far the median is to be trusted."""
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return [one / other for one, other in pairs]


def take_turns(
    ways: Mapping[str, Callable[[], T]],
    *,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Turns[T]:
    """Every way once per round, one after the other, each timed by a clock."""
    turns: Turns[T] = Turns({way: [] for way in ways})
    for number in range(rounds):
        for way, call in ways.items():
            started = clock()
            turns.results[way] = call()
            turns.seconds[way].append(clock() - started)
            print(f"round {number + 1}, {way}: {turns.seconds[way][-1]:.2f} s", flush=True)
    return turns


def quickest(
    settings: Iterable[S],
    run: Callable[[S], object],
    *,
    beyond: tuple[type[Exception], ...] = (),
    warm: bool = True,
) -> S:
    """The setting whose run takes least time, after one that warms it up if `warm`.

    A setting that raises one of `beyond`, such as out of memory, is none; all of them is an error.
    """
    seconds: dict[int, float] = {}
    tried = list(settings)
    for number, setting in enumerate(tried):
        try:
            if warm:
                run(setting)
            started = time.perf_counter()
            run(setting)
        except beyond as error:
            print(f"peer, {setting}: {type(error).__name__}", flush=True)
            continue
        seconds[number] = time.perf_counter() - started
        print(f"peer, {setting}: {seconds[number]:.2f} s", flush=True)
    return tried[min(seconds, key=seconds.__getitem__)]


def least_cosine(one: npt.NDArray[np.floating], other: npt.NDArray[np.floating]) -> float:
    """The smallest cosine between rows of the same number."""
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float((np.sum(one * other, axis=1, dtype=np.float64) / norms).min())
