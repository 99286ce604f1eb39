"""PEFT adapters, merged into the weights of a loaded model."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from embedjob.encoder.quiet import quiet
from embedjob.errors import ModelError

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
            _require_all(expected, tensors, model=model, name=name)
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


def _require_all(
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
