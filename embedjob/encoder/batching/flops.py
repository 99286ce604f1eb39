"""Model FLOPs utilization: a model's FLOPs per second over the highest rate seen on the device.

The highest rate is a matmul's, or that of a pass of the model itself. The matmul is measured while
other processes start or compute, so its rate may be below the device's peak, and is never above.
"""

import time
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import nn

from embedjob.config.recipe import Recipe
from embedjob.encoder.backbone import Backbone
from embedjob.models.architecture import EXPERT_KEYS

# Measuring the device's peak takes a fraction of a second: not worth it for a shorter pass.
_WORTH_SECONDS = 1.0
_MEASURE_SECONDS = 0.25
# A pass above the peak shows that something else ran while it was measured.
_MEASUREMENTS = 3
_SIDES = {"cpu": 1024, "cuda": 8192}
# In Ernie models which layers have experts is not known; here it is enough that some have.
_EXPERTS = (*EXPERT_KEYS, "moe_num_experts")


class Meter:
    """Compares the FLOPs of one loaded model with the peak of its device."""

    def __init__(self, backbone: Backbone) -> None:
        """Keep the model; the peak is measured when it is first needed."""
        self._backbone = backbone
        self._peak: float | None = None
        self._measurements = 0

    def utilization(
        self, recipe: Recipe, stats: Mapping[str, float], *, seconds: float
    ) -> dict[str, float]:
        """Return `model_flops` of a pass, and `peak_flops` that the device could do in its seconds.

        The second is never less than the first. Empty if they are not known: for mixtures of
        experts, and while all passes were too short to be worth measuring the device.
        """
        per_token = flops_per_token(self._backbone, recipe)
        if per_token is None or (self._peak is None and seconds < _WORTH_SECONDS):
            return {}
        attention = flops_per_pair(self._backbone, recipe) * stats["attended_pairs"]
        done = per_token * stats["forward_tokens"] + attention
        if self._peak is None or done > self._peak * seconds:
            # A figure of speed must not cost the vectors.
            with suppress(torch.OutOfMemoryError):
                self._measure()
        if self._peak is None:
            return {}
        self._peak = max(self._peak, done / seconds if seconds else 0.0)
        return {"model_flops": done, "peak_flops": max(self._peak * seconds, done)}

    def _measure(self) -> None:
        if self._measurements < _MEASUREMENTS:
            self._measurements += 1
            measured = peak(self._backbone.device, self._backbone.model.dtype)
            self._peak = max(self._peak or 0.0, measured)


def flops_per_token(backbone: Backbone, recipe: Recipe) -> float | None:
    """Return 2 FLOPs per weight of the blocks that are run, without embeddings; None if unknown."""
    config = backbone.model.config.get_text_config().to_dict()
    blocks = backbone.stack
    if blocks is None or any((config.get(key) or 0) > 1 for key in _EXPERTS):
        return None
    return 2.0 * sum(_weights(block) for block in list(blocks)[: _blocks_run(backbone, recipe)])


def flops_per_pair(backbone: Backbone, recipe: Recipe) -> float:
    """Return the FLOPs of one query-key pair in all blocks that are run.

    0 if attention has windows, so that no FLOPs are counted which are not computed.
    """
    config = backbone.model.config.get_text_config()
    if backbone.windows:
        return 0.0
    heads = getattr(config, "num_attention_heads", None)
    head_width = getattr(config, "head_dim", None)
    width = heads * head_width if heads and head_width else backbone.width
    return 4.0 * width * _blocks_run(backbone, recipe)


@torch.inference_mode()
def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matmul on this device, the best of several."""
    side = _SIDES.get(device.type, _SIDES["cuda"])
    # Random numbers, because with equal numbers a GPU is faster than with any real ones.
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    until, best = time.perf_counter() + _MEASURE_SECONDS, float("inf")
    for attempt in range(32):
        _synchronize(device)
        started = time.perf_counter()
        left @ right
        _synchronize(device)
        # The first attempt loads the kernel.
        best = min(best, time.perf_counter() - started) if attempt else best
        if attempt and time.perf_counter() > until:
            break
    return 2.0 * side**3 / best


def _synchronize(device: torch.device) -> None:
    """Wait until the device has done all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _blocks_run(backbone: Backbone, recipe: Recipe) -> int:
    """Return how many blocks are run for the layers that the recipe reads."""
    layers = (recipe.layer,) if isinstance(recipe.layer, int) else recipe.layer
    return max(layer % (backbone.info.layers + 1) for layer in layers)


def _weights(block: nn.Module) -> int:
    """Return the elements of a block's matrices, which are multiplied with every token."""
    modules = (m for m in block.modules() if not isinstance(m, nn.Embedding))
    parameters = (p for module in modules for p in module.parameters(recurse=False))
    return sum(parameter.numel() for parameter in parameters if parameter.ndim == 2)
