"""Processes that load something once and are then given work, each with its own threads."""

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

_loaded: dict[str, Callable[[Any], Any]] = {}


class Workers:
    """`count` processes of `threads` threads, each with what `make` gave it."""

    def __init__(
        self, make: Callable[[], Callable[[Any], Any]], *, count: int, threads: int
    ) -> None:
        """Starts them; they load while the caller goes on, until it waits for `ready`."""
        self._pool = ProcessPoolExecutor(
            count,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_load,
            initargs=(make, threads),
        )
        self._pids = self._pool.submit(os.getpid)

    def ready(self) -> "Workers":
        """Itself, once a process has loaded."""
        self._pids.result()
        return self

    def __call__(self, item: Any) -> Any:
        """What one process makes of one piece of work."""
        return self._pool.submit(_work, item).result()

    def map(self, items: Iterable[Any]) -> list[Any]:
        """What they make of many pieces, in order; each takes the next when it is free."""
        return list(self._pool.map(_work, items))

    def end(self) -> None:
        """Ends them."""
        self._pool.shutdown()


def _load(make: Callable[[], Callable[[Any], Any]], threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    _loaded["work"] = make()


def _work(item: Any) -> Any:
    return _loaded["work"](item)
