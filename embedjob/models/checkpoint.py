"""The files of a model or an adapter, wherever they are, and which of them are its weights."""

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from embedjob.errors import ModelError
from embedjob.storage import objects
from embedjob.storage.objects import Stored

_COPIES_AT_ONCE = 4
INDEX = "model.safetensors.index.json"
TEXTS = re.compile(r".*\.(json|txt|model|jinja)")


@dataclass(frozen=True)
class CheckpointLayout:
    """What a directory holds: its config, its weights, and the job's key that names it."""

    key: str
    what: str
    config: str
    weights: re.Pattern[str]
    pickles: re.Pattern[str]
    # The same for people and for the hub, which know no regular expressions.
    safe: str
    unsafe: str

    def is_weight(self, name: str) -> bool:
        """Whether a file holds the transformer's own weights, not those of a module as 2_Dense."""
        folder, _, file = name.rpartition("/")
        return bool(self.weights.fullmatch(file)) and (not folder or folder.startswith("0_"))

    def is_pickle(self, name: str) -> bool:
        """Whether a file holds weights that can run code when they are read."""
        return bool(self.pickles.fullmatch(PurePosixPath(name).name))


MODEL = CheckpointLayout(
    key="encoder.model",
    what="model",
    config="config.json",
    weights=re.compile(r"model(-\d+-of-\d+)?\.safetensors"),
    pickles=re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin"),
    safe="model*.safetensors",
    unsafe="pytorch_model*.bin",
)
BASE = replace(MODEL, key="encoder.base")
ADAPTER = CheckpointLayout(
    key="encoder.adapters",
    what="adapter",
    config="adapter_config.json",
    weights=re.compile(r"adapter_model\.safetensors"),
    pickles=re.compile(r"adapter_model\.bin"),
    safe="adapter_model.safetensors",
    unsafe="adapter_model.bin",
)


@dataclass(frozen=True)
class ModelFile:
    """One file of a model: its name in the model's directory, and the object that it is."""

    name: str
    stored: Stored

    @property
    def version(self) -> str:
        """A text that changes when the file's bytes may have changed."""
        return f"{self.stored.url}:{self.stored.size}:{self.stored.etag}"


def model_files(url: str, *, key: str = MODEL.key) -> list[ModelFile]:
    """The files below a directory, or the one file, at a local path or URL."""
    single = objects.stat(url) if url.endswith(".gguf") else None
    if single is not None:
        return [ModelFile(PurePosixPath(single.url).name, single)]
    base = objects.absolute(url).rstrip("/") + "/"
    found = [ModelFile(one.url.removeprefix(base), one) for one in objects.list_files(url)]
    if not found:
        raise ModelError(
            f"{key}: got {url}, which is missing or empty; give a directory with files"
        )
    if outside := [file.name for file in found if ".." in file.name.split("/")]:
        raise ModelError(f"{key}: got {url}, which holds {outside[0]}, a name that leads out of it")
    return found


def weight_names(
    names: Iterable[str], *, allow_pickle: bool, model: str, layout: CheckpointLayout = MODEL
) -> list[str]:
    """Those of the names that hold the weights; ModelError saying what was found if none do."""
    names = sorted(names)
    weights = [name for name in names if layout.is_weight(name)]
    if weights:
        return weights
    pickles = [name for name in names if layout.is_pickle(name)]
    if pickles and allow_pickle:
        return pickles
    what = f"{layout.key}: {model} has no weights ({layout.safe})"
    if pickles:
        raise ModelError(
            f"{what}, only pickled ones ({', '.join(pickles)}), which can run code when read;"
            " convert them to safetensors, or set encoder.allow_pickle: true if you trust them"
        )
    found = ", ".join(names[:12]) or "nothing"
    saved = f"a directory that {'an' if layout is ADAPTER else 'a'} {layout.what} was saved to"
    raise ModelError(f"{what}; found: {found}. Give {saved}")


def check_shards(names: Iterable[str], index: Mapping[str, Any] | None, *, model: str) -> None:
    """ModelError naming the shards of a model's weights that are not among its files."""
    there = {PurePosixPath(name).name for name in names}
    shards = {name for name in there if MODEL.is_weight(name) and name != "model.safetensors"}
    if not shards or "model.safetensors" in there:
        return
    if index is None:
        raise ModelError(
            f"encoder.model: {model} has {len(shards)} shards and no {INDEX}, which says what is"
            " in which; copy it from where the shards come from"
        )
    missing = sorted({*map(str, index.get("weight_map", {}).values())} - there)
    if missing:
        raise ModelError(
            f"encoder.model: {model} lacks {len(missing)} of the shards that its {INDEX} names"
            f" ({', '.join(missing[:5])}); was its download cut short? Fetch them"
        )


def module_weight(names: Iterable[str], *, allow_pickle: bool, module: str) -> str:
    """The file among a module's own that holds its weights; ModelError if there is none."""
    there = {PurePosixPath(name).name: name for name in sorted(names)}
    if "model.safetensors" in there:
        return there["model.safetensors"]
    if allow_pickle and "pytorch_model.bin" in there:
        return there["pytorch_model.bin"]
    found = ", ".join(there) or "nothing"
    raise ModelError(
        f"encoder.heads: {module} has no weights (model.safetensors); found: {found}. A pickled"
        " pytorch_model.bin, which can run code when read, needs encoder.allow_pickle: true"
    )


def copy(files: Iterable[ModelFile], to: Path) -> None:
    """Put the files below the local directory `to`, under their names."""
    with ThreadPoolExecutor(_COPIES_AT_ONCE) as pool:
        list(pool.map(lambda f: objects.download(f.stored.url, str((to / f.name).parent)), files))
