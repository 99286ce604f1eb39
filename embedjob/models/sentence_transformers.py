"""sentence-transformers folders, and what they define, as keys of the job's config."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedjob.config.heads import kinds_of
from embedjob.config.recipe import Recipe
from embedjob.errors import ModelError
from embedjob.models import nvembed
from embedjob.models.architecture import ModelInfo, config_of, info_of
from embedjob.models.checkpoint import read_json
from embedjob.models.source import transformer_directory
from embedjob.models.tables.static_tables import static_layer, static_table
from embedjob.models.tokenizer import lowercases, read_tokenizer
from embedjob.models.tokenizer_files import read_files

# Activations by their names in torch.nn; none has weights of its own.
ACTIVATIONS = frozenset(
    {
        "CELU",
        "ELU",
        "GELU",
        "Hardshrink",
        "Hardsigmoid",
        "Hardswish",
        "Hardtanh",
        "Identity",
        "LeakyReLU",
        "LogSigmoid",
        "Mish",
        "ReLU",
        "ReLU6",
        "SELU",
        "Sigmoid",
        "SiLU",
        "Softplus",
        "Softshrink",
        "Softsign",
        "Tanh",
        "Tanhshrink",
    }
)
_EMBEDDING = "sentence_embedding"
_DEFAULT_MAX_TOKENS = 512
_UNIT: dict[str, Any] = {"normalize": True}
_POOLINGS: Mapping[str, dict[str, Any]] = {
    "cls": {"span": "first_token", "pooling": "mean"},
    "mean": {"span": "all", "pooling": "mean"},
    "max": {"span": "all", "pooling": "max"},
    "mean_sqrt_len_tokens": {"span": "all", "pooling": "mean_sqrt_len"},
    "weightedmean": {"span": "all", "pooling": "weighted_mean"},
    "lasttoken": {"span": "last_token", "pooling": "mean"},
}
# Several poolings are concatenated, all over the same span.
_PARTS: Mapping[str, str] = {
    "cls": "first",
    "lasttoken": "last",
    **{mode: keys["pooling"] for mode, keys in _POOLINGS.items() if keys["span"] == "all"},
}
# In the order in which sentence-transformers concatenates if a folder has only these flags.
_OLD_POOLINGS: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ROLE_PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}


@dataclass(frozen=True)
class ModuleShape:
    """A module's input and output width, and what a Dense module adds to its matrix."""

    wide_in: int
    wide_out: int
    bias: bool = True
    activation: str = "Identity"
    residual: bool = False


def folder_layer(directory: Path) -> dict[str, Any]:
    """Return the keys that the folder sets, as in YAML: {"encoder": {}, "roles": {role: {}}}."""
    if table := static_table(directory):
        return static_layer(directory, table)
    config = config_of(directory)
    info = info_of(config)
    encoder: dict[str, Any] = {} if info.causal else {"attention": "bidirectional"}
    if read_files(transformer_directory(directory)).cuts_left:
        encoder["truncation_side"] = "left"
    if info.max_positions and info.max_positions < _DEFAULT_MAX_TOKENS:
        encoder["max_tokens"] = info.max_positions
    if nvembed.is_nvembed(config):
        return {"encoder": encoder | _nvembed(config), "roles": {}}
    modules = read_json(directory / "modules.json")
    if not modules:
        return {"encoder": encoder, "roles": {}}
    encoder |= {"layer": -1, **_modules(modules, directory), **_max_tokens(directory, info)}
    settings = read_json(directory / "config_sentence_transformers.json") or {}
    if settings.get("similarity_fn_name"):
        encoder["similarity"] = settings["similarity_fn_name"]
    prompts = {name: text for name, text in (settings.get("prompts") or {}).items() if text}
    pooled_apart = _pools_prompts(modules, directory)
    layers = {
        name: {"templates": [_template(text)]}
        | ({} if pooled_apart else _without_prompt(encoder, text, directory))
        for name, text in prompts.items()
    }
    encoder |= layers.get(settings.get("default_prompt_name"), {})
    return {"encoder": encoder, "roles": _roles(layers)}


def vector_width(recipe: Recipe, hidden_size: int, directory: Path) -> int:
    """Return the width of a view's vector after pooling and all heads; no weights are read."""
    width = hidden_size * (len(recipe.pooling) if isinstance(recipe.pooling, tuple) else 1)
    for key, kind, head in kinds_of(recipe.heads):
        if isinstance(kind.width, int):
            width = kind.width
            continue
        shape = ModuleShape(width, width)
        if kind.width == "hidden":
            shape = ModuleShape(hidden_size, hidden_size)
        elif kind.width == "module":
            shape = _MODULE_SHAPES[key](directory / getattr(head, key))
        if shape.wide_in != width:
            raise ModelError(
                f"encoder.heads: {head.model_dump()} takes vectors {shape.wide_in} wide, but they"
                f" are {width} wide there; give a module that was made for this model and pooling"
            )
        width = shape.wide_out
    return width


