"""Micro-batches that survive their worst view: one that breaks the model is found and left out.

Legend: V views, D width.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from embedjob.errors import ChunkError, EmbedjobError, InterruptedRunError
from embedjob.text.microbatches import microbatches

Indices = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]
_DETAIL_CHARACTERS = 300
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


class Forward(Protocol):
    """How views become vectors."""

    @property
    def width(self) -> int:
        """The length of one vector."""
        ...

    @property
    def lengths(self) -> Indices:
        """Tokens that each view runs."""
        ...

    @property
    def groups(self) -> Indices:
        """Per view a number: only views of one number go through the model together."""
        ...

    def __call__(self, which: Indices) -> Vectors:
        """The vectors [V, D] of these views, which go through the model together."""
        ...

    def precisely(self, view: int) -> Vectors:
        """The vector [1, D] of one view, computed in float32."""
        ...


@dataclass(frozen=True)
class Trouble:
    """What a model raised, in words."""

    detail: str
    out_of_memory: bool


@dataclass(frozen=True)
class Watch:
    """What the caller wants asked and told between micro-batches."""

    stop: Callable[[], bool]
    on_views: Callable[[Indices], None]


@dataclass
class Passage:
    """What has come of the views so far; `budget` is what the memory was found to bear."""

    vectors_VD: Vectors
    budget: int
    failed: dict[int, tuple[str, str]] = field(default_factory=dict)
    tokens: int = 0
    padded_tokens: int = 0
    microbatches: int = 0


def pass_through(forward: Forward, *, budget: int, watch: Watch) -> Passage:
    """The vectors of all views, and why some have none; InterruptedRunError when told to stop.

    A micro-batch that raises is halved until the culprit is alone; alone it is tried once more in
    float32. Out of memory halves the budget of all that is left.
    """
    lengths = forward.lengths
    passage = Passage(np.full((len(lengths), forward.width), np.nan, np.float32), budget)
    queue = deque(microbatches(lengths, budget=budget, groups=forward.groups))
    while queue:
        if watch.stop():
            raise InterruptedRunError("stopped between two micro-batches")
        which = queue.popleft()
        outcome = _attempt(forward, which)
        if isinstance(outcome, Trouble) and len(which) > 1:
            queue = _smaller(outcome, [which, *queue], forward=forward, passage=passage)
            continue
        if isinstance(outcome, Trouble):
            outcome = _rescued(forward, int(which[0]), passage, outcome)
        for row in np.flatnonzero(~np.isfinite(outcome).all(axis=1)):
            if int(which[row]) not in passage.failed:
                outcome[row] = _rescued(forward, int(which[row]), passage, None)
        passage.vectors_VD[which] = outcome
        passage.microbatches += 1
        passage.tokens += int(lengths[which].sum())
        passage.padded_tokens += int(lengths[which].max()) * len(which)
        watch.on_views(which)
    return passage


def _attempt(forward: Callable[[Indices], Vectors], which: Indices) -> Vectors | Trouble:
    try:
        return forward(which)
    except EmbedjobError:
        raise
    except Exception as error:
        # Whatever a model raises over one row, the others are to be embedded. Only its text is
        # kept: a traceback would keep the activations alive on the device.
        starved = _is_out_of_memory(error)
        if isinstance(error, torch.AcceleratorError) and not starved:
            raise ChunkError(f"the device failed and its process must end: {error}") from error
        text = " ".join(str(error).split())[:_DETAIL_CHARACTERS]
        return Trouble(f"{type(error).__name__}: {text}", starved)


def _smaller(
    trouble: Trouble, left: list[Indices], *, forward: Forward, passage: Passage
) -> deque[Indices]:
    """What is left, in smaller micro-batches: all of it after out of memory, else the first."""
    first = left[0]
    if not trouble.out_of_memory:
        middle = len(first) // 2
        return deque([first[:middle], first[middle:], *left[1:]])
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    padded = int(forward.lengths[first].max()) * len(first)
    passage.budget = max(1, min(passage.budget, padded) // 2)
    views = np.concatenate(left)
    lengths, groups = forward.lengths[views], forward.groups[views]
    smaller = microbatches(lengths, budget=passage.budget, groups=groups)
    return deque(views[batch] for batch in smaller)


def _rescued(forward: Forward, view: int, passage: Passage, trouble: Trouble | None) -> Vectors:
    """The vector [1, D] of one view in float32; NaN, and a reason kept, where that fails too."""
    starved = trouble is not None and trouble.out_of_memory
    again = trouble if starved else _attempt(lambda _: forward.precisely(view), np.array([view]))
    if isinstance(again, Trouble):
        passage.failed[view] = ("model_error", again.detail)
    elif again is not None and np.isfinite(again).all():
        return again
    else:
        passage.failed[view] = ("non_finite", "the vector is not finite, in float32 neither")
    return np.full((1, forward.width), np.nan, np.float32)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error).lower() for words in _OUT_OF_MEMORY
    )
