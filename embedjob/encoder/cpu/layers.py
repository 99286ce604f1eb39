"""Fused layers for a CPU: activation, residual or norm in the same pass as the matrix product.

Beside the matrix products, a CPU's time goes into reading and writing states for each bias,
activation, norm and residual. The layers here take fewer passes. Each replaces a layer whose
forward has a pinned wording (`pinned.py`); many of transformers' models share it. `optimize.py`
compares both on a small example as well, which alone would not show what a layer does to rare
inputs, such as clipping.

Whole blocks are in `blocks.py`.

Legend: D width.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

from embedjob.encoder.cpu.pinned import check_reads_like


def biased(linear: nn.Linear, bias: Tensor | None) -> nn.Linear:
    """Return the same product with another bias."""
    other = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    other.weight = linear.weight
    if bias is not None:
        other.bias = nn.Parameter(bias, requires_grad=False)
    return other


def with_added_bias(norm: nn.LayerNorm, bias: Tensor) -> nn.LayerNorm:
    """Return the same norm with more bias."""
    other = nn.LayerNorm(norm.normalized_shape, eps=norm.eps, device="meta")
    other.weight = norm.weight
    other.bias = nn.Parameter(norm.bias + bias, requires_grad=False)
    return other


def bias_in_a_column(linear: nn.Linear, norm: nn.LayerNorm) -> tuple[nn.Linear, int]:
    """Return a product without a bias, and the column of its input that has to be 1 instead.

    The input is the output of `norm`. Before the norm's weight and bias its numbers sum to zero, so
    one column follows from the others and is free to carry the bias. The column with the smallest
    weight is taken: then no other column counts more than before.
    """
    scale, shift, weight = norm.weight.double(), norm.bias.double(), linear.weight.double()
    spare = int(scale.abs().argmin())
    share = torch.where(scale == 0, 0, scale[spare] / scale)
    share[spare] = 0
    freed = weight[:, spare]
    made = weight - freed[:, None] * share
    made[:, spare] = linear.bias.double() + freed * (shift[spare] + shift @ share)
    return _linear(made.float(), None), spare


def interleave_rope_halves(linear: nn.Linear, width: int) -> nn.Linear:
    """Return the same product; the halves of its output alternate in each head of this width."""
    order = torch.arange(linear.out_features).view(-1, 2, width // 2).transpose(1, 2).flatten()
    bias: Tensor | None = linear.bias
    return _linear(linear.weight[order], None if bias is None else bias[order])


def joined_linear(*parts: nn.Linear) -> nn.Linear:
    """Return one product that gives the outputs of all parts, end to end."""
    bias = None
    if any(part.bias is not None for part in parts):
        each = (
            part.weight.new_zeros(part.out_features) if part.bias is None else part.bias
            for part in parts
        )
        bias = torch.cat([*each])
    return _linear(torch.cat([part.weight for part in parts]), bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return biased(linear, bias)


_LayerT = TypeVar("_LayerT", bound=nn.Module)


class LinearGelu(nn.Module):
    """A linear layer and a GELU in place: BERT's intermediate layer."""

    def __init__(self, layer: nn.Module) -> None:
        """Take the layer's own product; TypeError if its forward is not BERT's."""
        super().__init__()
        check_reads_like(layer, "BertIntermediate")
        self.dense = child(layer, "dense", nn.Linear)

    def forward(self, states: Tensor) -> Tensor:
        """Return the layer's output [..., D]."""
        out: Tensor = torch.ops.aten.gelu_(self.dense(states))
        return out


class LinearResidualNorm(nn.Module):
    """A linear layer, the residual added in place, and a norm: BERT's output layers."""

    def __init__(self, layer: nn.Module) -> None:
        """Take the layer's own product and norm; TypeError if its forward is not BERT's."""
        super().__init__()
        check_reads_like(layer, "BertOutput")
        self.dense = child(layer, "dense", nn.Linear)
        self.norm = child(layer, "LayerNorm", nn.LayerNorm)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Return the layer's output [..., D]."""
        out: Tensor = self.norm(_added(self.dense, hidden_states, input_tensor))
        return out


class SwiGlu(nn.Module):
    """A SwiGLU layer with activation and product in place."""

    def __init__(self, layer: nn.Module) -> None:
        """Take the layer's own projections; TypeError if its forward is not Llama's."""
        super().__init__()
        check_reads_like(layer, "LlamaMLP")
        self.gate_proj, self.up_proj, self.down_proj = (
            child(layer, f"{name}_proj", nn.Linear) for name in ("gate", "up", "down")
        )

    def forward(self, states: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the layer's output [..., D], or the residual with the output added in place."""
        gate = nn.functional.silu(self.gate_proj(states), inplace=True)
        gate.mul_(self.up_proj(states))
        if residual is None:
            out: Tensor = self.down_proj(gate)
            return out
        residual.flatten(0, -2).addmm_(gate.flatten(0, -2), self.down_proj.weight.t())
        bias: Tensor | None = self.down_proj.bias
        return residual if bias is None else residual.add_(bias)


class RmsNorm(nn.Module):
    """An RMSNorm in two passes: the norm, and the scaling."""

    def __init__(self, layer: nn.Module) -> None:
        """Take the layer's own weight; TypeError if its forward is not Llama's or T5's."""
        super().__init__()
        check_reads_like(layer, "LlamaRMSNorm", "T5LayerNorm")
        self.weight: nn.Parameter = layer.weight  # type: ignore[assignment]
        self.epsilon = float(layer.variance_epsilon)  # type: ignore[arg-type]

    def forward(self, states: Tensor) -> Tensor:
        """Return the layer's output [..., D]."""
        norm = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        scale = norm.square_().div_(states.shape[-1]).add_(self.epsilon).rsqrt_()
        out: Tensor = (states * scale).mul_(self.weight)
        return out


def _added(linear: nn.Linear, states: Tensor, residual: Tensor) -> Tensor:
    """Return a linear layer's output added to the residual and the bias [..., D]."""
    rows = residual.reshape(-1, residual.shape[-1])
    rows = rows.clone() if linear.bias is None else rows + linear.bias
    rows.addmm_(states.reshape(-1, states.shape[-1]), linear.weight.t())
    return rows.view(residual.shape)


def child(layer: nn.Module, name: str, kind: type[_LayerT]) -> _LayerT:
    """Return a layer's child; TypeError if its class is not `kind` itself."""
    part: _LayerT = getattr(layer, name)
    if type(part) is not kind:
        raise TypeError(f"{name} is a {type(part).__name__}")
    return part
