"""A model that is too large for one GPU, spread over several, some of its blocks on each."""

from collections.abc import Mapping

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import compute_module_sizes, get_balanced_memory
from transformers import PreTrainedModel

from embedjob.errors import ResourceError

DeviceMap = dict[str, int | str]
# What the weights may take of a GPU; the rest is for the states of a micro-batch.
_SHARE = 0.9


def free_memory(gpus: int) -> dict[int, int]:
    """The free bytes of the first so many GPUs; ResourceError if there are fewer."""
    there = torch.cuda.device_count()
    if there < gpus:
        raise ResourceError(
            f"the model is to be spread over {gpus} GPUs, and this process sees {there}; lower"
            " pool.gpus_per_actor, or start it where it sees more"
        )
    return {gpu: int(torch.cuda.mem_get_info(gpu)[0] * _SHARE) for gpu in range(gpus)}


def device_map(
    model: PreTrainedModel, memory: Mapping[int, int], *, dtype: torch.dtype
) -> DeviceMap:
    """Where each part of a model goes, about as much to every GPU and no block in two places.

    The model may be without weights, on meta. ResourceError if the memory, in bytes by GPU, is not
    enough: what other programs would leave to the CPU makes every forward wait for the bus.
    """
    whole = sorted(model._no_split_modules or ())
    balanced = get_balanced_memory(model, dict(memory), no_split_module_classes=whole, dtype=dtype)
    found: DeviceMap = infer_auto_device_map(
        model, balanced, no_split_module_classes=whole, dtype=dtype
    )
    outside = sorted(name for name, place in found.items() if place not in memory)
    if outside:
        needed = int(compute_module_sizes(model, dtype=dtype)[""])
        raise ResourceError(
            f"pool.gpus_per_actor: {type(model).__name__} takes {needed / 1e9:.1f} GB in"
            f" {dtype}, and {len(memory)} GPUs have {sum(memory.values()) / 1e9:.1f} GB for it"
            f" ({', '.join(outside[:3]) or 'none of it'} found no place); ask for more GPUs, or"
            " a narrower encoder.dtype"
        )
    return found


def spread(model: PreTrainedModel, places: DeviceMap) -> None:
    """Moves a loaded model's parts to their places; their inputs will follow them."""
    skipped = model._skip_keys_device_placement
    dispatch_model(model, places, skip_keys=skipped, force_hooks=True)
