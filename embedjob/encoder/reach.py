"""How what a job names is reached: a directory, a file, object storage, a package or the hub."""

import importlib.util
from pathlib import Path

from embedjob.encoder.files import ADAPTER, MODEL, Holding
from embedjob.errors import ModelError


def kind(model: str, holding: Holding = MODEL) -> str:
    """How a model is reached: directory, gguf, stored or hub; ModelError if in no way."""
    place = address(model, holding)
    if "://" in place:
        return "stored"
    path = Path(place)
    if path.is_dir():
        return "directory"
    if path.is_file() and path.suffix == ".gguf" and holding is not ADAPTER:
        return "gguf"
    if path.exists() or place.startswith(("/", ".")) or path.suffix == ".gguf":
        state = "is a file" if path.exists() else "does not exist"
        or_file = "" if holding is ADAPTER else " or a .gguf file"
        directory = "an adapter directory" if holding is ADAPTER else "a model directory"
        raise ModelError(f"{holding.key}: {model} {state}; allowed is {directory}{or_file}")
    return "hub"


def address(model: str, holding: Holding = MODEL) -> str:
    """The model's path or URL: what `package:NAME/PATH` and `~` stand for, all else as it is."""
    if model.startswith("package:"):
        return str(_in_package(model, holding.key))
    return str(Path(model).expanduser()) if model.startswith("~") else model


def _in_package(model: str, key: str) -> Path:
    # find_spec of a top-level name runs none of the package's code: it may need what is not here.
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
