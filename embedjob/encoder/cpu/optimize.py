"""Layer replacement: put fused layers into a float32 model on a CPU.

A layer is replaced only where its forward has the pinned wording (`pinned.py`), and where the
replacement gives the same output on a small example.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, SiLUActivation

from embedjob.encoder.cpu.blocks import PostNormBlock, PreNormBlock, RotaryAttention
from embedjob.encoder.cpu.layers import LinearGelu, LinearResidualNorm, RmsNorm, SwiGlu
from embedjob.encoder.cpu.pinned import changed_classes

_LOG = logging.getLogger(__name__)
_TOLERANCE = 1e-5
_ROWS = 3
_Maker = Callable[[nn.Module], nn.Module | None]


def replace_layers(blocks: nn.ModuleList) -> int:
    """Replace layers in a model's blocks by fused ones, and return how many.

    With AVX-512 the weights of linear layers are stored column by column as well. Pinned classes
    whose forward has changed are logged; their layers stay.
    """
    changed = changed_classes(blocks.modules())
    if changed:
        _LOG.warning(
            "the model's own %s is used, which is slower: the installed transformers has another"
            " forward than the one that a faster layer was written after",
            ", ".join(changed),
        )
    with torch.no_grad():
        replaced = _replace(blocks)
        # Faster by 1 to 3 % with AVX-512, slower without it.
        if has_avx512():
            _store_by_column(blocks)
    return replaced


@cache
def has_avx512() -> bool:
    """Return whether torch computes with vectors of sixteen floats."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def _post_norm_block(layer: nn.Module) -> nn.Module | None:
    parts = {"attention", "intermediate", "output"}
    fits = parts == dict(layer.named_children()).keys() and _has_gelu(layer.intermediate)
    return PostNormBlock(layer) if fits else None


def _pre_norm_block(layer: nn.Module) -> nn.Module | None:
    parts = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    fits = parts == dict(layer.named_children()).keys() and _has_swish(layer.mlp)
    return PreNormBlock(layer) if fits else None


def _rotary_attention(layer: nn.Module) -> nn.Module | None:
    fits = hasattr(layer, "q_proj") and _rotates_whole_heads(layer)
    return RotaryAttention(layer) if fits else None


def _linear_gelu(layer: nn.Module) -> nn.Module | None:
    return LinearGelu(layer) if _has_gelu(layer) else None


def _linear_residual_norm(layer: nn.Module) -> nn.Module | None:
    fits = {"dense", "LayerNorm"} <= dict(layer.named_children()).keys()
    return LinearResidualNorm(layer) if fits else None


def _swiglu(layer: nn.Module) -> nn.Module | None:
    return SwiGlu(layer) if _has_swish(layer) and hasattr(layer, "gate_proj") else None


def _rms_norm(layer: nn.Module) -> nn.Module | None:
    one_input = len(signature(layer.forward).parameters) == 1
    return RmsNorm(layer) if one_input and hasattr(layer, "variance_epsilon") else None


def _has_gelu(layer: Any) -> bool:
    return isinstance(getattr(layer, "intermediate_act_fn", None), GELUActivation | nn.GELU)


def _has_swish(layer: Any) -> bool:
    return isinstance(getattr(layer, "act_fn", None), nn.SiLU | SiLUActivation)


# Tried in this order; the first that fits and gives the same output is used.
_MAKERS: Sequence[_Maker] = (
    *(_post_norm_block, _pre_norm_block, _rotary_attention),
    *(_linear_gelu, _linear_residual_norm, _swiglu, _rms_norm),
)


def _store_by_column(blocks: nn.ModuleList) -> None:
    for layer in blocks.modules():
        if type(layer) is nn.Linear:
            by_column = layer.weight.detach().t().contiguous().t()
            layer.weight = nn.Parameter(by_column, requires_grad=False)


def _replace(parent: nn.Module) -> int:
    count = 0
    # By name, so that no list holds a replaced layer's weights while the next layer is made.
    for name in [name for name, _ in parent.named_children()]:
        layer = getattr(parent, name)
        fused = next(_replacements(layer), None)
        if fused is not None:
            setattr(parent, name, fused)
            count += 1
        # A fused block still has layers that can be replaced, such as its attention.
        count += _replace(fused or layer)
    return count


def _replacements(layer: nn.Module) -> Iterator[nn.Module]:
    """Yield the fused layers that give this layer's output."""
    for make in _MAKERS:
        try:
            fused = make(layer)
            if fused is not None and _gives_the_same(layer, fused):
                yield fused
        except Exception as error:
            # A layer may have these parts and be another architecture; any error means: keep it.
            _LOG.debug("%s is kept: %s", type(layer).__name__, error)


def _gives_the_same(layer: nn.Module, fused: nn.Module) -> bool:
    """Return whether both layers give the same output on a small random example."""
    # The first weight is a projection of the input, in gated layers too.
    shapes = [p.shape for p in layer.parameters() if p.ndim == 2]
    width = shapes[0][1] if shapes else next(layer.parameters()).shape[0]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, _ROWS, width, generator=generator)]
    options: dict[str, Any] = {}
    if isinstance(fused, LinearResidualNorm):
        inputs.append(torch.randn(2, _ROWS, shapes[0][0], generator=generator))
    if isinstance(fused, PreNormBlock | RotaryAttention):
        options = _rotary_options(_head_width(layer), generator)
    expected, got = (_states(one(*inputs, **options)) for one in (layer, fused))
    return float((got - expected).norm()) <= _TOLERANCE * float(expected.norm())


def _rotary_options(width: int, generator: torch.Generator) -> dict[str, Any]:
    """Return an attention's keyword arguments for random positions over `width` of each head."""
    angles = torch.randn(2, _ROWS, width // 2, generator=generator).repeat(1, 1, 2)
    return {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": None}


def _rotates_whole_heads(layer: Any) -> bool:
    """Return whether attention refuses angles for half a head; some models rotate a part only."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, _ROWS, layer.q_proj.in_features, generator=generator)
    try:
        layer(states, **_rotary_options(_head_width(layer) // 2, generator))
    except RuntimeError:
        return True
    return False


def _head_width(layer: Any) -> int:
    return int(getattr(layer, "self_attn", layer).head_dim)


def _states(output: Tensor | tuple[Tensor, Any]) -> Tensor:
    """Return a layer's states; an attention gives its weights as well."""
    return output[0] if isinstance(output, tuple) else output
