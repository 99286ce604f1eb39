"""Forms of a model's layers that take fewer passes over memory on a CPU.

Beside the matrix products, a CPU's time goes into reading and writing states for a bias, an
activation, a norm or a residual by itself. Each layer here does these in the pass before.

Legend: V views, T tokens, D width.
"""

import inspect
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from embedjob.encoder.kernels import ROOM

# What transformers asks of a block of BERT, and that of its attention.
_OF_BLOCK = [
    *("hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask"),
    *("past_key_values", "kwargs"),
]
_OF_ATTENTION = ["hidden_states", "attention_mask", "past_key_values", "kwargs"]
_LayerT = TypeVar("_LayerT", bound=nn.Module)


class PostNorm(nn.Module):
    """A block of BERT in one piece, whose wide states are gone before the last norm.

    Keys need no bias: it would add as much to every score of a query, which softmax takes away.
    That of values would be in every weighted mean, and so is put into the next product's.
    """

    def __init__(self, block: Any) -> None:
        """Takes the block's own layers; TypeError if more is asked of it than of BERT's."""
        super().__init__()
        own, output = block.attention.self, block.attention.output
        if block.is_decoder or [*map(_asked, (block, own))] != [_OF_BLOCK, _OF_ATTENTION]:
            raise TypeError(f"a {type(block).__name__} is more than a block of BERT")
        self.config: PreTrainedConfig = own.config
        self.is_causal, self.scaling = bool(own.is_causal), float(own.scaling)
        self.width = int(own.attention_head_size)
        self.query = _child(own, "query", nn.Linear)
        self.key = _biased(_child(own, "key", nn.Linear), None)
        self.value = _biased(_child(own, "value", nn.Linear), None)
        self.mixed = Residual(output)
        self.mixed.dense = _biased(output.dense, output.dense(own.value.bias))
        self.up = _child(block.intermediate, "dense", nn.Linear)
        self.down = _child(block.output, "dense", nn.Linear)
        self.norm = _child(block.output, "LayerNorm", nn.LayerNorm)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **asked: Any
    ) -> Tensor:
        """The block's output [V, T, D]."""
        heads = (*hidden_states.shape[:-1], -1, self.width)
        query, key, value = (
            layer(hidden_states).view(heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attend = AttentionInterface()[self.config._attn_implementation]
        means = attend(self, query, key, value, attention_mask, scaling=self.scaling, **asked)[0]
        attended = self.mixed(means.reshape(hidden_states.shape), hidden_states)
        # What follows finds the memory of what is gone, which is still at hand.
        del query, key, value, means
        wide: Tensor = torch.ops.aten.gelu_(self.up(attended))
        out = _added(self.down, wide, attended)
        del wide, attended
        normed: Tensor = self.norm(out)
        return normed


class Activated(nn.Module):
    """A linear layer and a GELU that is made in place: BERT's intermediate layers."""

    def __init__(self, layer: nn.Module) -> None:
        """Takes the layer's own product."""
        super().__init__()
        self.dense = _child(layer, "dense", nn.Linear)

    def forward(self, states: Tensor) -> Tensor:
        """The layer's output [..., D]."""
        out: Tensor = torch.ops.aten.gelu_(self.dense(states))
        return out


class Residual(nn.Module):
    """A linear layer, the residual added in place, and a norm: BERT's output layers."""

    def __init__(self, layer: nn.Module) -> None:
        """Takes the layer's own product and norm."""
        super().__init__()
        self.dense = _child(layer, "dense", nn.Linear)
        self.norm = _child(layer, "LayerNorm", nn.LayerNorm)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """The layer's output [..., D]."""
        out: Tensor = self.norm(_added(self.dense, hidden_states, input_tensor))
        return out


class Roomy(nn.Module):
    """A linear layer with zeros in memory after its output, which attention reads beyond."""

    def __init__(self, linear: nn.Linear) -> None:
        """Takes the layer's own weight and bias."""
        super().__init__()
        self.weight = linear.weight
        self.bias: nn.Parameter | None = linear.bias

    def forward(self, states: Tensor) -> Tensor:
        """The layer's output [..., D]."""
        weight, bias = self.weight, self.bias
        rows = states.reshape(-1, states.shape[-1])
        count = rows.shape[0]
        room = rows.new_empty(count + ROOM, weight.shape[0])
        room[count:] = 0
        out = room[:count]
        if bias is None:
            torch.mm(rows, weight.t(), out=out)
        else:
            torch.addmm(bias, rows, weight.t(), out=out)
        return out.view(*states.shape[:-1], -1)


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


def _added(linear: nn.Linear, states: Tensor, residual: Tensor) -> Tensor:
    """A linear layer's output and a residual [..., D]: that and the bias are there before it."""
    rows = residual.reshape(-1, residual.shape[-1])
    rows = rows.clone() if linear.bias is None else rows + linear.bias
    rows.addmm_(states.reshape(-1, states.shape[-1]), linear.weight.t())
    return rows.view(residual.shape)


def _biased(linear: nn.Linear, bias: Tensor | None) -> nn.Linear:
    """The same product with another bias."""
    other = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    other.weight = linear.weight
    if bias is not None:
        other.bias = nn.Parameter(bias, requires_grad=False)
    return other


def _asked(layer: nn.Module) -> list[str]:
    """What a layer's forward takes, in its order."""
    return list(inspect.signature(layer.forward).parameters)


def _child(layer: nn.Module, name: str, kind: type[_LayerT]) -> _LayerT:
    """The layer's child of this name; TypeError if it is of another kind."""
    found = getattr(layer, name)
    if not isinstance(found, kind):
        raise TypeError(f"{name} is a {type(found).__name__}")
    return found
