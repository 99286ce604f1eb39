"""Model sources: where a model or an adapter is, and the local directory that it becomes."""

import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from embedjob.config.heads import module_of
from embedjob.config.recipe import HubModel, Recipe
from embedjob.config.tables import FIT_NAME
from embedjob.errors import ModelError
from embedjob.models import cache, gguf, hub, nvembed
from embedjob.models.checkpoint import (
    ADAPTER,
    BASE,
    INDEX,
    MODEL,
    TEXTS,
    CheckpointLayout,
    ModelFile,
    check_shards,
    copy,
    is_single,
    is_static_file,
    model_files,
    module_weight,
    read_json,
    weight_names,
)
from embedjob.models.tables.static_tables import may_be_static, unfitted, unpacked
from embedjob.models.tables.word_tables import TABLE_SUFFIXES
from embedjob.storage import objects

_TABLES = ", ".join(suffix for suffix in TABLE_SUFFIXES if not suffix.endswith(".gz"))
_TEXT_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja"]
_Question = ParamSpec("_Question")
_Answer = TypeVar("_Answer")
_answers: ContextVar[dict[Any, Any] | None] = ContextVar("answers", default=None)


@dataclass(frozen=True)
class ModelSource:
    """Where a model or an adapter is, and what may be run to read it.

    `modules` are directories inside the model folder that hold the weights of a recipe's heads;
    `base` is where the weights are, for an adapter that does not name its model itself.
    """

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    modules: tuple[str, ...] = ()
    layout: CheckpointLayout = MODEL
    base: "ModelSource | None" = None

    def derive(self, named: str | HubModel, layout: CheckpointLayout) -> "ModelSource":
        """Return the source of another checkpoint, with the same permissions as this source."""
        return ModelSource(
            model=named if isinstance(named, str) else named.id,
            revision=None if isinstance(named, str) else named.revision,
            trust_remote_code=self.trust_remote_code,
            allow_pickle=self.allow_pickle,
            layout=layout,
        )


def source_of(recipe: Recipe) -> ModelSource:
    """Return the source that a recipe names."""
    source = ModelSource(
        model=recipe.model,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
        allow_pickle=recipe.allow_pickle,
        modules=tuple(path for head in recipe.vector_heads if (path := module_of(head))),
    )
    return replace(source, base=source.derive(recipe.base, BASE)) if recipe.base else source


@contextmanager
def asked_once() -> Iterator[None]:
    """Ask each source at most once inside the block, and answer further questions from memory."""
    token = _answers.set({})
    try:
        yield
    finally:
        _answers.reset(token)


def _once(ask: Callable[_Question, _Answer]) -> Callable[_Question, _Answer]:
    @wraps(ask)
    def answer(*args: _Question.args, **options: _Question.kwargs) -> _Answer:
        known = _answers.get()
        if known is None:
            return ask(*args, **options)
        question = (ask, args, tuple(options.items()))
        if question not in known:
            known[question] = ask(*args, **options)
        kept: _Answer = known[question]
        return kept

    return answer


@_once
def materialize(source: ModelSource, *, tokenizer_only: bool = False) -> Path:
    """Return a local directory with config, tokenizer and, unless `tokenizer_only`, weights."""
    make = _MAKERS[source_kind(source.model, source.layout)]
    directory = make(source, tokenizer_only)
    if source.layout is MODEL and may_be_static(directory):
        # Its vectors are most of it, and say what it is.
        return make(source, False) if tokenizer_only else directory
    config = read_json(transformer_directory(directory) / source.layout.config)
    _check_config(directory, config, source)
    if not tokenizer_only:
        files = model_files(str(directory), key=source.layout.key)
        check_weights([file.name for file in files], source, files)
    return directory


@_once
def readable_files(source: ModelSource) -> list[ModelFile]:
    """List the model's files, weights included, without fetching; [] while they are on the hub."""
    layout = source.layout
    if source_kind(source.model, layout) != "hub":
        return model_files(address(source.model, layout), key=layout.key)
    try:
        local = _snapshot(source, [*_TEXT_PATTERNS, *_weight_patterns(source)], ask=False)
    except ModelError:
        return []
    files = model_files(str(local), key=layout.key)
    return files if _has_weights([file.name for file in files], source) else []


