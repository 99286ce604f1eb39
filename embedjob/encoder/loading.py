"""Model loading: weights through transformers, adapters merged, placed on GPUs, quantised."""

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
from embedjob.errors import ModelError, ResourceError
from embedjob.models import nvembed
from embedjob.models.architecture import T5_TYPES, check_model, config_of, info_of, is_causal
from embedjob.models.components import components_of
from embedjob.models.quiet import quiet
from embedjob.models.source import materialize, transformer_directory

DeviceMap = dict[str, int | str]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HEAD = "lm_head.weight"
# The prefix that PEFT puts before the names of the model that it wraps.
_WRAPPER = "base_model.model."
# What PEFT raises for an adapter of another model or of an unknown kind, or a file cut short.
_PEFT_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    SafetensorError,
    UnpicklingError,
)
# The share of a GPU for the weights; the rest is for the states of a micro-batch.
_WEIGHTS_SHARE = 0.9
# Layers that choose experts are small, and with rounded scores they would choose other experts.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "classifier"})


class LoadedModel(NamedTuple):
    """A model, and the weights that its pooler lacks."""

    model: PreTrainedModel
    missing: frozenset[str]


def load_model(recipe: Recipe, *, device: torch.device, gpus: int = 1) -> LoadedModel:
    """Load the recipe's model, its adapters merged, on a device or spread over several GPUs.

    Raises:
        ModelError: the model or an adapter cannot be loaded whole.
        ResourceError: the GPUs are too few or too small.
    """
    if gpus == 1:
        return load_at(recipe, device)
    directory = transformer_directory(materialize(components_of(recipe).weights))
    dtype = _dtype(recipe, on_gpu=True)
    return load_at(
        recipe, device_map(_without_weights(directory, recipe), free_memory(gpus), dtype=dtype)
    )


def load_at(recipe: Recipe, place: torch.device | DeviceMap) -> LoadedModel:
    """Load the recipe's model, its adapters merged, on a device or by a device map.

    Adapters are merged in float32 and the sum is cast once: what an adapter adds to a weight is
    often less than half a step of bfloat16, which rounding after each adapter would lose.
    """
    components = components_of(recipe)
    directory = transformer_directory(materialize(components.weights))
    check_model(recipe, info_of(config_of(directory)))
    places = None if isinstance(place, torch.device) else place
    dtype = _dtype(recipe, on_gpu=not isinstance(place, torch.device) or place.type == "cuda")
    if not components.adapters:
        model, missing = _load(directory, recipe, dtype, places)
    else:
        model, missing = _load(directory, recipe, torch.float32, None)
        for adapter in components.adapters:
            merge_adapter(model, materialize(adapter), name=adapter.model)
        _cast_weights(model, dtype)
        if places is not None:
            spread(model, places)
    if isinstance(place, torch.device):
        nn.Module.to(model, place)
    return LoadedModel(model, missing)


def _dtype(recipe: Recipe, *, on_gpu: bool) -> torch.dtype:
    auto = "bfloat16" if on_gpu else "float32"
    return DTYPES[auto if recipe.dtype == "auto" else recipe.dtype]


def _transformers_class(directory: Path, recipe: Recipe) -> tuple[Any, Any, dict[str, str]]:
    """Return the model's config, the transformers class that loads it, and its key mapping.

    The mapping renames tensors whose names in the checkpoint are not those of transformers.
    """
    written = config_of(directory)
    if nvembed.is_nvembed(written):
        renamed = {f"^{re.escape(nvembed.BACKBONE_PREFIX)}": ""}
        return MistralConfig(**nvembed.mistral_keys(written)), AutoModel, renamed
    config = AutoConfig.from_pretrained(directory, trust_remote_code=recipe.trust_remote_code)
    if recipe.reads_logits:
        return config, AutoModelForCausalLM if is_causal(written) else AutoModelForMaskedLM, {}
    return config, AutoModelForTextEncoding if config.model_type in T5_TYPES else AutoModel, {}


def _without_weights(directory: Path, recipe: Recipe) -> PreTrainedModel:
    """Return the model without its weights, to measure it."""
    config, auto, _ = _transformers_class(directory, recipe)
    with torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=recipe.trust_remote_code)
    return model  # type: ignore[no-any-return]


