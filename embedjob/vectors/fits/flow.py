"""BERT-flow: an invertible map that makes vectors normally distributed, fitted by their likelihood.

Glow (Kingma and Dhariwal, arXiv:1807.03039) as Li et al. use it on sentence vectors
(arXiv:2011.05864): at each of several levels some steps of actnorm, reversal of the dimensions, and
additive coupling; half of the dimensions leave after each level but the last. The loss is the
negative log-likelihood under a standard normal distribution, in bits per dimension.

Tensors are named `<level>.<step>.<part>`. Training is in torch, application in numpy.

Shapes: R rows, D width of all, C width of a level, H half of it, W width of the coupling's layers.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from embedjob.config.fits.fit_kinds import halving_problem
from embedjob.errors import FitError, amount
from embedjob.vectors.encoded import Vectors
from embedjob.vectors.fits.fitted import Block, Fitted, Wide, require_finite

if TYPE_CHECKING:
    from torch import Tensor

# The scale of actnorm and of the last layer is exp(3 s): it moves three times as fast.
LOGSCALE_FACTOR = 3.0
# A tenth of the rows is left out of training, and says when to stop.
_HELD_OUT = np.uint64(10)
_EPSILON = 1e-6
# What was held out is looked at so many rows at a time.
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class FlowTraining:
    """Trains a flow on the vectors of a sample, which it keeps on disk."""

    levels: int
    depth: int
    hidden: int
    epochs: int
    batch_size: int
    learning_rate: float
    seed: int

    def train(self, blocks: Iterable[Block], device: Literal["cpu", "cuda"] = "cpu") -> Fitted:
        """Return the flow with the least loss on the rows that were held out.

        The order of rows is that of their keys: blocks may be cut anywhere. A few batches are in
        memory, and the keys.

        Raises:
            FitError: a vector is not finite, there are too few, or their width cannot be halved.
            OSError: the disk of this process's temporary files is full.
        """
        keys, kept = [], None
        for block in blocks:
            if kept is None:
                if problem := halving_problem(block.vectors_RD.shape[1], self.levels):
                    raise FitError(problem)
                kept = _OnDisk(block.vectors_RD.shape[1])
            require_finite(block.vectors_RD)
            keys.append(block.keys_R)
            kept.add(block.vectors_RD)
        keys_R = np.concatenate([np.empty(0, np.uint64), *keys])
        order_R = np.argsort(keys_R, kind="stable")
        held_R = keys_R[order_R] % _HELD_OUT == 0
        if kept is None or held_R.sum() < 2 or (~held_R).sum() < 2:
            raise FitError(
                f"got {amount(len(keys_R), 'vector')}, and a flow needs some tens; set a larger"
                " sample"
            )
        return _trained(self, kept, order_R[~held_R], order_R[held_R], device)


class _OnDisk:
    """Vectors in a temporary file without a name, which goes with its process."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this

    def add(self, vectors_RD: Vectors) -> None:
        """Append vectors of the width."""
        self._file.write(np.ascontiguousarray(vectors_RD, np.float32).data)
        self._file.flush()

    def rows(self, places_R: npt.NDArray[np.integer]) -> Vectors:
        """Return the vectors at these places [R, D]."""
        found_RD: Vectors = np.empty((len(places_R), self.width), np.float32)
        size, number = found_RD.itemsize * self.width, self._file.fileno()
        for row, place in zip(found_RD, places_R.tolist(), strict=True):
            # Read, and not mapped: pages of a map count as this process's memory.
            if os.preadv(number, [row.data], place * size) != size:
                raise OSError("a temporary file of vectors is shorter than it was written")
        return found_RD


def flowed(fitted: Fitted, vectors_RD: Vectors) -> Vectors:
    """Return vectors in the flow's normal space [R, D]."""
    return forward(fitted.tensors, vectors_RD.astype(np.float64))[0].astype(np.float32)


def forward(
    tensors: Mapping[str, npt.NDArray[np.floating]], vectors_RD: Wide
) -> tuple[Wide, float]:
    """Return vectors in the normal space [R, D], and the log-determinant, the same for all rows."""
    left, now, log_determinant = [], vectors_RD, 0.0
    for last, steps in _levels(tensors):
        for part in steps:
            logs_C = LOGSCALE_FACTOR * part["logscale"]
            now = (np.exp(logs_C) * (now + part["shift"]))[:, ::-1]
            log_determinant += float(logs_C.sum())
            half = now.shape[1] // 2
            first_RH, second_RH = now[:, :half], now[:, half:]
            now = np.concatenate([first_RH, second_RH + _coupling(part, first_RH)], axis=1)
        if not last:
            half = now.shape[1] // 2
            left.append(now[:, half:])
            now = now[:, :half]
    return np.concatenate([*left, now], axis=1), log_determinant


