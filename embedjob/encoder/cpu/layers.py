"""Forms of a model's layers that take fewer passes over memory on a CPU.

Beside the matrix products, a CPU's time goes into reading and writing states for a bias, an
activation, a norm or a residual by itself. Each layer here does these in the pass before. It is
taken for layers whose code is that of the one it was made for: many of transformers' models share
theirs. What a small example shows, `fused.py` sees; what code does to some inputs alone, such as
clipping, no example would.

Those of whole blocks are in `blocks.py`.

Legend: D width.
"""

import inspect
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertIntermediate, BertOutput
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm


def biased(linear: nn.Linear, bias: Tensor | None) -> nn.Linear:
    """The same product with another bias."""
    other = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    other.weight = linear.weight
    if bias is not None:
        other.bias = nn.Parameter(bias, requires_grad=False)
    return other


def with_added_bias(norm: nn.LayerNorm, bias: Tensor) -> nn.LayerNorm:
    """The same norm with more bias."""
    other = nn.LayerNorm(norm.normalized_shape, eps=norm.eps, device="meta")
    other.weight = norm.weight
    other.bias = nn.Parameter(norm.bias + bias, requires_grad=False)
    return other


def bias_in_a_column(linear: nn.Linear, norm: nn.LayerNorm) -> tuple[nn.Linear, int]:
    """The same product without a bias, of what a norm gives with 1 in the column that is returned.

    Before the norm's weight and bias its numbers sum to zero, and so one of them is told by the
    others: the one of the smallest weight, for which no other counts more than before.
    """
    scale, shift, weight = norm.weight.double(), norm.bias.double(), linear.weight.double()
    spare = int(scale.abs().argmin())
    share = torch.where(scale == 0, 0, scale[spare] / scale)
    share[spare] = 0
    told = weight[:, spare]
    made = weight - told[:, None] * share
    made[:, spare] = linear.bias.double() + told * (shift[spare] + shift @ share)
    return _linear(made.float(), None), spare


def interleave_rope_halves(linear: nn.Linear, width: int) -> nn.Linear:
    """The same product; in each head of this width the halves of its output alternate."""
    order = torch.arange(linear.out_features).view(-1, 2, width // 2).transpose(1, 2).flatten()
    bias: Tensor | None = linear.bias
    return _linear(linear.weight[order], None if bias is None else bias[order])


def joined(*parts: nn.Linear) -> nn.Linear:
    """One product whose output is that of all parts, end to end."""
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


class Activated(nn.Module):
    """A linear layer and a GELU that is made in place: BERT's intermediate layers."""

    def __init__(self, layer: nn.Module) -> None:
        """Takes the layer's own product; TypeError if it reads otherwise."""
        super().__init__()
        require_reads_like(layer, BertIntermediate)
        self.dense = child(layer, "dense", nn.Linear)

    def forward(self, states: Tensor) -> Tensor:
        """The layer's output [..., D]."""
        out: Tensor = torch.ops.aten.gelu_(self.dense(states))
        return out


class Residual(nn.Module):
    """A linear layer, the residual added in place, and a norm: BERT's output layers."""

    def __init__(self, layer: nn.Module) -> None:
        """Takes the layer's own product and norm; TypeError if it reads otherwise."""
        super().__init__()
        require_reads_like(layer, BertOutput)
        self.dense = child(layer, "dense", nn.Linear)
        self.norm = child(layer, "LayerNorm", nn.LayerNorm)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """The layer's output [..., D]."""
        out: Tensor = self.norm(_added(self.dense, hidden_states, input_tensor))
        return out


class Gated(nn.Module):
    """A SwiGLU layer whose activation and product are made in place."""

    def __init__(self, layer: nn.Module) -> None:
        """Takes the layer's own projections; TypeError if it reads otherwise."""
        super().__init__()
        require_reads_like(layer, LlamaMLP)
        self.gate_proj, self.up_proj, self.down_proj = (
            child(layer, f"{name}_proj", nn.Linear) for name in ("gate", "up", "down")
        )

    def forward(self, states: Tensor, residual: Tensor | None = None) -> Tensor:
        """The layer's output [..., D]; or the residual, changed in place by adding that to it."""
        gate = nn.functional.silu(self.gate_proj(states), inplace=True)
        gate.mul_(self.up_proj(states))
        if residual is None:
            out: Tensor = self.down_proj(gate)
            return out
        residual.flatten(0, -2).addmm_(gate.flatten(0, -2), self.down_proj.weight.t())
        bias: Tensor | None = self.down_proj.bias
        return residual if bias is None else residual.add_(bias)


class RootMeanSquare(nn.Module):
    """An RMSNorm in two passes: the norm, and the scaling."""

    def __init__(self, layer: nn.Module) -> None:
        """Takes the layer's own weight; TypeError if it reads otherwise."""
        super().__init__()
        require_reads_like(layer, LlamaRMSNorm, T5LayerNorm)
        self.weight: nn.Parameter = layer.weight  # type: ignore[assignment]
        self.epsilon = float(layer.variance_epsilon)  # type: ignore[arg-type]

    def forward(self, states: Tensor) -> Tensor:
        """The layer's output [..., D]."""
        norm = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        scale = norm.square_().div_(states.shape[-1]).add_(self.epsilon).rsqrt_()
        out: Tensor = (states * scale).mul_(self.weight)
        return out


def _added(linear: nn.Linear, states: Tensor, residual: Tensor) -> Tensor:
    """A linear layer's output and a residual [..., D]: that and the bias are there before it."""
    rows = residual.reshape(-1, residual.shape[-1])
    rows = rows.clone() if linear.bias is None else rows + linear.bias
    rows.addmm_(states.reshape(-1, states.shape[-1]), linear.weight.t())
    return rows.view(residual.shape)


def child(layer: nn.Module, name: str, kind: type[_LayerT]) -> _LayerT:
    """The layer's child of this name; TypeError if it is of another kind, or of one made of it."""
    found: _LayerT = getattr(layer, name)
    if type(found) is not kind:
        raise TypeError(f"{name} is a {type(found).__name__}")
    return found


def require_reads_like(layer: nn.Module, *kinds: type[nn.Module]) -> None:
    """TypeError if the layer's code is that of none of these kinds."""
    if code_of(type(layer)) not in map(code_of, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"a {type(layer).__name__} does not read like a {names}")


def code_of(layer: type[nn.Module]) -> tuple[Any, ...]:
    """What a layer's forward does, word for word."""
    code = inspect.unwrap(layer.forward).__code__
    return code.co_code, code.co_consts, code.co_names, code.co_varnames
