"""BERT-flow: an invertible map that makes vectors normally distributed, fitted by their likelihood.

Glow (Kingma and Dhariwal, arXiv:1807.03039) as Li et al. use it on sentence vectors
(arXiv:2011.05864): at each of several levels some steps of actnorm, reversal of the dimensions, and
additive coupling; half of the dimensions leave after each level but the last. The loss is the
negative log-likelihood under a standard normal distribution, in bits per dimension.

Tensors are named `<level>.<step>.<part>`. Training is in torch, application in numpy.

Shapes: R rows, D width of all, C width of a level, H half of it, W width of the coupling's layers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedjob.config.fits import halving_problem
from embedjob.errors import FitError
from embedjob.vectors.encoded import Vectors
from embedjob.vectors.fitted import Block, Fitted, Wide

if TYPE_CHECKING:
    from torch import Tensor

# The scale of actnorm and of the last layer is exp(3 s): it moves three times as fast.
LOGSCALE_FACTOR = 3.0
# A tenth of the rows is left out of training, and says when to stop.
_HELD_OUT = np.uint64(10)
_EPSILON = 1e-6


@dataclass(frozen=True)
class Collected:
    """Vectors [R, D] with their keys [R]."""

    keys_R: npt.NDArray[np.uint64]
    vectors_RD: Vectors


@dataclass(frozen=True)
class FlowPass:
    """Collects the vectors of a sample, and trains a flow on them."""

    levels: int
    depth: int
    hidden: int
    epochs: int
    batch_size: int
    learning_rate: float
    seed: int

    def partial(self, block: Block) -> Collected:
        """Return the vectors of a block; FitError where one is not finite."""
        if not np.isfinite(block.vectors_RD).all():
            raise FitError("got vectors with NaN or infinite numbers, allowed are finite ones")
        return Collected(block.keys_R, block.vectors_RD)

    def merge(self, left: Collected, right: Collected) -> Collected:
        """Return the vectors of both."""
        return Collected(
            np.concatenate([left.keys_R, right.keys_R]),
            np.concatenate([left.vectors_RD, right.vectors_RD]),
        )

    def finish(self, state: Collected) -> Fitted:
        """Return the flow with the least loss on the rows that were held out."""
        rows, wide = state.vectors_RD.shape
        if problem := halving_problem(wide, self.levels):
            raise FitError(problem)
        order_R = np.argsort(state.keys_R, kind="stable")
        vectors_RD = state.vectors_RD[order_R]
        held_R = state.keys_R[order_R] % _HELD_OUT == 0
        if held_R.sum() < 2 or (~held_R).sum() < 2:
            raise FitError(f"got {rows} vectors, and a flow needs some tens; set a larger sample")
        return _trained(self, vectors_RD[~held_R], vectors_RD[held_R])


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


def _trained(how: FlowPass, train_RD: Vectors, held_RD: Vectors) -> Fitted:
    """Train until an epoch gives no smaller loss on the rows that were held out."""
    import torch

    numbers = torch.Generator().manual_seed(how.seed)
    vectors_RD = torch.from_numpy(np.ascontiguousarray(train_RD))
    parameters = _begun(how, vectors_RD.shape[1], numbers)
    # The scales of actnorm are those of the data at the beginning, as Glow has it.
    with torch.no_grad():
        _pass(parameters, vectors_RD[: max(how.batch_size, 1024)], how, begin=True)
    optimizer = torch.optim.Adam([*parameters.values()], lr=how.learning_rate, eps=_EPSILON)
    losses: list[float] = []
    best: dict[str, Any] = {}
    for _ in range(how.epochs):
        order_R = torch.randperm(len(vectors_RD), generator=numbers)
        for start in range(0, len(order_R), how.batch_size):
            batch = order_R[start : start + how.batch_size]
            optimizer.zero_grad()
            loss = _loss(*_pass(parameters, vectors_RD[batch], how))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        tensors = {
            name: one.detach().numpy().astype(np.float64) for name, one in parameters.items()
        }
        loss_now = bits_per_dimension(*forward(tensors, held_RD.astype(np.float64)))
        if not np.isfinite(loss_now) or (losses and loss_now >= min(losses)):
            break
        losses.append(loss_now)
        best = tensors
    if not losses:
        raise FitError("the flow's loss is not finite; set a smaller learning_rate")
    facts = {"epochs": len(losses), "bits_per_dimension": round(losses[-1], 6)}
    rows, wide = len(train_RD) + len(held_RD), train_RD.shape[1]
    return Fitted("flow", rows, wide, best, facts)


def _begun(how: FlowPass, width: int, numbers: Any) -> "dict[str, Tensor]":
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
    parameters: "dict[str, Tensor]", vectors_RD: "Tensor", how: FlowPass, *, begin: bool = False
) -> "tuple[Tensor, Tensor]":
    """Return vectors in the normal space, and the log-determinant; as `forward`.

    With `begin`, each actnorm first takes the mean and the deviation of what comes to it.
    """
    import torch

    left, now, log_determinant = [], vectors_RD, torch.zeros(())

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
