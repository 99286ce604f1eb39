"""Layers of a model on a CPU in fewer passes over memory: what they compute stays what it is.

Beside the matrix products, a CPU's time goes into reading and writing states for a bias, an
activation, a norm or a residual by itself. Each layer here does these in the pass before, and is
taken only where it gives, on a small example, what the model's own layer gives.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, SiLUActivation

_TOLERANCE = 1e-5
_ROWS = 3
# Rows that weights are laid out for; with others they are read as well, only not as quickly.
_USUAL_ROWS = 1024
_LayerT = TypeVar("_LayerT", bound=nn.Module)


class Packed(nn.Module):
    """A linear layer with its bias, and perhaps an activation, in the epilogue of the product."""

    def __init__(self, linear: nn.Linear, *, activation: str = "none") -> None:
        """Lays the weight out as oneDNN reads it; the linear layer's own may then go."""
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _USUAL_ROWS)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias
        self.activation = activation

    def forward(self, states: Tensor) -> Tensor:
        """The layer's output [..., D]."""
        product = torch.ops.mkldnn._linear_pointwise
        out: Tensor = product(states, self.weight, self.bias, self.activation, [], "none")
        return out


class Residual(nn.Module):
    """A linear layer, the residual added in its epilogue, and a norm: BERT's output layers."""

    def __init__(self, layer: nn.Module) -> None:
        """Takes the layer's own norm."""
        super().__init__()
        self.dense = Packed(_child(layer, "dense", nn.Linear))
        self.norm = _child(layer, "LayerNorm", nn.LayerNorm)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """The layer's output [..., D]."""
        product = torch.ops.mkldnn._linear_pointwise.binary
        dense = self.dense
        added = product(hidden_states, input_tensor, dense.weight, dense.bias, "add")
        out: Tensor = self.norm(added)
        return out


class Gated(nn.Module):
    """A SwiGLU layer whose activation and product are made in place."""

    def __init__(self, layer: nn.Module) -> None:
        """Takes the layer's own projections."""
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            _child(layer, f"{name}_proj", nn.Linear) for name in ("gate", "up", "down")
        )

    def forward(self, states: Tensor) -> Tensor:
        """The layer's output [..., D]."""
        gate = nn.functional.silu(self.gate_proj(states), inplace=True)
        out: Tensor = self.down_proj(gate.mul_(self.up_proj(states)))
        return out


class RootMeanSquare(nn.Module):
    """An RMSNorm in two passes: the norm, and the scaling."""

    def __init__(self, layer: nn.Module) -> None:
        """Takes the layer's own weight."""
        super().__init__()
        self.weight: nn.Parameter = layer.weight  # type: ignore[assignment]
        self.epsilon = float(layer.variance_epsilon)  # type: ignore[arg-type]

    def forward(self, states: Tensor) -> Tensor:
        """The layer's output [..., D]."""
        norm = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        scale = norm.square_().div_(states.shape[-1]).add_(self.epsilon).rsqrt_()
        out: Tensor = (states * scale).mul_(self.weight)
        return out


def _packed(layer: nn.Module) -> nn.Module | None:
    # Without a bias there is nothing to fuse, and the plain product is as quick.
    return Packed(layer) if type(layer) is nn.Linear and layer.bias is not None else None


def _activated(layer: nn.Module) -> nn.Module | None:
    if not isinstance(getattr(layer, "intermediate_act_fn", None), GELUActivation | nn.GELU):
        return None
    return Packed(_child(layer, "dense", nn.Linear), activation="gelu")


def _residual(layer: nn.Module) -> nn.Module | None:
    return (
        Residual(layer) if {"dense", "LayerNorm"} <= dict(layer.named_children()).keys() else None
    )


def _gated(layer: nn.Module) -> nn.Module | None:
    swish = isinstance(getattr(layer, "act_fn", None), nn.SiLU | SiLUActivation)
    return Gated(layer) if swish and hasattr(layer, "gate_proj") else None


def _normed(layer: nn.Module) -> nn.Module | None:
    return RootMeanSquare(layer) if hasattr(layer, "variance_epsilon") else None


# The first that fits and gives the same is taken.
_FORMS: Sequence[Callable[[nn.Module], nn.Module | None]] = (
    _activated,
    _residual,
    _gated,
    _normed,
    _packed,
)


@torch.inference_mode()
def fuse(blocks: nn.ModuleList) -> int:
    """How many layers of a float32 model's blocks on a CPU are replaced by such ones."""
    return sum(_replace(block) for block in blocks)


def _replace(parent: nn.Module) -> int:
    done = 0
    for name, layer in list(parent.named_children()):
        fused = next(_alike(layer), None)
        if fused is None:
            done += _replace(layer)
        else:
            setattr(parent, name, fused)
            done += 1
    return done


def _alike(layer: nn.Module) -> Iterator[nn.Module]:
    """The forms of a layer that give what it gives."""
    for form in _FORMS:
        try:
            fused = form(layer)
            if fused is not None and _same(layer, fused):
                yield fused
        except (AttributeError, TypeError, RuntimeError, NotImplementedError):
            # Of another make than its parts' names say, or no such kernel in this torch.
            continue


def _same(layer: nn.Module, fused: nn.Module) -> bool:
    """Whether both give the same on a small example; a residual layer takes two inputs."""
    # Of a gated layer the first product is the way in, as of the others.
    shapes = [p.shape for p in layer.parameters() if p.ndim == 2]
    width = shapes[0][1] if shapes else next(layer.parameters()).shape[0]
    drawn = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, _ROWS, width, generator=drawn)]
    if isinstance(fused, Residual):
        inputs.append(torch.randn(2, _ROWS, shapes[0][0], generator=drawn))
    expected, got = layer(*inputs), fused(*inputs)
    return float((got - expected).norm()) <= _TOLERANCE * float(expected.norm())


def _child(layer: nn.Module, name: str, kind: type[_LayerT]) -> _LayerT:
    """The layer's child of this name; TypeError if it is of another kind."""
    found = getattr(layer, name)
    if not isinstance(found, kind):
        raise TypeError(f"{name} is a {type(found).__name__}")
    return found
