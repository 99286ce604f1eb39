"""Weight files: tensors read by name from safetensors, for layers that transformers lacks."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from embedjob.errors import ModelError
from embedjob.models.checkpoint import module_weight, weight_names


def module_tensors(folder: Path, *, allow_pickle: bool) -> dict[str, Tensor]:
    """Return all tensors of a sentence-transformers module, on the CPU; ModelError if none."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    name = module_weight(names, allow_pickle=allow_pickle, module=str(folder))
    return dict(_read(folder / name, ""))


def prefixed_tensors(directory: Path, prefix: str, *, allow_pickle: bool) -> dict[str, Tensor]:
    """Return the tensors of a model whose names begin with a prefix, without it, on the CPU."""
    files = [path.name for path in directory.iterdir()]
    names = weight_names(files, allow_pickle=allow_pickle, model=str(directory))
    return {
        name.removeprefix(prefix): tensor
        for file in names
        for name, tensor in _read(directory / file, prefix)
    }


def _read(path: Path, prefix: str) -> Iterator[tuple[str, Tensor]]:
    try:
        if path.suffix != ".safetensors":
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            yield from ((name, value) for name, value in loaded.items() if name.startswith(prefix))
            return
        with safe_open(path, framework="pt") as tensors:
            names: list[str] = tensors.keys()
            chosen = (name for name in names if name.startswith(prefix))
            yield from ((name, tensors.get_tensor(name)) for name in chosen)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ModelError(
            f"{path}: cannot be read ({error}); was its download cut short? Fetch it again"
        ) from error
