"""The linear layers of a model's blocks in eight bits, through torchao.

Activations are scaled token by token, so that a vector depends on no other text.
"""

from typing import Any

import torch
from torch import nn

from embedjob.errors import ModelError, ResourceError
from embedjob.recipe import Recipe

_FLOAT8_CAPABILITY = (8, 9)
# What chooses experts is small, and a choice by rounded scores would be another model's.
_ROUTERS = frozenset({"gate", "router"})


def require_device(recipe: Recipe, device: torch.device) -> None:
    """ResourceError if the GPU cannot multiply numbers as the recipe asks."""
    if recipe.quantize != "float8":
        return
    got = torch.cuda.get_device_capability(device)
    if got < _FLOAT8_CAPABILITY:
        raise ResourceError(
            f"encoder.quantize: got float8 on a GPU of capability {got[0]}.{got[1]}; allowed is 8.9"
            " or more (Ada, Hopper and later). Set int8 or none, or ask for such a GPU"
        )


def quantize(blocks: nn.ModuleList | None, recipe: Recipe) -> None:
    """Quantises the linear layers of these blocks; ModelError if they have none."""
    if blocks is None or not any(_is_meant(m, name) for name, m in blocks.named_modules()):
        raise ModelError(
            f"encoder.quantize: got {recipe.quantize}, but no linear layer is found in the blocks"
            f" of {recipe.model}; set quantize: none"
        )
    from torchao.quantization import quantize_

    quantize_(blocks, _configs()[recipe.quantize], filter_fn=_is_meant)


def _is_meant(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name.rsplit(".")[-1] not in _ROUTERS


def _configs() -> dict[str, Any]:
    from torchao import quantization

    return {
        "int8": quantization.Int8DynamicActivationInt8WeightConfig(),
        "float8": quantization.Float8DynamicActivationFloat8WeightConfig(
            granularity=quantization.PerRow()
        ),
    }
