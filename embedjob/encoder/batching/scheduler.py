"""Micro-batches that survive their worst view: one that breaks the model is found and left out.

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


@contextmanager
def raising_device_lost() -> Iterator[None]:
    """Within it, and in a function that it decorates, a lost device raises DeviceLostError.

    Whatever else raises does as it did. Not only torch's own error is looked into: the libraries
    under it have words of their own for the same.
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


_DETAIL_CHARACTERS = 300
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
# Micro-batches that a device has been given and whose vectors are not here yet.
_MOST_PENDING = 2
_Done = TypeVar("_Done")


class Forward(Protocol):
    """How views become vectors."""

    @property
    def width(self) -> int:
        """The length of one vector."""
        ...

    @property
    def lengths(self) -> Ints:
        """Tokens that each view runs."""
        ...

    @property
    def groups(self) -> Ints:
        """Per view a number: only views of one number go through the model together."""
        ...

    @property
    def pairs(self) -> Ints:
        """How often one token of each view looks at another one."""
        ...

    def padded(self, which: Ints) -> int:
        """Tokens that these views run together, padding among them."""
        ...

    @property
    def bearable_padding(self) -> int | None:
        """Tokens of padding that cost less than one more micro-batch; None where none is."""
        ...

    def __call__(self, which: Ints) -> Tensor:
        """The vectors [V, D] of these views, which go through the model together."""
        ...

    def in_float32(self, view: int) -> Tensor:
        """The vector [1, D] of one view, computed in float32."""
        ...


@dataclass(frozen=True)
class ForwardFailure:
    """What a model raised, in words."""

    detail: str
    out_of_memory: bool


@dataclass(frozen=True)
class Callbacks:
    """What the caller wants asked and told between micro-batches."""

    stop: Callable[[], bool]
    on_views: Callable[[Ints], None]


@dataclass
class ForwardResult:
    """What has come of the views so far; `budget` is what the memory was found to bear."""

    vectors_VD: Vectors
    budget: int
    failed: dict[int, tuple[str, str]] = field(default_factory=dict)
    tokens: int = 0
    padded_tokens: int = 0
    pairs: int = 0
    microbatches: int = 0
    copy_seconds: float = 0.0


def run_microbatches(forward: Forward, *, budget: int, callbacks: Callbacks) -> ForwardResult:
    """The vectors of all views, and why some have none; InterruptedRunError when told to stop.

    A micro-batch that raises is halved until the culprit is alone; alone it is tried once more in
    float32. Out of memory halves the budget of all that is left. While a GPU computes, the next
    micro-batches are made, and what it is done with is copied back.
    """
    lengths = forward.lengths
    passage = ForwardResult(np.full((len(lengths), forward.width), np.nan, np.float32), budget)
    flow = _InFlight(forward, passage, callbacks)
    flow.left.extend(_batches(forward, np.arange(len(lengths)), budget=budget))
    while flow.left or flow.pending:
        if callbacks.stop():
            raise InterruptedRunError("stopped between two micro-batches")
        if flow.left:
            flow.submit()
        while len(flow.pending) > (_MOST_PENDING if flow.left else 0):
            flow.collect()
    return passage


@dataclass
class _InFlight:
    """The micro-batches that are left, and those that a device has been given, in order."""

    forward: Forward
    passage: ForwardResult
    callbacks: Callbacks
    left: deque[Ints] = field(default_factory=deque)
    pending: deque[tuple[Ints, PendingCopy]] = field(default_factory=deque)

    def submit(self) -> None:
        """Gives the model the next micro-batch; on a CPU, takes its vectors as well."""
        which = self.left.popleft()
        outcome = _attempt(lambda: copy_to_host(self.forward(which)))
        if isinstance(outcome, ForwardFailure):
            # What is aloft holds memory, and its views may have to be halved as well.
            while self.pending:
                self.collect()
            self._halve(which, outcome)
        else:
            self.pending.append((which, outcome))
            if outcome.arrival is None:
                self.collect()

    def collect(self) -> None:
        """Takes the vectors of the micro-batch that was given first."""
        which, landing = self.pending.popleft()
        waited = _attempt(landing.wait)
        if isinstance(waited, ForwardFailure):
            self._halve(which, waited)
        else:
            self.passage.copy_seconds += waited
            self._take(which, landing.host.numpy())

    def _halve(self, which: Ints, trouble: ForwardFailure) -> None:
        """Puts smaller micro-batches in the place of one that failed, or rescues a single view."""
        if len(which) > 1:
            left = [which, *self.left]
            self.left = _smaller(trouble, left, forward=self.forward, passage=self.passage)
        else:
            self._take(which, _rescued(self.forward, int(which[0]), self.passage, trouble))

    def _take(self, which: Ints, vectors_VD: Vectors) -> None:
        passage = self.passage
        passage.vectors_VD[which] = vectors_VD
        for row in np.flatnonzero(~np.isfinite(vectors_VD).all(axis=1)):
            view = int(which[row])
            if view not in passage.failed:
                passage.vectors_VD[view] = _rescued(self.forward, view, passage, None)[0]
        passage.microbatches += 1
        passage.tokens += int(self.forward.lengths[which].sum())
        passage.padded_tokens += self.forward.padded(which)
        passage.pairs += int(self.forward.pairs[which].sum())
        self.callbacks.on_views(which)


def _attempt(what: Callable[[], _Done]) -> _Done | ForwardFailure:
    try:
        with raising_device_lost():
            return what()
    except EmbedjobError:
        raise
    except Exception as error:
        # Whatever a model raises over one row, the others are to be embedded. Only its text is
        # kept: a traceback would keep the activations alive on the device.
        return ForwardFailure(in_one_line(error, most=_DETAIL_CHARACTERS), is_out_of_memory(error))


def _smaller(
    trouble: ForwardFailure, left: list[Ints], *, forward: Forward, passage: ForwardResult
) -> deque[Ints]:
    """What is left, in smaller micro-batches: all of it after out of memory, else the first."""
    first = left[0]
    if not trouble.out_of_memory:
        middle = len(first) // 2
        return deque([first[:middle], first[middle:], *left[1:]])
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    padded = int(forward.lengths[first].max()) * len(first)
    passage.budget = max(1, min(passage.budget, padded) // 2)
    return deque(_batches(forward, np.concatenate(left), budget=passage.budget))


def _batches(forward: Forward, views: Ints, *, budget: int) -> list[Ints]:
    """Which of the views go through the model together."""
    batches = microbatches(
        forward.lengths[views],
        budget=budget,
        bearable_padding=forward.bearable_padding,
        groups=forward.groups[views],
    )
    return [views[batch] for batch in batches]


def _rescued(
    forward: Forward, view: int, passage: ForwardResult, trouble: ForwardFailure | None
) -> Vectors:
    """The vector [1, D] of one view in float32; NaN, and a reason kept, where that fails too."""
    starved = trouble is not None and trouble.out_of_memory
    again = trouble if starved else _attempt(lambda: forward.in_float32(view).cpu().numpy())
    if isinstance(again, ForwardFailure):
        passage.failed[view] = ("model_error", again.detail)
    elif again is not None and np.isfinite(again).all():
        return again
    else:
        passage.failed[view] = ("non_finite", "the vector is not finite, in float32 neither")
    return np.full((1, forward.width), np.nan, np.float32)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error, by one of its many names, is one of too little memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error).lower() for words in _OUT_OF_MEMORY
    )