def dense_shape(folder: Path) -> ModuleShape:
    """Return the shape of a Dense module; ModelError if its config asks for anything else."""
    config = module_config(folder)
    path = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = path.rpartition(".")[2]
    if not path.startswith("torch.nn.") or activation not in ACTIVATIONS:
        raise ModelError(
            f"{folder / 'config.json'}: got activation_function {path}, allowed is torch.nn's"
            f" {', '.join(sorted(ACTIVATIONS))}"
        )
    return ModuleShape(
        wide_in=_size(config, "in_features", folder),
        wide_out=_size(config, "out_features", folder),
        bias=bool(config.get("bias", True)),
        activation=activation,
        residual=bool(config.get("use_residual", False)),
    )


def layer_norm_shape(folder: Path) -> ModuleShape:
    """Return the shape of a LayerNorm module."""
    size = _size(module_config(folder), "dimension", folder)
    return ModuleShape(size, size)


def module_config(folder: Path) -> Mapping[str, Any]:
    """Read a module's config; ModelError if there is none, or it uses more than the vector."""
    config: Mapping[str, Any] | None = read_json(folder / "config.json")
    if config is None:
        raise ModelError(
            f"encoder.heads: there is no {folder / 'config.json'}; name the directory of a module"
            " that sentence-transformers saved in the model folder"
        )
    check_vector_module(config, folder)
    return config


def check_vector_module(config: Mapping[str, Any], folder: Path) -> None:
    """Raise ModelError if a module reads or writes anything but the pooled vector."""
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, _EMBEDDING):
            raise ModelError(
                f"{folder / 'config.json'}: got {key} {config[key]}, allowed is {_EMBEDDING};"
                " modules over single tokens are not available in this version"
            )


def _size(config: Mapping[str, Any], key: str, folder: Path) -> int:
    size = config.get(key)
    if not isinstance(size, int) or size < 1:
        raise ModelError(
            f"{folder / 'config.json'}: got {key} {size!r}, allowed is a whole number from 1 on"
        )
    return size


def _nvembed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what NV-Embed's own code does; its modules.json belongs to that code and says less."""
    return {
        "pooling": "latent_attention",
        "special_tokens": {
            "bos": "auto",
            "eos": "append" if config.get("add_eos", True) else "none",
        },
        "finish": [{"normalize": True}] if nvembed.normalizes(config) else [],
    }


def _modules(modules: Sequence[Mapping[str, Any]], directory: Path) -> dict[str, Any]:
    """Return the keys of a folder's modules: after the pooling heads, then a final Normalize."""
    keys: dict[str, Any] = {}
    steps: list[dict[str, Any]] = []
    for module in modules:
        name, path = str(module.get("type", "")).rpartition(".")[2], str(module.get("path", ""))
        if name in _STEPS and "pooling" in keys and "heads" not in keys:
            steps += _STEPS[name](directory / path, path)
        elif name in _MODULES:
            keys |= _MODULES[name](directory / path)
        else:
            raise ModelError(
                f"{directory / 'modules.json'}: got the module {name}, which is"
                f" not available in this version; allowed are {', '.join(_MODULES)} and, after the"
                f" pooling, {', '.join(_STEPS)}"
            )
    last = max((n for n, step in enumerate(steps, start=1) if step != _UNIT), default=0)
    heads = {"heads": steps[:last]} if last else {}
    return {**keys, **heads, "finish": [_UNIT] if steps[last:] else []}


def _transformer(folder: Path) -> dict[str, Any]:
    settings = _transformer_settings(folder)
    if settings.get("do_lower_case") and not lowercases(folder):
        raise ModelError(
            f"{folder}: do_lower_case, with a tokenizer that keeps capitals, is not available in"
            " this version"
        )
    if "message" in (settings.get("modality_config") or {}):
        raise ModelError(
            f"{folder}: modality_config: message puts texts into the tokenizer's chat template,"
            " which is not available in this version; remove message from it in a copy, and write"
            " that template into encoder.templates"
        )
    return {}


