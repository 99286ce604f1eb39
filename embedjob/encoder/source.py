"""Where a model comes from, and the local directory that it becomes."""

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from embedjob.encoder import cache, gguf_file, hub, nvembed
from embedjob.encoder.files import (
    PICKLES,
    TEXTS,
    ModelFile,
    copy,
    is_weight,
    model_files,
    module_weight,
    weight_names,
)
from embedjob.errors import ModelError
from embedjob.recipe import Dense, Head, LayerNorm, Recipe

_TEXT_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class ModelSource:
    """Where a model's weights are, what may be run to read them, and the modules that go with it.

    `modules` are directories inside the model folder, whose weights a recipe's heads are.
    """

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    modules: tuple[str, ...] = ()


def source_of(recipe: Recipe) -> ModelSource:
    """The source that a recipe names."""
    return ModelSource(
        model=recipe.model,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
        allow_pickle=recipe.allow_pickle,
        modules=tuple(path for head in recipe.vector_heads if (path := module_path(head))),
    )


def module_path(head: Head) -> str | None:
    """The directory of a head that is a module; None if it is none."""
    if isinstance(head, Dense):
        return head.dense
    return head.layer_norm if isinstance(head, LayerNorm) else None


def kind(model: str) -> str:
    """How a model is reached: directory, gguf, stored or hub; ModelError if in no way."""
    place = address(model)
    if "://" in place:
        return "stored"
    path = Path(place)
    if path.is_dir():
        return "directory"
    if path.is_file() and path.suffix == ".gguf":
        return "gguf"
    if path.exists() or place.startswith(("/", ".")) or path.suffix == ".gguf":
        state = "is a file" if path.exists() else "does not exist"
        raise ModelError(
            f"encoder.model: {model} {state}; allowed is a model directory or a .gguf file"
        )
    return "hub"


def address(model: str) -> str:
    """The model's path or URL: what `package:NAME/PATH` and `~` stand for, all else as it is."""
    if model.startswith("package:"):
        return str(_in_package(model))
    return str(Path(model).expanduser()) if model.startswith("~") else model


def materialize(source: ModelSource, *, tokenizer_only: bool = False) -> Path:
    """The local directory with config.json, tokenizer and, unless told otherwise, the weights."""
    directory = _MAKERS[kind(source.model)](source, tokenizer_only)
    _require_config(directory, source)
    if not tokenizer_only:
        require_weights([file.name for file in model_files(str(directory))], source)
    return directory


def files_at_hand(source: ModelSource) -> list[ModelFile]:
    """The model's files, weights included, that can be read now; [] while they are on the hub."""
    if kind(source.model) != "hub":
        return model_files(address(source.model))
    weights = ["*.safetensors", *(["pytorch_model*.bin"] if source.allow_pickle else [])]
    patterns = [*_TEXT_PATTERNS, *weights, *_pickled_modules(source)]
    try:
        here = hub.snapshot(source.model, source.revision, patterns, ask=False)
    except ModelError:
        return []
    files = model_files(str(here))
    return files if _held([file.name for file in files], source) else []


def _held(names: list[str], source: ModelSource) -> bool:
    try:
        module_weights(names, source)
    except ModelError:
        return False
    return any(is_weight(name) or PICKLES.search(name) for name in names)


def require_weights(names: list[str], source: ModelSource) -> list[str]:
    """The names of the weight files among `names`; ModelError if there are none to be used."""
    return weight_names(names, allow_pickle=source.allow_pickle, model=source.model)


def module_weights(names: list[str], source: ModelSource) -> list[str]:
    """The weight files among `names` of the source's modules; ModelError if one has none."""
    return [
        module_weight(
            (name for name in names if name.rpartition("/")[0] == module),
            allow_pickle=source.allow_pickle,
            module=f"{source.model}/{module}",
        )
        for module in source.modules
    ]


def pinned(source: ModelSource) -> ModelSource:
    """The source named so that every node reads the same: a commit, or a path from the root."""
    if source.model.startswith("package:") or kind(source.model) == "stored":
        return source
    if kind(source.model) != "hub":
        return replace(source, model=str(Path(address(source.model)).resolve()))
    commit = materialize(source, tokenizer_only=True).name
    return replace(source, revision=commit)


