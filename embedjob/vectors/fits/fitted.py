"""The protocol of fits: passes over blocks of vectors, and what they leave.

A pass makes a small state of each block, merges states, and finishes the last one: to what the fit
leaves, or to a further pass. Blocks may be cut anywhere, and states are merged in any grouping, as
long as their order stays: the same vectors then leave the same, up to rounding.

Shapes: R rows, D width.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from embedjob.errors import FitError
from embedjob.vectors.encoded import Vectors

Wide = npt.NDArray[np.float64]
State = Any


class Block(NamedTuple):
    """Some vectors of a corpus [R, D], and for each a key that a sample may go by [R].

    `others_RK` are the vectors of the same rows in another output, where the fit reads two.
    """

    vectors_RD: Vectors
    keys_R: npt.NDArray[np.uint64]
    others_RK: Vectors | None = None


@dataclass(frozen=True)
class Fitted:
    """What a fit left: tensors by name, and facts about them for people.

    `rows` counts the vectors that it was computed from, `width` is theirs.
    """

    kind: str
    rows: int
    width: int
    tensors: Mapping[str, npt.NDArray[np.floating]]
    facts: Mapping[str, Any] = field(default_factory=dict)


class Pass(Protocol):
    """One pass over the vectors of a fit; it travels to workers, and so does each state."""

    def partial(self, block: Block) -> State:
        """Return the state of one block."""
        ...

    def merge(self, left: State, right: State) -> State:
        """Return the state of the blocks of both."""
        ...

    def finish(self, state: State) -> "Pass | Fitted":
        """Return what the fit leaves, or its next pass; FitError where it cannot be computed."""
        ...


@runtime_checkable
class Training(Protocol):
    """A fit that goes over its vectors in an order of its own, many times; it travels to a worker.

    Blocks come once, in any cut, and it keeps them on the worker's disk.
    """

    def train(self, blocks: Iterable[Block], device: Literal["cpu", "cuda"] = "cpu") -> Fitted:
        """Return what the fit leaves; FitError where it cannot be computed."""
        ...


def require_finite(*arrays: npt.NDArray[Any]) -> None:
    """Raise FitError where a number of vectors, or of what is made of them, is not finite."""
    if not all(np.isfinite(one).all() for one in arrays):
        raise FitError("got vectors with NaN or infinite numbers, allowed are finite ones")