def _load(
    directory: Path, recipe: Recipe, dtype: torch.dtype, places: DeviceMap | None
) -> tuple[PreTrainedModel, frozenset[str]]:
    """Return the model, and the weights of its pooler that the checkpoint does not have."""
    options = {
        "dtype": dtype,
        "trust_remote_code": recipe.trust_remote_code,
        "use_safetensors": None if recipe.allow_pickle else True,
        "device_map": places,
    }
    model, missing, left = _read(directory, recipe, options)
    if tied := _tied_head(model, missing, left):
        model, missing, left = _read(directory, recipe, {**options, "key_mapping": tied})
    # transformers fills missing weights with random numbers; a pooler is seldom needed.
    pooler = frozenset(key for key in missing if "pooler" in key)
    if lacking := sorted(missing - pooler):
        raise ModelError(
            f"encoder.model: the weights of {recipe.model} lack {len(lacking)} tensors of"
            f" {type(model).__name__} ({', '.join(lacking[:3])}, ...); was the model saved whole,"
            " and does its config.json belong to it? Fetch or save it again"
        )
    return model, pooler


def _read(
    directory: Path, recipe: Recipe, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, set[str], set[str]]:
    """Return the model, its tensors without weights, and the weights without a tensor."""
    try:
        config, auto, renamed = _transformers_class(directory, recipe)
        named = {"key_mapping": renamed or None, **options}
        with quiet():
            model, report = auto.from_pretrained(
                directory, config=config, output_loading_info=True, **named
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ModelError(f"encoder.model: {recipe.model} cannot be loaded: {reason}") from error
    return model, set(report["missing_keys"]), set(report["unexpected_keys"])


def _tied_head(model: PreTrainedModel, missing: set[str], left: set[str]) -> dict[str, str] | None:
    """Return a key mapping for embeddings that were saved only as the head they are tied to."""
    embedding = model.get_input_embeddings().weight
    names = [name for name, weight in model.named_parameters() if weight is embedding]
    if missing != {*names} or not model.config.tie_word_embeddings or _HEAD not in left:
        return None
    return {f"^{_HEAD}$": f"{model.base_model_prefix}.{names[0]}"}


def _cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the weights as loading in that dtype would: buffers, such as angles, stay exact."""
    for tensor in model.parameters():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype


def merge_adapter(model: PreTrainedModel, directory: Path, *, name: str) -> None:
    """Merge the adapter in a directory into the model; ModelError unless all of it fits.

    `name` is its name in the job.
    """
    # peft takes seconds to import, and few models have adapters.
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
            # The task changes only the forward of PEFT's wrapper, which is not used.
            config.task_type, config.inference_mode = None, True
            adapted = PeftModel(_as_trained(model, tensors), config)
            expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
            _check_tensors(expected, tensors, model=model, name=name)
            set_peft_model_state_dict(adapted, tensors)
            adapted.merge_and_unload(safe_merge=True)
    except _PEFT_ERRORS as error:
        reason = " ".join(str(error).split())[:400]
        raise ModelError(
            f"encoder.adapters: {name} cannot be merged into {type(model).__name__}"
            f" ({type(error).__name__}: {reason}); was it trained on this model? Give the"
            " model that it was trained on"
        ) from error
    # With this attribute left, PEFT would warn of a second adapter at the next merge.
    vars(model).pop("peft_config", None)


def _with_embeddings(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy whole embeddings among the tensors into the model, and return the other tensors.

    PEFT saves embeddings if tokens were added, and with them the head, which is not loaded here.
    """
    table = model.get_input_embeddings()
    own = next(name for name, weight in model.named_parameters() if weight is table.weight)
    names = (f"{_WRAPPER}{own}", f"{_WRAPPER}{model.base_model_prefix}.{own}")
    name = next((candidate for candidate in names if candidate in tensors), None)
    if name is None:
        return dict(tensors)
    model.resize_token_embeddings(len(tensors[name]), mean_resizing=False)
    dict(model.named_parameters())[own].data.copy_(tensors[name])
    placed = {name, f"{_WRAPPER}{_HEAD}"}
    return {key: tensor for key, tensor in tensors.items() if key not in placed}


def _as_trained(model: PreTrainedModel, names: Iterable[str]) -> nn.Module:
    """Return the model under the names that the adapter uses: as it is, or inside a shell.

    An adapter's targets, ranks and scales are patterns over these names, and a pattern that
    matches nothing would silently fall back to a default.
    """
    prefix = model.base_model_prefix
    inside = any(name.removeprefix(_WRAPPER).startswith(f"{prefix}.") for name in names)
    if not prefix or not inside or prefix in dict(model.named_children()):
        return model
    shell = nn.ModuleDict({prefix: model})
    vars(shell)["config"] = model.config
    return shell


def _check_tensors(
    expected: Iterable[str], given: Iterable[str], *, model: PreTrainedModel, name: str
) -> None:
    """Raise ModelError unless the model's places and the adapter's tensors match one to one."""
    unplaced, absent = sorted({*given} - {*expected}), sorted({*expected} - {*given})
    for tensors, what in (
        (unplaced, f"that {type(model).__name__} has no place for"),
        (absent, "too few: its adapter_config.json asks for them"),
    ):
        if tensors:
            raise ModelError(
                f"encoder.adapters: {name} has {len(tensors)} tensors {what}"
                f" ({', '.join(tensors[:3])}{', ...' if tensors[3:] else ''}); allowed is an"
                " adapter that fits the model whole. Give the model that it was trained on"
            )


def free_memory(gpus: int) -> dict[int, int]:
    """Return the bytes for weights on each of the first GPUs; ResourceError if there are fewer."""
    visible = torch.cuda.device_count()
    if visible < gpus:
        raise ResourceError(
            f"the model is to be spread over {gpus} GPUs, and this process sees {visible}; lower"
            " pool.gpus_per_actor, or start it where it sees more"
        )
    return {gpu: int(torch.cuda.mem_get_info(gpu)[0] * _WEIGHTS_SHARE) for gpu in range(gpus)}


def device_map(
    model: PreTrainedModel, memory: Mapping[int, int], *, dtype: torch.dtype
) -> DeviceMap:
    """Return where each part of a model goes: about as much to every GPU, blocks undivided.

    The model may be on meta, without weights. ResourceError if the memory, in bytes by GPU, is not
    enough: parts left on the CPU would make every forward wait for the bus.
    """
    whole = sorted(model._no_split_modules or ())
    balanced = get_balanced_memory(model, dict(memory), no_split_module_classes=whole, dtype=dtype)
    places: DeviceMap = infer_auto_device_map(
        model, balanced, no_split_module_classes=whole, dtype=dtype
    )
    outside = sorted(name for name, place in places.items() if place not in memory)
    if outside:
        needed = int(compute_module_sizes(model, dtype=dtype)[""])
        raise ResourceError(
            f"pool.gpus_per_actor: {type(model).__name__} takes {needed / 1e9:.1f} GB in"
            f" {dtype}, and {len(memory)} GPUs have {sum(memory.values()) / 1e9:.1f} GB for it"
            f" ({', '.join(outside[:3]) or 'none of it'} have no place); ask for more GPUs, or"
            " a narrower encoder.dtype"
        )
    return places


def spread(model: PreTrainedModel, places: DeviceMap) -> None:
    """Move a loaded model's parts to their places; hooks move their inputs there."""
    skipped = model._skip_keys_device_placement
    dispatch_model(model, places, skip_keys=skipped, force_hooks=True)


def quantize_weights(blocks: nn.ModuleList | None, recipe: Recipe) -> None:
    """Quantise the weights of the linear layers in these blocks; ModelError if there are none.

    Activations are not rounded: a last bit, which differs between micro-batches, would become a
    step of 1/256, and vectors of SmolLM2 then depended on their neighbours by a cosine of 0.99.
    """
    if blocks is None or not any(_is_quantized(m, name) for name, m in blocks.named_modules()):
        raise ModelError(
            f"encoder.quantize: got {recipe.quantize}, but no linear layer is in the blocks"
            f" of {recipe.model}; set quantize: none"
        )
    from torchao.quantization import quantize_

    quantize_(blocks, _torchao_configs()[recipe.quantize], filter_fn=_is_quantized)


@contextmanager
def dequantized(model: nn.Module) -> Iterator[None]:
    """Replace a model's quantised weights by their values in float32, and restore them after."""
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


def _is_quantized(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name.rsplit(".")[-1] not in _ROUTERS


def _torchao_configs() -> dict[str, Any]:
    from torchao import quantization

    return {
        "int8": quantization.Int8WeightOnlyConfig(),
        "float8": quantization.Float8WeightOnlyConfig(),
    }
