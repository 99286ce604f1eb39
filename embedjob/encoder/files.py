"""The files of a model, wherever they are, and which of them are its weights."""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from embedjob import storage
from embedjob.errors import ModelError
from embedjob.storage import Stored

_COPIES_AT_ONCE = 4
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
PICKLES = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin")
TEXTS = re.compile(r".*\.(json|txt|model|jinja)")


@dataclass(frozen=True)
class ModelFile:
    """One file of a model: its name in the model's directory, and the object that it is."""

    name: str
    stored: Stored

    @property
    def version(self) -> str:
        """A text that changes when the file's bytes may have changed."""
        return f"{self.stored.url}:{self.stored.size}:{self.stored.etag}"


def model_files(url: str) -> list[ModelFile]:
    """The files below a directory, or the one file, at a local path or URL."""
    single = storage.stat(url) if url.endswith(".gguf") else None
    if single is not None:
        return [ModelFile(PurePosixPath(single.url).name, single)]
    base = storage.absolute(url).rstrip("/") + "/"
    found = [ModelFile(one.url.removeprefix(base), one) for one in storage.list_files(url)]
    if not found:
        raise ModelError(f"encoder.model: there is nothing at {url}; give a model directory there")
    if outside := [file.name for file in found if ".." in file.name.split("/")]:
        raise ModelError(f"encoder.model: {url} holds {outside[0]}, a name that leads out of it")
    return found


def weight_names(names: Iterable[str], *, allow_pickle: bool, model: str) -> list[str]:
    """Those of the names that hold the weights; ModelError saying what was found if none do."""
    names = sorted(names)
    weights = [name for name in names if is_weight(name)]
    if weights:
        return weights
    pickles = [name for name in names if PICKLES.fullmatch(PurePosixPath(name).name)]
    if pickles and allow_pickle:
        return pickles
    what = f"encoder.model: {model} has no weights (model*.safetensors)"
    if pickles:
        raise ModelError(
            f"{what}, only pickled ones ({', '.join(pickles)}), which can run code when read;"
            " convert them to safetensors, or set encoder.allow_pickle: true if you trust them"
        )
    found = ", ".join(names[:12]) or "nothing"
    raise ModelError(f"{what}; found: {found}. Give a directory that a model was saved to")


def is_weight(name: str) -> bool:
    """Whether a file holds the transformer's own weights, not those of a module like 2_Dense."""
    folder, _, file = name.rpartition("/")
    return bool(WEIGHTS.fullmatch(file)) and (not folder or folder.startswith("0_"))


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
        list(pool.map(lambda f: storage.download(f.stored.url, str((to / f.name).parent)), files))