def flow_problem(fitted: Fitted) -> str | None:
    """Return why tensors are not those of a flow; None where they are."""
    try:
        normal_RD, log_determinant = forward(fitted.tensors, np.zeros((1, fitted.width)))
    except (KeyError, ValueError, IndexError, TypeError) as error:
        return f"its tensors make no flow ({type(error).__name__}: {error})"
    numbers = [*normal_RD[0], log_determinant]
    if len(numbers) != fitted.width + 1 or not np.isfinite(numbers).all():
        return "its tensors make no finite vectors of that width"
    return None


def inverse(tensors: Mapping[str, npt.NDArray[np.floating]], normal_RD: Wide) -> Wide:
    """Return the vectors [R, D] that `forward` gives a place in the normal space for."""
    levels = [*_levels(tensors)]
    at, left = 0, []
    half = normal_RD.shape[1]
    for _ in levels[:-1]:
        half //= 2
        left.append(normal_RD[:, at : at + half])
        at += half
    now = normal_RD[:, at:]
    for number, (last, steps) in reversed([*enumerate(levels)]):
        if not last:
            now = np.concatenate([now, left[number]], axis=1)
        for part in reversed(steps):
            half = now.shape[1] // 2
            first_RH, second_RH = now[:, :half], now[:, half:]
            now = np.concatenate([first_RH, second_RH - _coupling(part, first_RH)], axis=1)
            now = now[:, ::-1] / np.exp(LOGSCALE_FACTOR * part["logscale"]) - part["shift"]
    return now


def bits_per_dimension(normal_RD: Wide, log_determinant: float) -> float:
    """Return the negative log-likelihood of vectors, in bits per dimension."""
    wide = normal_RD.shape[1]
    log_p_R = -0.5 * ((normal_RD**2).sum(axis=1) + wide * np.log(2 * np.pi))
    return float(-(log_p_R.mean() + log_determinant) / (np.log(2) * wide))


def _levels(
    tensors: Mapping[str, npt.NDArray[np.floating]],
) -> Iterator[tuple[bool, list[dict[str, Any]]]]:
    """Yield for each level whether it is the last, and the parts of each of its steps."""
    parts: dict[tuple[int, int], dict[str, Any]] = {}
    for name, tensor in tensors.items():
        in_level, step, part = name.split(".")
        parts.setdefault((int(in_level), int(step)), {})[part] = tensor
    levels = 1 + max(level for level, _ in parts)
    for level in range(levels):
        yield level == levels - 1, [parts[key] for key in sorted(parts) if key[0] == level]


def _coupling(part: Mapping[str, Any], first_RH: Wide) -> Wide:
    hidden_RW = first_RH
    for layer in ("first", "second"):
        hidden_RW = hidden_RW @ part[layer].T + part[f"{layer}_shift"]
        hidden_RW = np.exp(LOGSCALE_FACTOR * part[f"{layer}_logscale"]) * hidden_RW
        hidden_RW = np.maximum(hidden_RW, 0)
    shift_RH = hidden_RW @ part["last"].T + part["last_bias"]
    scaled_RH: Wide = shift_RH * np.exp(LOGSCALE_FACTOR * part["last_logscale"])
    return scaled_RH


def _trained(
    how: FlowTraining,
    kept: _OnDisk,
    train_R: npt.NDArray[np.integer],
    held_R: npt.NDArray[np.integer],
    device: str,
) -> Fitted:
    """Train until an epoch gives no smaller loss on the rows that were held out."""
    import torch

    numbers = torch.Generator().manual_seed(how.seed)
    parameters = {
        name: one.to(device).detach().requires_grad_()
        for name, one in _begun(how, kept.width, numbers).items()
    }

    def rows(places_R: npt.NDArray[np.integer]) -> "Tensor":
        return torch.from_numpy(kept.rows(places_R)).to(device)

    # The scales of actnorm are those of the data at the beginning, as Glow has it.
    with torch.no_grad():
        _pass(parameters, rows(train_R[: max(how.batch_size, 1024)]), how, begin=True)
    optimizer = torch.optim.Adam([*parameters.values()], lr=how.learning_rate, eps=_EPSILON)
    losses: list[float] = []
    best: dict[str, Any] = {}
    for _ in range(how.epochs):
        order_R = torch.randperm(len(train_R), generator=numbers).numpy()
        for start in range(0, len(order_R), how.batch_size):
            batch_R = train_R[order_R[start : start + how.batch_size]]
            optimizer.zero_grad()
            loss = _loss(*_pass(parameters, rows(batch_R), how))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        tensors = {
            name: one.detach().cpu().numpy().astype(np.float64) for name, one in parameters.items()
        }
        loss_now = _bits_of(tensors, kept, held_R)
        if not np.isfinite(loss_now) or (losses and loss_now >= min(losses)):
            break
        losses.append(loss_now)
        best = tensors
    if not losses:
        raise FitError("the flow's loss is not finite; set a smaller learning_rate")
    facts = {"epochs": len(losses), "bits_per_dimension": round(losses[-1], 6)}
    return Fitted("flow", len(train_R) + len(held_R), kept.width, best, facts)


