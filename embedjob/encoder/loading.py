"""From a recipe to a transformers model on its device: weights, adapters, dtype, place."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForTextEncoding,
    MistralConfig,
    PreTrainedModel,
)

from embedjob.encoder import nvembed
from embedjob.encoder.adapters import HEAD, merge
from embedjob.encoder.facts import T5_TYPES, config_of, facts_of, is_causal, require_fit
from embedjob.encoder.ingredients import ingredients_of
from embedjob.encoder.latent_attention import LatentAttention
from embedjob.encoder.placement import DeviceMap, device_map, free_memory, spread
from embedjob.encoder.quiet import quiet
from embedjob.encoder.source import materialize, transformer_directory
from embedjob.encoder.tensors import prefixed_tensors
from embedjob.errors import ModelError
from embedjob.recipe import Recipe

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
    directory = transformer_directory(materialize(ingredients_of(recipe).weights))
    dtype = _dtype(recipe, on_gpu=True)
    return load_at(recipe, device_map(_empty(directory, recipe), free_memory(gpus), dtype=dtype))


def load_at(recipe: Recipe, place: torch.device | DeviceMap) -> LoadedModel:
    """The recipe's model, its adapters merged, on a device or with each part where it is told.

    Adapters are merged in float32 and cast once at the end: what an adapter adds to a weight is
    often less than half a step of bfloat16, and rounding after each one would lose it.
    """
    made_of = ingredients_of(recipe)
    directory = transformer_directory(materialize(made_of.weights))
    require_fit(recipe, facts_of(config_of(directory)))
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
