"""Micro-batch scheduling with error recovery: a view that breaks the model alone has no vector.

Legend: V views, D width.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from embedjob.encoder.batching.transfers import PendingCopy, copy_to_host
from embedjob.errors import DeviceLostError, EmbedjobError, InterruptedRunError, in_one_line
from embedjob.text.arrays import Ints
from embedjob.text.microbatches import microbatches
from embedjob.vectors.encoded import Vectors

_DETAIL_CHARACTERS = 300
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
# Micro-batches that a device computes ahead while the vectors of the first are copied back.
_MOST_PENDING = 2
_Result = TypeVar("_Result")


class Forward(Protocol):
    """Computes the vectors of views, which go by their numbers from 0 on."""

    @property
    def width(self) -> int:
        """Return the length of one vector."""
        ...

    @property
    def lengths(self) -> Ints:
        """Return the tokens that each view runs."""
        ...

    @property
    def groups(self) -> Ints:
        """Return a number per view; only views with equal numbers share a micro-batch."""
        ...

    @property
    def pairs(self) -> Ints:
        """Return the query-key pairs that each view attends over."""
        ...

    def padded(self, which: Ints) -> int:
        """Return the tokens that these views run together, with padding."""
        ...

    @property
    def bearable_padding(self) -> int | None:
        """Return the padding tokens cheaper than a further micro-batch; None if not padded."""
        ...

    def __call__(self, which: Ints) -> Tensor:
        """Return the vectors [V, D] of these views, which go through the model together."""
        ...

    def in_float32(self, view: int) -> Tensor:
        """Return the vector [1, D] of one view, computed in float32."""
        ...


@dataclass(frozen=True)
class ForwardFailure:
    """The error of a forward, as text."""

    detail: str
    out_of_memory: bool


@dataclass(frozen=True)
class Callbacks:
    """Called between micro-batches: whether to stop, and which views are done."""

    stop: Callable[[], bool]
    on_views: Callable[[Ints], None]


@dataclass
class ForwardResult:
    """Vectors, reasons of failure and counts so far; `budget` shrinks after out of memory."""

    vectors_VD: Vectors
    budget: int
    failed: dict[int, tuple[str, str]] = field(default_factory=dict)
    tokens: int = 0
    padded_tokens: int = 0
    pairs: int = 0
    microbatches: int = 0
    copy_seconds: float = 0.0


def run_microbatches(forward: Forward, *, budget: int, callbacks: Callbacks) -> ForwardResult:
    """Return the vectors of all views, and for each view without a vector the reason.

    A micro-batch that raises is halved until the failing view is alone, which is then tried once
    more in float32. Out of memory halves the budget of all remaining micro-batches. While a GPU
    computes, the next micro-batches are made and the vectors of earlier ones are copied back.

    Raises:
        InterruptedRunError: `callbacks.stop` returned true.
        DeviceLostError: the device failed, and its process must end.
    """
    lengths = forward.lengths
    result = ForwardResult(np.full((len(lengths), forward.width), np.nan, np.float32), budget)
    in_flight = _InFlight(forward, result, callbacks)
    in_flight.remaining.extend(_batches(forward, np.arange(len(lengths)), budget=budget))
    while in_flight.remaining or in_flight.pending:
        if callbacks.stop():
            raise InterruptedRunError("stopped between two micro-batches")
        if in_flight.remaining:
            in_flight.submit()
        while len(in_flight.pending) > (_MOST_PENDING if in_flight.remaining else 0):
            in_flight.collect()
    return result


@dataclass
class _InFlight:
    """The remaining micro-batches, and those submitted to a device, in order."""

    forward: Forward
    result: ForwardResult
    callbacks: Callbacks
    remaining: deque[Ints] = field(default_factory=deque)
    pending: deque[tuple[Ints, PendingCopy]] = field(default_factory=deque)

    def submit(self) -> None:
        """Run the next micro-batch; on a CPU, also collect its vectors."""
        which = self.remaining.popleft()
        outcome = _attempt(lambda: copy_to_host(self.forward(which)))
        if isinstance(outcome, ForwardFailure):
            # Pending micro-batches hold memory, and may have to be halved as well.
            while self.pending:
                self.collect()
            self._halve(which, outcome)
        else:
            self.pending.append((which, outcome))
            if outcome.arrival is None:
                self.collect()

    def collect(self) -> None:
        """Store the vectors of the micro-batch that was submitted first."""
        which, copy = self.pending.popleft()
        seconds = _attempt(copy.wait)
        if isinstance(seconds, ForwardFailure):
            self._halve(which, seconds)
        else:
            self.result.copy_seconds += seconds
            self._store(which, copy.host.numpy())

    def _halve(self, which: Ints, failure: ForwardFailure) -> None:
        """Replace a failed micro-batch by smaller ones, or retry a single view in float32."""
        if len(which) > 1:
            remaining = [which, *self.remaining]
            self.remaining = _split_remaining(
                failure, remaining, forward=self.forward, result=self.result
            )
        else:
            self._store(which, _retry_in_float32(self.forward, int(which[0]), self.result, failure))

    def _store(self, which: Ints, vectors_VD: Vectors) -> None:
        result = self.result
        result.vectors_VD[which] = vectors_VD
        for row in np.flatnonzero(~np.isfinite(vectors_VD).all(axis=1)):
            view = int(which[row])
            if view not in result.failed:
                result.vectors_VD[view] = _retry_in_float32(self.forward, view, result, None)[0]
        result.microbatches += 1
        result.tokens += int(self.forward.lengths[which].sum())
        result.padded_tokens += self.forward.padded(which)
        result.pairs += int(self.forward.pairs[which].sum())
        self.callbacks.on_views(which)


def _attempt(compute: Callable[[], _Result]) -> _Result | ForwardFailure:
    try:
        with raising_device_lost():
            return compute()
    except EmbedjobError:
        raise
    except Exception as error:
        # Any error of one view must not stop the others. Only the error's text is kept: a
        # traceback would keep the activations alive on the device.
        return ForwardFailure(in_one_line(error, most=_DETAIL_CHARACTERS), is_out_of_memory(error))


def _split_remaining(
    failure: ForwardFailure, remaining: list[Ints], *, forward: Forward, result: ForwardResult
) -> deque[Ints]:
    """Return what remains in smaller micro-batches: all after out of memory, else the first."""
    first = remaining[0]
    if not failure.out_of_memory:
        middle = len(first) // 2
        return deque([first[:middle], first[middle:], *remaining[1:]])
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    padded = int(forward.lengths[first].max()) * len(first)
    result.budget = max(1, min(result.budget, padded) // 2)
    return deque(_batches(forward, np.concatenate(remaining), budget=result.budget))


def _batches(forward: Forward, views: Ints, *, budget: int) -> list[Ints]:
    """Return the micro-batches of these views."""
    batches = microbatches(
        forward.lengths[views],
        budget=budget,
        bearable_padding=forward.bearable_padding,
        groups=forward.groups[views],
    )
    return [views[batch] for batch in batches]


def _retry_in_float32(
    forward: Forward, view: int, result: ForwardResult, failure: ForwardFailure | None
) -> Vectors:
    """Return the vector [1, D] of one view in float32; if that fails, NaN, and record why."""
    out_of_memory = failure is not None and failure.out_of_memory
    retried = failure if out_of_memory else _attempt(lambda: forward.in_float32(view).cpu().numpy())
    if isinstance(retried, ForwardFailure):
        result.failed[view] = ("model_error", retried.detail)
    elif retried is not None and np.isfinite(retried).all():
        return retried
    else:
        result.failed[view] = ("non_finite", "the vector is not finite, even in float32")
    return np.full((1, forward.width), np.nan, np.float32)


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error means too little memory; libraries word it in several ways."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error).lower() for words in _OUT_OF_MEMORY
    )


@contextmanager
def raising_device_lost() -> Iterator[None]:
    """Raise DeviceLostError, as a context or a decorator, if the CUDA context was lost.

    Other exceptions pass through. Every RuntimeError is examined, because the libraries under
    torch word a lost device in their own ways.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_lost():
            raise
        raise DeviceLostError(f"the device failed, its process must end: {error}") from error


def _is_lost() -> bool:
    try:
        for gpu in range(torch.cuda.device_count()):
            torch.cuda.synchronize(gpu)
    except torch.AcceleratorError:
        return True
    return False
