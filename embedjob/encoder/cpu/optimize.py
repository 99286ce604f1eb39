"""Layers of a model on a CPU in quicker forms: what they compute stays what it is.

A form is taken only where the layer's code is that of the one it was made for, and where it gives,
on a small example, what the model's own layer gives.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, SiLUActivation

from embedjob.encoder.cpu.blocks import PostNorm, PreNorm, Rotary
from embedjob.encoder.cpu.layers import Activated, Gated, Residual, RootMeanSquare

_LOG = logging.getLogger(__name__)
_TOLERANCE = 1e-5
_ROWS = 3
_Form = Callable[[nn.Module], nn.Module | None]


def _post_norm(layer: nn.Module) -> nn.Module | None:
    parts = {"attention", "intermediate", "output"}
    of_bert = parts == dict(layer.named_children()).keys() and _gelu(layer.intermediate)
    return PostNorm(layer) if of_bert else None


def _pre_norm(layer: nn.Module) -> nn.Module | None:
    parts = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    of_llama = parts == dict(layer.named_children()).keys() and _swish(layer.mlp)
    return PreNorm(layer) if of_llama else None


def _rotary(layer: nn.Module) -> nn.Module | None:
    return Rotary(layer) if hasattr(layer, "q_proj") and _turns_whole_heads(layer) else None


def _activated(layer: nn.Module) -> nn.Module | None:
    return Activated(layer) if _gelu(layer) else None


def _residual(layer: nn.Module) -> nn.Module | None:
    return (
        Residual(layer) if {"dense", "LayerNorm"} <= dict(layer.named_children()).keys() else None
    )


def _gated(layer: nn.Module) -> nn.Module | None:
    return Gated(layer) if _swish(layer) and hasattr(layer, "gate_proj") else None


def _normed(layer: nn.Module) -> nn.Module | None:
    alone = len(signature(layer.forward).parameters) == 1
    return RootMeanSquare(layer) if alone and hasattr(layer, "variance_epsilon") else None


def _gelu(layer: Any) -> bool:
    return isinstance(getattr(layer, "intermediate_act_fn", None), GELUActivation | nn.GELU)


def _swish(layer: Any) -> bool:
    return isinstance(getattr(layer, "act_fn", None), nn.SiLU | SiLUActivation)


# The first that fits and gives the same is taken.
_FORMS: Sequence[_Form] = (
    *(_post_norm, _pre_norm, _rotary),
    *(_activated, _residual, _gated, _normed),
)


def fuse(blocks: nn.ModuleList) -> int:
    """How many layers of a float32 model's blocks on a CPU are replaced by such ones.

    Besides, the weights of linear layers are laid out in memory as this CPU's products like them.
    """
    with torch.no_grad():
        replaced = _replace(blocks)
        # Quicker by some hundredths with AVX-512, slower without it.
        if has_avx512():
            _lay_in_columns(blocks)
    return replaced


@cache
def has_avx512() -> bool:
    """Tells whether torch computes with vectors of sixteen floats."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def _lay_in_columns(blocks: nn.ModuleList) -> None:
    for layer in blocks.modules():
        if type(layer) is nn.Linear:
            in_columns = layer.weight.detach().t().contiguous().t()
            layer.weight = nn.Parameter(in_columns, requires_grad=False)


def _replace(parent: nn.Module) -> int:
    done = 0
    # By name: a layer that was replaced is to go before the next one is.
    for name in [name for name, _ in parent.named_children()]:
        layer = getattr(parent, name)
        fused = next(_alike(layer), None)
        if fused is not None:
            setattr(parent, name, fused)
            done += 1
        # A block's attention has layers of its own.
        done += _replace(fused or layer)
    return done


def _alike(layer: nn.Module) -> Iterator[nn.Module]:
    """The forms of a layer that give what it gives."""
    for form in _FORMS:
        try:
            fused = form(layer)
            if fused is not None and _same(layer, fused):
                yield fused
        except Exception as error:
            # Whatever a layer raises that is of another make than its parts' names say, it is kept.
            _LOG.debug("%s is kept: %s", type(layer).__name__, error)


def _same(layer: nn.Module, fused: nn.Module) -> bool:
    """Whether both give the same on a small example."""
    # Of a gated layer the first product is the way in, as of the others.
    shapes = [p.shape for p in layer.parameters() if p.ndim == 2]
    width = shapes[0][1] if shapes else next(layer.parameters()).shape[0]
    drawn = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, _ROWS, width, generator=drawn)]
    more: dict[str, Any] = {}
    if isinstance(fused, Residual):
        inputs.append(torch.randn(2, _ROWS, shapes[0][0], generator=drawn))
    if isinstance(fused, PreNorm | Rotary):
        more = _turned(_head_width(layer), drawn)
    expected, got = (_output(one(*inputs, **more)) for one in (layer, fused))
    return float((got - expected).norm()) <= _TOLERANCE * float(expected.norm())


def _turned(width: int, drawn: torch.Generator) -> dict[str, Any]:
    """What attention is told of positions that turn so much of each head."""
    angles = torch.randn(2, _ROWS, width // 2, generator=drawn).repeat(1, 1, 2)
    return {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": None}


def _turns_whole_heads(layer: Any) -> bool:
    """Whether attention refuses to turn a part of each head, as some do by the same code."""
    drawn = torch.Generator().manual_seed(0)
    states = torch.randn(2, _ROWS, layer.q_proj.in_features, generator=drawn)
    try:
        layer(states, **_turned(_head_width(layer) // 2, drawn))
    except RuntimeError:
        return True
    return False


def _head_width(layer: Any) -> int:
    return int(getattr(layer, "self_attn", layer).head_dim)


def _output(found: Tensor | tuple[Tensor, Any]) -> Tensor:
    """What a layer gives, of attention without what it says beside it."""
    return found[0] if isinstance(found, tuple) else found
