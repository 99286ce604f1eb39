"""The weights of the linear layers in a model's blocks in eight bits, through torchao.

Weights alone: rounded activations turn a last bit, which differs between micro-batches, into a step
of 1/256, and vectors of SmolLM2 then depended on their neighbours by a cosine of 0.99.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from embedjob.errors import ModelError
from embedjob.recipe import Recipe

# What chooses experts is small, and a choice by rounded scores would be another model's.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "classifier"})


def quantize(blocks: nn.ModuleList | None, recipe: Recipe) -> None:
    """Quantises the linear layers of these blocks; ModelError if they have none."""
    if blocks is None or not any(_is_meant(m, name) for name, m in blocks.named_modules()):
        raise ModelError(
            f"encoder.quantize: got {recipe.quantize}, but no linear layer is found in the blocks"
            f" of {recipe.model}; set quantize: none"
        )
    from torchao.quantization import quantize_

    quantize_(blocks, _configs()[recipe.quantize], filter_fn=_is_meant)


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Within it a model's quantised weights are float32, of the values that they stand for."""
    narrow: list[tuple[nn.Module, Any]] = [
        (module, module.weight)
        for module in model.modules()
        if hasattr(getattr(module, "weight", None), "qdata")
    ]
    try:
        for module, weight in narrow:
            wide = weight.dequantize().float()
            module.weight = nn.Parameter(wide, requires_grad=False)
        yield
    finally:
        for module, weight in narrow:
            module.weight = weight


def _is_meant(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name.rsplit(".")[-1] not in _ROUTERS


def _configs() -> dict[str, Any]:
    from torchao import quantization

    return {
        "int8": quantization.Int8WeightOnlyConfig(),
        "float8": quantization.Float8WeightOnlyConfig(),
    }
