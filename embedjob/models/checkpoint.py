"""Checkpoint files of a model or an adapter, local or in storage, and which hold its weights."""

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from embedjob.errors import ModelError, amount
from embedjob.models.tables.word_tables import is_table, is_vocabulary
from embedjob.storage import objects
from embedjob.storage.objects import Stored

_COPIES_AT_ONCE = 4
# Types of numbers in safetensors that numpy has too.
_DTYPES: Mapping[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I8": "<i1",
    "I32": "<i4",
    "I64": "<i8",
    "U8": "|u1",
}
_HEADER_BYTES = 1 << 28
INDEX = "model.safetensors.index.json"
TEXTS = re.compile(r".*\.(json|txt|model|jinja)")


@dataclass(frozen=True)
class CheckpointLayout:
    """The file names of a checkpoint, and the key of the job that names its directory."""

    key: str
    what: str
    config: str
    weights: re.Pattern[str]
    pickles: re.Pattern[str]
    # The same as globs, for messages and for the hub.
    safe: str
    unsafe: str

    def is_weight(self, name: str) -> bool:
        """Tell whether a file holds the transformer's weights, not those of a module (2_Dense)."""
        folder, _, file = name.rpartition("/")
        return bool(self.weights.fullmatch(file)) and (not folder or folder.startswith("0_"))

    def is_pickle(self, name: str) -> bool:
        """Tell whether a file holds weights that can run code when they are read."""
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
    """A file of a model: its name in the model's directory, and its object in storage."""

    name: str
    stored: Stored

    @property
    def version(self) -> str:
        """A text that changes when the file's bytes may have changed."""
        return f"{self.stored.url}:{self.stored.size}:{self.stored.etag}"


def model_files(url: str, *, key: str = MODEL.key) -> list[ModelFile]:
    """List the files below a directory, or the single file of a model, at a local path or URL."""
    single = objects.stat(url) if is_single(url) else None
    if single is not None:
        return [ModelFile(PurePosixPath(single.url).name, single)]
    base = objects.absolute(url).rstrip("/") + "/"
    # The hub's cache is a folder of links.
    there = objects.list_files(url, links=True)
    files = [ModelFile(stored.url.removeprefix(base), stored) for stored in there]
    if not files:
        raise ModelError(
            f"{key}: got {url}, which is missing or empty; give a directory with files"
        )
    if outside := [file.name for file in files if ".." in file.name.split("/")]:
        raise ModelError(f"{key}: got {url}, which holds {outside[0]}, a name that leads out of it")
    return files


def is_single(name: str) -> bool:
    """Return whether a file is a whole model, by its name: .gguf, or a static table."""
    return name.endswith(".gguf") or is_static_file(name)


def is_static_file(name: str) -> bool:
    """Return whether a file is a whole static table, by its name."""
    return is_table(name) or is_vocabulary(name)


def weight_names(
    names: Iterable[str], *, allow_pickle: bool, model: str, layout: CheckpointLayout = MODEL
) -> list[str]:
    """Return the names of the files that hold the weights; ModelError if there are none."""
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
    """Raise ModelError if shards of a model's weights are missing from its files."""
    there = {PurePosixPath(name).name for name in names}
    shards = {name for name in there if MODEL.is_weight(name) and name != "model.safetensors"}
    if not shards or "model.safetensors" in there:
        return
    if index is None:
        raise ModelError(
            f"encoder.model: {model} has {amount(len(shards), 'shard')} and no {INDEX}, which says"
            " what each shard holds; copy it from where the shards come from"
        )
    missing = sorted({*map(str, index.get("weight_map", {}).values())} - there)
    if missing:
        raise ModelError(
            f"encoder.model: {model} lacks {len(missing)} of the shards that its {INDEX} names"
            f" ({', '.join(missing[:5])}); was its download cut short? Fetch them"
        )


def module_weight(names: Iterable[str], *, allow_pickle: bool, module: str) -> str:
    """Return the file that holds a module's weights; ModelError if there is none."""
    there = {PurePosixPath(name).name: name for name in sorted(names)}
    if "model.safetensors" in there:
        return there["model.safetensors"]
    if allow_pickle and "pytorch_model.bin" in there:
        return there["pytorch_model.bin"]
    listed = ", ".join(there) or "nothing"
    raise ModelError(
        f"encoder.heads: {module} has no weights (model.safetensors); found: {listed}. A pickled"
        " pytorch_model.bin, which can run code when read, needs encoder.allow_pickle: true"
    )


def copy(files: Iterable[ModelFile], to: Path) -> None:
    """Download the files into the local directory `to`, under their names."""
    with ThreadPoolExecutor(_COPIES_AT_ONCE) as pool:
        list(pool.map(lambda file: objects.download(file.stored, to / file.name), files))


def tensors_of(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file; ModelError where it is missing or cut short."""
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header: dict[str, Any] = json.loads(file.read(length if length < _HEADER_BYTES else 0))
    except (OSError, struct.error, ValueError) as error:
        raise ModelError(
            f"encoder.model: {path} cannot be read as safetensors ({error})"
        ) from error
    header.pop("__metadata__", None)
    size = 8 + length + max((one["data_offsets"][1] for one in header.values()), default=0)
    if path.stat().st_size < size:
        raise ModelError(
            f"encoder.model: {path} has {path.stat().st_size} bytes, and its header says {size};"
            " was its download cut short?"
        )
    for name, one in header.items():
        one["offset"] = 8 + length + one["data_offsets"][0]
        bytes_there = one["data_offsets"][1] - one["data_offsets"][0]
        dtype = _DTYPES.get(one["dtype"])
        if dtype and bytes_there != math.prod(one["shape"]) * np.dtype(dtype).itemsize:
            raise ModelError(f"encoder.model: {path}: {name} is not as long as its shape says")
    return header


def read_tensor(path: Path, header: Mapping[str, Any], name: str) -> npt.NDArray[Any]:
    """Return a tensor of a safetensors file, read from it as it is used; `header` by tensors_of."""
    entry = header[name]
    if entry["dtype"] not in _DTYPES:
        raise ModelError(
            f"encoder.model: {path}: {name} is {entry['dtype']}; allowed are {', '.join(_DTYPES)}."
            " Save it again in float32"
        )
    return np.memmap(
        path,
        dtype=_DTYPES[entry["dtype"]],
        mode="r",
        offset=entry["offset"],
        shape=tuple(entry["shape"]),
    )


def read_json(path: Path) -> Any:
    """Read a JSON file; None if it does not exist, ModelError if it cannot be read."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error})") from error