def _bits_of(
    tensors: Mapping[str, npt.NDArray[np.floating]],
    kept: _OnDisk,
    places_R: npt.NDArray[np.integer],
) -> float:
    """Return the bits per dimension of vectors on disk, some at a time."""
    total = 0.0
    for start in range(0, len(places_R), _ROWS_AT_ONCE):
        some_R = places_R[start : start + _ROWS_AT_ONCE]
        mapped = forward(tensors, kept.rows(some_R).astype(np.float64))
        total += bits_per_dimension(*mapped) * len(some_R)
    return total / len(places_R)


def _begun(how: FlowTraining, width: int, numbers: Any) -> "dict[str, Tensor]":
    """Return the parameters before training: random layers, and a last layer of nothing."""
    import torch

    shapes: dict[str, tuple[int, ...]] = {}
    for level in range(how.levels):
        wide = width // 2**level
        half, inner = wide // 2, how.hidden
        for step in range(how.depth):
            parts = {
                **{"shift": (wide,), "logscale": (wide,)},
                **{"first": (inner, half), "first_shift": (inner,), "first_logscale": (inner,)},
                **{"second": (inner, inner), "second_shift": (inner,), "second_logscale": (inner,)},
                **{"last": (half, inner), "last_bias": (half,), "last_logscale": (half,)},
            }
            shapes |= {f"{level}.{step}.{name}": shape for name, shape in parts.items()}
    return {
        name: (
            torch.randn(shape, generator=numbers) * 0.05
            if name.endswith((".first", ".second"))
            else torch.zeros(shape)
        ).requires_grad_()
        for name, shape in shapes.items()
    }


def _pass(
    parameters: "dict[str, Tensor]", vectors_RD: "Tensor", how: FlowTraining, *, begin: bool = False
) -> "tuple[Tensor, Tensor]":
    """Return vectors in the normal space, and the log-determinant; as `forward`.

    With `begin`, each actnorm first takes the mean and the deviation of what comes to it.
    """
    import torch

    left, now, log_determinant = [], vectors_RD, vectors_RD.new_zeros(())

    def norm(name: str, rows_RC: "Tensor", shift: str, logscale: str) -> "Tensor":
        moved, logs = parameters[name + shift], parameters[name + logscale]
        if begin:
            moved.copy_(-rows_RC.mean(dim=0))
            deviation_C = rows_RC.std(dim=0, unbiased=False)
            logs.copy_(-torch.log(deviation_C + _EPSILON) / LOGSCALE_FACTOR)
        return torch.exp(LOGSCALE_FACTOR * logs) * (rows_RC + moved)

    for level in range(how.levels):
        for step in range(how.depth):
            name = f"{level}.{step}."
            now = norm(name, now, "shift", "logscale").flip(-1)
            log_determinant = (
                log_determinant + LOGSCALE_FACTOR * parameters[name + "logscale"].sum()
            )
            first_RH, second_RH = now.chunk(2, dim=1)
            hidden_RW = first_RH
            for layer in ("first", "second"):
                hidden_RW = hidden_RW @ parameters[name + layer].T
                hidden_RW = norm(name, hidden_RW, f"{layer}_shift", f"{layer}_logscale").relu()
            shift_RH = hidden_RW @ parameters[name + "last"].T + parameters[name + "last_bias"]
            shift_RH = shift_RH * torch.exp(LOGSCALE_FACTOR * parameters[name + "last_logscale"])
            now = torch.cat([first_RH, second_RH + shift_RH], dim=1)
        if level < how.levels - 1:
            now, out = now.chunk(2, dim=1)
            left.append(out)
    return torch.cat([*left, now], dim=1), log_determinant


def _loss(normal_RD: "Tensor", log_determinant: "Tensor") -> "Tensor":
    wide = normal_RD.shape[1]
    log_p_R = -0.5 * ((normal_RD**2).sum(dim=1) + wide * float(np.log(2 * np.pi)))
    return -(log_p_R.mean() + log_determinant) / (float(np.log(2)) * wide)