def source_kind(model: str, layout: CheckpointLayout = MODEL) -> str:
    """Return the kind of a source, a key of _MAKERS; ModelError for a path that is no model."""
    place = address(model, layout)
    if "://" in place:
        return "stored"
    if place.startswith(FIT_NAME):
        return "fit"
    path = Path(place)
    if path.is_dir():
        return "directory"
    if path.is_file() and path.suffix == ".gguf" and layout is not ADAPTER:
        return "gguf"
    if path.is_file() and is_static_file(path.name) and layout is MODEL:
        return "table"
    if path.exists() or place.startswith(("/", ".")) or path.suffix == ".gguf":
        state = "is a file" if path.exists() else "does not exist"
        or_file = "" if layout is ADAPTER else " or a .gguf file"
        or_file += f", or a table of words ({_TABLES})" if layout is MODEL else ""
        directory = "an adapter directory" if layout is ADAPTER else "a model directory"
        raise ModelError(f"{layout.key}: {model} {state}; allowed is {directory}{or_file}")
    return "hub"


def address(model: str, layout: CheckpointLayout = MODEL) -> str:
    """Return the model's path or URL, with `package:NAME/PATH` and `~` resolved."""
    if model.startswith("package:"):
        return str(_in_package(model, layout.key))
    return str(Path(model).expanduser()) if model.startswith("~") else model


def check_weights(
    names: Iterable[str], source: ModelSource, texts: Sequence[ModelFile]
) -> list[str]:
    """Return the weight files among `names`, checked against the index among `texts`.

    ModelError if there are none that may be read, or if some that the index names are missing.
    """
    names = list(names)
    weights = weight_names(
        names, allow_pickle=source.allow_pickle, model=source.model, layout=source.layout
    )
    if source.layout is not ADAPTER:
        index = next((file for file in texts if file.name.rpartition("/")[2] == INDEX), None)
        listed = None if index is None else json.loads(objects.read_bytes(index.stored.url))
        check_shards(names, listed, model=source.model)
    return weights


def module_weights(names: list[str], source: ModelSource) -> list[str]:
    """Return the weight files of the source's modules; ModelError if a module has none."""
    return [
        module_weight(
            (name for name in names if name.rpartition("/")[0] == module),
            allow_pickle=source.allow_pickle,
            module=f"{source.model}/{module}",
        )
        for module in source.modules
    ]


def pinned(source: ModelSource) -> ModelSource:
    """Return the source named so that every node reads the same: by commit, or absolute path."""
    kind = source_kind(source.model, source.layout)
    if source.model.startswith("package:") or kind in ("stored", "fit"):
        return source
    if kind != "hub":
        return replace(source, model=str(Path(address(source.model)).resolve()))
    commit = materialize(source, tokenizer_only=True).name
    return replace(source, revision=commit)


def transformer_directory(directory: Path) -> Path:
    """Return where config.json and weights are: in old sentence-transformers a level below."""
    modules = read_json(directory / "modules.json") or []
    inner = modules[0].get("path", "") if modules else ""
    return directory / inner if (directory / inner / "config.json").exists() else directory


def _has_weights(names: list[str], source: ModelSource) -> bool:
    try:
        module_weights(names, source)
    except ModelError:
        return False
    return any(source.layout.is_weight(name) or source.layout.is_pickle(name) for name in names)


def _check_config(directory: Path, config: Mapping[str, Any] | None, source: ModelSource) -> None:
    """Raise ModelError if a directory has no config, or a config that needs code not trusted."""
    layout = source.layout
    if config is None:
        names = ", ".join(sorted(path.name for path in directory.glob("*"))[:12]) or "nothing"
        raise ModelError(
            f"{layout.key}: {source.model} has no {layout.config}; found: {names}. "
            + _remedy(directory, layout)
        )
    ours = layout is ADAPTER or nvembed.is_nvembed(config)
    if ours or not config.get("auto_map") or source.trust_remote_code:
        return
    # transformers takes seconds to import, and few models bring code of their own.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if config.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise ModelError(
            f"{layout.key}: {source.model} has a model_type ({config.get('model_type')}) that only"
            " its own Python code can run; set encoder.trust_remote_code: true if you trust it"
        )


