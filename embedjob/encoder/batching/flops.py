"""How much of what a device can do goes into the model: counted FLOPs over a measured matmul."""

import time
from collections.abc import Mapping

import torch
from torch import nn

from embedjob.config.recipe import Recipe
from embedjob.encoder.backbone import Backbone
from embedjob.models.architecture import EXPERT_KEYS

# A shorter pass is not worth the fraction of a second that the device's peak takes to measure.
_WORTH_SECONDS = 1.0
_MEASURE_SECONDS = 0.25
_SIDES = {"cpu": 1024, "cuda": 8192}
# Where Ernie's experts are is not known beside; that it has some is enough here.
_EXPERTS = (*EXPERT_KEYS, "moe_num_experts")


class Meter:
    """What one loaded model computes, beside what its device could."""

    def __init__(self, backbone: Backbone) -> None:
        """Measures nothing yet."""
        self._backbone = backbone
        self._peak: float | None = None

    def utilization(
        self, recipe: Recipe, stats: Mapping[str, float], *, seconds: float
    ) -> dict[str, float]:
        """FLOPs that the model took for a pass, and that the device could have done in its seconds.

        Neither where they are not known: for models that choose among experts, or at first for
        passes too short to be worth measuring the device.
        """
        per_token = flops_per_token(self._backbone, recipe)
        if per_token is None or (self._peak is None and seconds < _WORTH_SECONDS):
            return {}
        if self._peak is None:
            try:
                self._peak = peak(self._backbone.device, self._backbone.model.dtype)
            except torch.OutOfMemoryError:
                return {}  # The vectors are worth more than how fast they came.
        attention = flops_per_pair(self._backbone, recipe) * stats["attended_pairs"]
        done = per_token * stats["forward_tokens"] + attention
        return {"model_flops": done, "peak_flops": self._peak * seconds}


def flops_per_token(backbone: Backbone, recipe: Recipe) -> float | None:
    """Twice the weights of the blocks that are run, embeddings left out; None if not known."""
    config = backbone.model.config.get_text_config().to_dict()
    blocks = backbone.stack
    if blocks is None or any((config.get(key) or 0) > 1 for key in _EXPERTS):
        return None
    return 2.0 * sum(_weights(block) for block in list(blocks)[: _run(backbone, recipe)])


def flops_per_pair(backbone: Backbone, recipe: Recipe) -> float:
    """What it takes that one token looks at another, in all blocks that are run.

    Nothing where windows cut attention short: what is counted then is less than what is done.
    """
    config = backbone.model.config.get_text_config()
    if backbone.windows:
        return 0.0
    heads = getattr(config, "num_attention_heads", None)
    each = getattr(config, "head_dim", None)
    width = heads * each if heads and each else backbone.width
    return 4.0 * width * _run(backbone, recipe)


@torch.inference_mode()
def peak(device: torch.device, dtype: torch.dtype) -> float:
    """The FLOP/s of a large matmul on this device, at its best of some."""
    side = _SIDES.get(device.type, _SIDES["cuda"])
    # Numbers as they come: of equal ones a GPU makes more in a second than of any others.
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    until, best = time.perf_counter() + _MEASURE_SECONDS, float("inf")
    for attempt in range(32):
        _settled(device)
        started = time.perf_counter()
        one @ other
        _settled(device)
        # The first one loads the kernel.
        best = min(best, time.perf_counter() - started) if attempt else best
        if attempt and time.perf_counter() > until:
            break
    return 2.0 * side**3 / best


def _settled(device: torch.device) -> None:
    """Return once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _run(backbone: Backbone, recipe: Recipe) -> int:
    layers = (recipe.layer,) if isinstance(recipe.layer, int) else recipe.layer
    return max(one % (backbone.info.layers + 1) for one in layers)


def _weights(block: nn.Module) -> int:
    """The elements of a block's matrices that are multiplied with every token."""
    modules = (m for m in block.modules() if not isinstance(m, nn.Embedding))
    each = (p for module in modules for p in module.parameters(recurse=False))
    return sum(parameter.numel() for parameter in each if parameter.ndim == 2)
