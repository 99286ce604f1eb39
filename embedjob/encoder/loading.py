"""The weights of the linear layers in a model's blocks in eight bits, through torchao.

Weights alone: rounded activations turn a last bit, which differs between micro-batches, into a step
of 1/256, and vectors of SmolLM2 then depended on their neighbours by a cosine of 0.99.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import compute_module_sizes, get_balanced_memory
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForTextEncoding,
    MistralConfig,
    PreTrainedModel,
)

from embedjob.config.recipe import Recipe
from embedjob.encoder.outputs.latent_attention import LatentAttention
from embedjob.encoder.tensors import prefixed_tensors
from embedjob.errors import ModelError, ResourceError
from embedjob.models import nvembed
from embedjob.models.architecture import T5_TYPES, check_model, config_of, info_of, is_causal
from embedjob.models.components import components_of
from embedjob.models.quiet import quiet
from embedjob.models.source import materialize, transformer_directory

DeviceMap = dict[str, int | str]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoadedModel(NamedTuple):
    """A model, the weights that its pooler lacks, and the latent attention that came with it."""

    model: PreTrainedModel
    missing: frozenset[str]
    latent_attention: LatentAttention | None


def load_model(recipe: Recipe, *, device: torch.device, gpus: int = 1) -> LoadedModel:
    """The recipe's model, its adapters merged, on a device or spread over several GPUs.

    ModelError if it cannot be loaded whole, ResourceError if the GPUs are too few or too small.
    """
    if gpus == 1:
        return load_at(recipe, device)
    directory = transformer_directory(materialize(components_of(recipe).weights))
    dtype = _dtype(recipe, on_gpu=True)
    return load_at(recipe, device_map(_empty(directory, recipe), free_memory(gpus), dtype=dtype))


def load_at(recipe: Recipe, place: torch.device | DeviceMap) -> LoadedModel:
    """The recipe's model, its adapters merged, on a device or with each part where it is told.

    Adapters are merged in float32 and cast once at the end: what an adapter adds to a weight is
    often less than half a step of bfloat16, and rounding after each one would lose it.
    """
    made_of = components_of(recipe)
    directory = transformer_directory(materialize(made_of.weights))
    check_model(recipe, info_of(config_of(directory)))
    places = None if isinstance(place, torch.device) else place
    dtype = _dtype(recipe, on_gpu=not isinstance(place, torch.device) or place.type == "cuda")
    if not made_of.adapters:
        model, missing = _load(directory, recipe, dtype, places)
    else:
        model, missing = _load(directory, recipe, torch.float32, None)
        for adapter in made_of.adapters:
            merge(model, materialize(adapter), name=adapter.model)
        _narrow(model, dtype)
        if places is not None:
            spread(model, places)
    if isinstance(place, torch.device):
        nn.Module.to(model, place)
    return LoadedModel(model, missing, _latent_attention(directory, recipe, model, dtype))


def _dtype(recipe: Recipe, *, on_gpu: bool) -> torch.dtype:
    auto = "bfloat16" if on_gpu else "float32"
    return DTYPES[auto if recipe.dtype == "auto" else recipe.dtype]


def _auto(directory: Path, recipe: Recipe) -> tuple[Any, Any, dict[str, str]]:
    """The model's config, the transformers class that makes it, and new names.

    The names are of tensors that are not called as transformers calls them.
    """
    written = config_of(directory)
    if nvembed.is_nvembed(written):
        renamed = {f"^{re.escape(nvembed.BACKBONE_PREFIX)}": ""}
        return MistralConfig(**nvembed.mistral_keys(written)), AutoModel, renamed
    config = AutoConfig.from_pretrained(directory, trust_remote_code=recipe.trust_remote_code)
    if recipe.reads_logits:
        return config, AutoModelForCausalLM if is_causal(written) else AutoModelForMaskedLM, {}
    return config, AutoModelForTextEncoding if config.model_type in T5_TYPES else AutoModel, {}


def _empty(directory: Path, recipe: Recipe) -> PreTrainedModel:
    """The model without its weights, to measure it."""
    config, auto, _ = _auto(directory, recipe)
    with torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=recipe.trust_remote_code)
    return model  # type: ignore[no-any-return]


def _load(
    directory: Path, recipe: Recipe, dtype: torch.dtype, places: DeviceMap | None
) -> tuple[PreTrainedModel, frozenset[str]]:
    """The model, and the weights of its pooler that the checkpoint does not have."""
    how = {
        "dtype": dtype,
        "trust_remote_code": recipe.trust_remote_code,
        "use_safetensors": None if recipe.allow_pickle else True,
        "device_map": places,
    }
    model, missing, left = _read(directory, recipe, how)
    if tied := _tied(model, missing, left):
        model, missing, left = _read(directory, recipe, {**how, "key_mapping": tied})
    # transformers fills what is missing with random numbers; a pooler is seldom asked for.
    pooler = frozenset(key for key in missing if "pooler" in key)
    if lacking := sorted(missing - pooler):
        raise ModelError(
            f"encoder.model: the weights of {recipe.model} lack {len(lacking)} tensors of"
            f" {type(model).__name__} ({', '.join(lacking[:3])}, ...); was the model saved whole,"
            " and does its config.json belong to it?"
        )
    return model, pooler


def _read(
    directory: Path, recipe: Recipe, how: Mapping[str, Any]
) -> tuple[PreTrainedModel, set[str], set[str]]:
    """The model, the tensors that it has no weights for, and the weights it has no tensor for."""
    try:
        config, auto, renamed = _auto(directory, recipe)
        named = {"key_mapping": renamed or None, **how}
        with quiet():
            model, report = auto.from_pretrained(
                directory, config=config, output_loading_info=True, **named
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ModelError(f"encoder.model: {recipe.model} cannot be loaded: {reason}") from error
    return model, set(report["missing_keys"]), set(report["unexpected_keys"])


def _tied(model: PreTrainedModel, missing: set[str], left: set[str]) -> dict[str, str] | None:
    """How to name a head's weights that are the embeddings too, where only the head was saved."""
    embedding = model.get_input_embeddings().weight
    names = [name for name, one in model.named_parameters() if one is embedding]
    if missing != {*names} or not model.config.tie_word_embeddings or HEAD not in left:
        return None
    return {f"^{HEAD}$": f"{model.base_model_prefix}.{names[0]}"}