def transformer_directory(directory: Path) -> Path:
    """Where config.json and the weights are: old sentence-transformers keep them a level down."""
    modules = read_json(directory / "modules.json") or []
    inner = modules[0].get("path", "") if modules else ""
    return directory / inner if (directory / inner / "config.json").exists() else directory


def read_json(path: Path) -> Any:
    """What is in a JSON file; None if there is no such file, ModelError if it cannot be read."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error})") from error


def _in_package(model: str) -> Path:
    # find_spec of a top-level name runs none of the package's code: it may need what is not here.
    name, _, inside = model.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    roots = list(spec.submodule_search_locations or ()) if spec else []
    if not roots:
        raise ModelError(
            f"encoder.model: {model}: no package {name!r} is installed; install it, or give"
            " another model"
        )
    path = Path(roots[0]) / inside
    if not path.exists():
        there = ", ".join(sorted(p.name for p in Path(roots[0]).iterdir())[:12])
        raise ModelError(f"encoder.model: {model}: {name} has no {inside!r}; it holds: {there}")
    return path


def _from_directory(source: ModelSource, _: bool) -> Path:
    return Path(address(source.model))


def _from_gguf(source: ModelSource, tokenizer_only: bool) -> Path:
    return gguf_file.folder(Path(address(source.model)), tokenizer_only=tokenizer_only)


def _from_storage(source: ModelSource, tokenizer_only: bool) -> Path:
    found = model_files(source.model)
    names = [file.name for file in found]
    if source.model.endswith(".gguf"):
        wanted = set(names)
    else:
        wanted = {name for name in names if TEXTS.fullmatch(name)}
        wanted |= {name for name in names if source.trust_remote_code and name.endswith(".py")}
        if not tokenizer_only:
            wanted |= {*require_weights(names, source), *module_weights(names, source)}
    files = [file for file in found if file.name in wanted]
    place = cache.made_once(
        source.model, [file.version for file in files], lambda directory: copy(files, directory)
    )
    if source.model.endswith(".gguf"):
        return gguf_file.folder(place / names[0], tokenizer_only=tokenizer_only)
    return place


def _from_hub(source: ModelSource, tokenizer_only: bool) -> Path:
    patterns = [*_TEXT_PATTERNS, *(["*.py"] if source.trust_remote_code else [])]
    if tokenizer_only:
        return hub.snapshot(source.model, source.revision, patterns)
    patterns += _pickled_modules(source)
    safe = hub.snapshot(source.model, source.revision, [*patterns, "*.safetensors"])
    if source.allow_pickle and not any(is_weight(file.name) for file in model_files(str(safe))):
        return hub.snapshot(source.model, source.revision, [*patterns, "pytorch_model*.bin"])
    return safe


def _pickled_modules(source: ModelSource) -> list[str]:
    return [f"{one}/pytorch_model.bin" for one in source.modules if source.allow_pickle]


_MAKERS: Mapping[str, Callable[[ModelSource, bool], Path]] = {
    "directory": _from_directory,
    "gguf": _from_gguf,
    "stored": _from_storage,
    "hub": _from_hub,
}


def _require_config(directory: Path, source: ModelSource) -> None:
    config = read_json(transformer_directory(directory) / "config.json")
    if config is None:
        found = ", ".join(sorted(path.name for path in directory.glob("*"))[:12]) or "nothing"
        raise ModelError(
            f"encoder.model: {source.model} has no config.json; found: {found}. Give a directory"
            " that a transformers or sentence-transformers model was saved to"
        )
    ours = nvembed.is_nvembed(config)
    if ours or not config.get("auto_map") or source.trust_remote_code:
        return
    # transformers takes seconds to import, and few models bring code of their own.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if config.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise ModelError(
            f"encoder.model: {source.model} is of a kind ({config.get('model_type')}) that only its"
            " own Python code can run; set encoder.trust_remote_code: true if you trust it"
        )
