"""The modules of a sentence-transformers folder as their config.json says: sizes, no weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedjob.beside import anchors_in
from embedjob.encoder.source import read_json
from embedjob.errors import ModelError
from embedjob.readout import Dense, Head, LayerNorm, Pooler
from embedjob.recipe import Recipe

# What torch.nn calls them; none has weights of its own.
_ACTIVATIONS_WORDS = """
CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish ReLU
ReLU6 SELU Sigmoid SiLU Softplus Softshrink Softsign Tanh Tanhshrink
"""
ACTIVATIONS = frozenset(_ACTIVATIONS_WORDS.split())
_EMBEDDING = "sentence_embedding"


@dataclass(frozen=True)
class Shape:
    """A module's width before and after it, and what a Dense one adds to its matrix."""

    wide_in: int
    wide_out: int
    bias: bool = True
    activation: str = "Identity"
    residual: bool = False


def dense_shape(folder: Path) -> Shape:
    """The shape of a Dense module; ModelError if it is another, or does what no engine does."""
    config = module_config(folder)
    path = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = path.rpartition(".")[2]
    if not path.startswith("torch.nn.") or activation not in ACTIVATIONS:
        raise ModelError(
            f"{folder / 'config.json'}: got activation_function {path}, allowed is torch.nn's"
            f" {', '.join(sorted(ACTIVATIONS))}"
        )
    return Shape(
        wide_in=_size(config, "in_features", folder),
        wide_out=_size(config, "out_features", folder),
        bias=bool(config.get("bias", True)),
        activation=activation,
        residual=bool(config.get("use_residual", False)),
    )


def layer_norm_shape(folder: Path) -> Shape:
    """The shape of a LayerNorm module."""
    size = _size(module_config(folder), "dimension", folder)
    return Shape(size, size)


def module_config(folder: Path) -> Mapping[str, Any]:
    """A module's config; ModelError if it has none, or reads or writes more than the vector."""
    config: Mapping[str, Any] | None = read_json(folder / "config.json")
    if config is None:
        raise ModelError(
            f"encoder.heads: there is no {folder / 'config.json'}; name the directory of a module"
            " that sentence-transformers saved in the model folder"
        )
    require_of_the_vector(config, folder)
    return config


def require_of_the_vector(config: Mapping[str, Any], folder: Path) -> None:
    """ModelError if a module takes or gives anything but the pooled vector."""
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, _EMBEDDING):
            raise ModelError(
                f"{folder / 'config.json'}: got {key} {config[key]}, allowed is {_EMBEDDING};"
                " modules over single tokens are not available in this version"
            )


def vector_width(recipe: Recipe, hidden_size: int, directory: Path) -> int:
    """The width of a view's vector: of what is pooled, after all heads; no weights are read."""
    if anchors_in(recipe.heads):
        return 1
    found = hidden_size * (len(recipe.pooling) if isinstance(recipe.pooling, tuple) else 1)
    for head in recipe.vector_heads:
        shape = _shape(head, Shape(found, found), hidden_size, directory)
        if shape.wide_in != found:
            raise ModelError(
                f"encoder.heads: {head.model_dump()} takes vectors {shape.wide_in} wide, but they"
                f" are {found} wide there; was it made for another model or pooling?"
            )
        found = shape.wide_out
    return found


def _shape(head: Head, same: Shape, hidden_size: int, directory: Path) -> Shape:
    if isinstance(head, Dense):
        return dense_shape(directory / head.dense)
    if isinstance(head, LayerNorm):
        return layer_norm_shape(directory / head.layer_norm)
    return Shape(hidden_size, hidden_size) if isinstance(head, Pooler) else same


def _size(config: Mapping[str, Any], key: str, folder: Path) -> int:
    size = config.get(key)
    if not isinstance(size, int) or size < 1:
        raise ModelError(f"{folder / 'config.json'}: got {key} {size!r}, allowed is a size")
    return size