def _latent_attention(
    directory: Path, recipe: Recipe, model: PreTrainedModel, dtype: torch.dtype
) -> LatentAttention | None:
    config = config_of(directory)
    if recipe.pooling != "latent_attention" or not nvembed.is_nvembed(config):
        return None
    prefix, pickles = nvembed.LATENT_PREFIX, recipe.allow_pickle
    tensors = prefixed_tensors(directory, prefix, allow_pickle=pickles)
    # Where the states of a spread model come out, too.
    device = next(model.get_input_embeddings().parameters()).device
    return LatentAttention(tensors, nvembed.latent_sizes(config), device=device, dtype=dtype)


def _narrow(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts the weights as loading in that dtype would: buffers, such as angles, stay exact."""
    for tensor in model.parameters():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype


HEAD = "lm_head.weight"
# What PEFT puts before the names of the model that it wraps.
_WRAPPER = "base_model.model."
# What PEFT raises over an adapter of another model, of a kind that it does not know, or cut short.
_TROUBLES = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    SafetensorError,
    UnpicklingError,
)


def merge(model: PreTrainedModel, directory: Path, *, name: str) -> None:
    """Merges the adapter in a directory into the model; ModelError unless all of it fits.

    `name` is what the job calls it.
    """
    # It takes seconds to import, and few models have adapters.
    from peft import (
        PeftConfig,
        PeftModel,
        get_peft_model_state_dict,
        load_peft_weights,
        set_peft_model_state_dict,
    )

    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = PeftConfig.from_pretrained(str(directory))
            tensors = _with_embeddings(model, load_peft_weights(str(directory), device="cpu"))
            # The task only chooses what a wrapper's own forward does.
            config.task_type, config.inference_mode = None, True
            adapted = PeftModel(_as_trained(model, tensors), config)
            expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
            _check_tensors(expected, tensors, model=model, name=name)
            set_peft_model_state_dict(adapted, tensors)
            adapted.merge_and_unload(safe_merge=True)
    except _TROUBLES as error:
        reason = " ".join(str(error).split())[:400]
        raise ModelError(
            f"encoder.adapters: {name} cannot be merged into {type(model).__name__}"
            f" ({type(error).__name__}: {reason}); was it trained on this model?"
        ) from error
    # Else the next one would be told that it is the second.
    vars(model).pop("peft_config", None)


def _with_embeddings(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are left once whole embeddings among them are in the model.

    PEFT saves these where tokens were added, and the head's beside them, which is not loaded here.
    """
    table = model.get_input_embeddings()
    own = next(name for name, one in model.named_parameters() if one is table.weight)
    names = (f"{_WRAPPER}{own}", f"{_WRAPPER}{model.base_model_prefix}.{own}")
    name = next((one for one in names if one in tensors), None)
    if name is None:
        return dict(tensors)
    model.resize_token_embeddings(len(tensors[name]), mean_resizing=False)
    dict(model.named_parameters())[own].data.copy_(tensors[name])
    placed = {name, f"{_WRAPPER}{HEAD}"}
    return {key: one for key, one in tensors.items() if key not in placed}


def _as_trained(model: PreTrainedModel, names: Iterable[str]) -> nn.Module:
    """The model under the names that the adapter knows: as it is, or inside one with a head.

    An adapter's targets, ranks and scales are patterns over these names, and a pattern that
    matches nothing would silently fall back to a default.
    """
    prefix = model.base_model_prefix
    inside = any(one.removeprefix(_WRAPPER).startswith(f"{prefix}.") for one in names)
    if not prefix or not inside or prefix in dict(model.named_children()):
        return model
    shell = nn.ModuleDict({prefix: model})
    vars(shell)["config"] = model.config
    return shell


def _check_tensors(
    expected: Iterable[str], found: Iterable[str], *, model: PreTrainedModel, name: str
) -> None:
    """ModelError unless the model has a place for every tensor, and a tensor for every place."""
    unplaced, absent = sorted({*found} - {*expected}), sorted({*expected} - {*found})
    for tensors, what in (
        (unplaced, f"that {type(model).__name__} has no place for"),
        (absent, "too few: its adapter_config.json asks for them"),
    ):
        if tensors:
            raise ModelError(
                f"encoder.adapters: {name} has {len(tensors)} tensors {what}"
                f" ({', '.join(tensors[:3])}{', ...' if tensors[3:] else ''}); allowed is an"
                " adapter all of which goes into the model. Give the model that it was trained on"
            )


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