def _remedy(directory: Path, layout: CheckpointLayout) -> str:
    if layout is ADAPTER:
        return "Give a directory that a PEFT adapter was saved to"
    if (directory / ADAPTER.config).exists():
        return (
            "It is an adapter without the config of its model: give its model as encoder.model, and"
            " the adapter in encoder.adapters"
        )
    return "Give a directory that a transformers or sentence-transformers model was saved to"


def _in_package(model: str, key: str) -> Path:
    # find_spec of a top-level name runs no code of the package, which may need other libraries.
    name, _, inside = model.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    roots = list(spec.submodule_search_locations or ()) if spec else []
    if not roots:
        raise ModelError(
            f"{key}: {model}: no package {name!r} is installed; install it, or give another place"
        )
    path = Path(roots[0]) / inside
    if not path.exists():
        there = ", ".join(sorted(p.name for p in Path(roots[0]).iterdir())[:12])
        raise ModelError(f"{key}: {model}: {name} has no {inside!r}; it holds: {there}")
    return path


def _from_directory(source: ModelSource, _: bool) -> Path:
    return Path(address(source.model, source.layout))


def _from_gguf(source: ModelSource, tokenizer_only: bool) -> Path:
    return gguf.folder(Path(address(source.model)), tokenizer_only=tokenizer_only)


def _from_table(source: ModelSource, _: bool) -> Path:
    return unpacked(Path(address(source.model)))


def _from_storage(source: ModelSource, tokenizer_only: bool) -> Path:
    there = model_files(source.model, key=source.layout.key)
    names = [file.name for file in there]
    if is_single(source.model):
        wanted = set(names)
    else:
        wanted = {name for name in names if TEXTS.fullmatch(name)}
        wanted |= {name for name in names if source.trust_remote_code and name.endswith(".py")}
        if not tokenizer_only:
            wanted |= {*check_weights(names, source, there), *module_weights(names, source)}
    files = [file for file in there if file.name in wanted]
    place = cache.build_once(
        source.model, [file.version for file in files], lambda directory: copy(files, directory)
    )
    if source.model.endswith(".gguf"):
        return gguf.folder(place / names[0], tokenizer_only=tokenizer_only)
    return unpacked(place / names[0]) if is_single(source.model) else place


def _from_hub(source: ModelSource, tokenizer_only: bool) -> Path:
    patterns = [*_TEXT_PATTERNS, *(["*.py"] if source.trust_remote_code else [])]
    if tokenizer_only:
        return _snapshot(source, patterns)
    safe, *unsafe = _weight_patterns(source)
    modules = [pattern for pattern in unsafe if "/" in pattern]
    local = _snapshot(source, [*patterns, safe, *modules])
    if unsafe and not any(source.layout.is_weight(file.name) for file in model_files(str(local))):
        return _snapshot(source, [*patterns, *unsafe])
    return local


def _snapshot(source: ModelSource, patterns: Sequence[str], *, ask: bool = True) -> Path:
    return hub.snapshot(source.model, source.revision, patterns, ask=ask, key=source.layout.key)


def _weight_patterns(source: ModelSource) -> list[str]:
    """Return the patterns of the weights to fetch, also those of modules such as 2_Dense."""
    layout = source.layout
    safe = layout.safe if layout is ADAPTER else "*.safetensors"
    if not source.allow_pickle:
        return [safe]
    return [safe, layout.unsafe, *(f"{module}/pytorch_model.bin" for module in source.modules)]


_MAKERS: Mapping[str, Callable[[ModelSource, bool], Path]] = {
    "directory": _from_directory,
    "gguf": _from_gguf,
    "table": _from_table,
    "fit": lambda source, _: unfitted(),
    "stored": _from_storage,
    "hub": _from_hub,
}