def _pooling(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json") or {}
    modes = config.get("pooling_mode") or [m for k, m in _OLD_POOLINGS.items() if config.get(k)]
    modes = [modes] if isinstance(modes, str) else (list(modes) or ["mean"])
    if unknown := [mode for mode in modes if mode not in _POOLINGS]:
        raise ModelError(
            f"{folder / 'config.json'}: got the pooling {unknown[0]}, which is not available in"
            f" this version; allowed are {', '.join(_POOLINGS)}"
        )
    if len(modes) == 1:
        return dict(_POOLINGS[modes[0]])
    return {"span": "all", "pooling": [_PARTS[mode] for mode in modes]}


def _splade(folder: Path) -> dict[str, Any]:
    """Return the sparse head; the embedding beside it is the mean state."""
    config = read_json(folder / "config.json") or {}
    head = {
        "pooling": config.get("pooling_strategy", "max"),
        "activation": config.get("activation_function", "relu"),
    }
    return {**_POOLINGS["mean"], "heads": [{"sparse_lm": head}], "similarity": "dot"}


def _dense(folder: Path, path: str) -> list[dict[str, Any]]:
    dense_shape(folder)
    return [{"dense": path}]


def _layer_norm(folder: Path, path: str) -> list[dict[str, Any]]:
    layer_norm_shape(folder)
    return [{"layer_norm": path}]


def _normalize(folder: Path, path: str) -> list[dict[str, Any]]:
    # Older releases saved it without a config.
    check_vector_module(read_json(folder / "config.json") or {}, folder)
    return [_UNIT]


def _dropout(folder: Path, path: str) -> list[dict[str, Any]]:
    """Return no step: dropout acts in training only."""
    return []


_MODULES: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    "Transformer": _transformer,
    "MLMTransformer": _transformer,
    "SpladePooling": _splade,
    "Pooling": _pooling,
}
_STEPS: Mapping[str, Callable[[Path, str], list[dict[str, Any]]]] = {
    "Dense": _dense,
    "LayerNorm": _layer_norm,
    "Normalize": _normalize,
    "Dropout": _dropout,
}


def _transformer_settings(folder: Path) -> dict[str, Any]:
    paths = sorted(folder.glob("sentence_*_config.json"))
    return read_json(paths[0]) or {} if paths else {}


def _max_tokens(directory: Path, info: ModelInfo) -> dict[str, Any]:
    inner = transformer_directory(directory)
    limit = _transformer_settings(inner).get("max_seq_length")
    if limit is None:
        limit = (read_json(inner / "tokenizer_config.json") or {}).get("model_max_length")
    limits = [int(length) for length in (limit, info.max_positions) if length is not None]
    # A tokenizer without a limit has a number of thirty digits.
    return {"max_tokens": min(limits)} if limits and min(limits) < 10**9 else {}


def _pools_prompts(modules: list[Mapping[str, Any]], directory: Path) -> bool:
    configs = [
        read_json(directory / str(module.get("path", "")) / "config.json") for module in modules
    ]
    return all((config or {}).get("include_prompt") is not False for config in configs)


def _without_prompt(encoder: Mapping[str, Any], prompt: str, directory: Path) -> dict[str, Any]:
    """Return the keys for texts with this prompt if it is read but not pooled."""
    if encoder["span"] == "last_token":
        return {}
    tokenizer = read_tokenizer(directory)
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    added = tokenizer.get_added_tokens_decoder()
    specials = {number for number, token in added.items() if token.special}
    if specials.intersection(prompt_ids[-1:]):
        raise ModelError(
            f"{directory}: the prompt {prompt!r} is left out of pooling, but it ends in a special"
            " token, which sentence-transformers counts as the tokenizer's own; remove it from"
            " the prompt in a copy of the folder"
        )
    # A prompt of blanks may have no token of its own.
    letter = tokenizer.encode("a", add_special_tokens=False).ids[0]
    opening = tokenizer.encode("a").ids.index(letter)
    weighted = {"weighted_mean": opening + len(prompt_ids)}
    pooling = "first" if encoder["span"] == "first_token" else encoder["pooling"]
    parts = [pooling] if isinstance(pooling, str) else pooling
    parts = [weighted if part == "weighted_mean" else part for part in parts]
    single = len(parts) == 1 and parts != ["first"]
    return {"span": "after_prompt", "pooling": parts[0] if single else parts}


def _roles(layers: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the keys of each role, by the first of its prompts that the folder has."""
    return {
        role: layers[name]
        for role, names in _ROLE_PROMPTS.items()
        if (name := next((prompt for prompt in names if prompt in layers), None))
    }


def _template(prompt: str) -> str:
    return prompt.replace("{", "{{").replace("}", "}}") + "{text}"


# The shape of a head that is a module in the folder, by the head's key.
_MODULE_SHAPES: Mapping[str, Callable[[Path], ModuleShape]] = {
    "dense": dense_shape,
    "layer_norm": layer_norm_shape,
}
