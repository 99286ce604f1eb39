"""What follows pooling: a model's own pooler, and the modules of a sentence-transformers folder.

Legend: V views, D width.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from embedjob.encoder.backbone import Backbone
from embedjob.encoder.modules import dense_shape, layer_norm_shape, vector_width
from embedjob.encoder.source import materialize, source_of
from embedjob.encoder.tensors import module_tensors
from embedjob.errors import ModelError
from embedjob.recipe import Dense, Head, LayerNorm, Pooler, Recipe
from embedjob.vectors.finishing import normalize


class Heads(nn.Sequential):
    """The heads of a recipe, in order and in float32; `width` is of what they give."""

    def __init__(self, recipe: Recipe, backbone: Backbone) -> None:
        """Reads their weights; ModelError if one is missing or does not fit."""
        files = any(isinstance(head, Dense | LayerNorm) for head in recipe.vector_heads)
        directory = materialize(source_of(recipe)) if files else Path()
        self.width = vector_width(recipe, backbone.width, directory)
        super().__init__(
            *(_made(head, backbone, directory, recipe) for head in recipe.vector_heads)
        )
        self.float().to(backbone.device).requires_grad_(False).eval()


class _DenseLayer(nn.Module):
    """A matrix, an activation, and the vector itself beside them where the config says so."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        shape = dense_shape(folder)
        self.linear = nn.Linear(shape.wide_in, shape.wide_out, bias=shape.bias)
        self.activation: nn.Module = getattr(nn, shape.activation)()
        self.residual: nn.Module | None = None
        if shape.residual and shape.wide_in == shape.wide_out:
            self.residual = nn.Identity()
        elif shape.residual:
            self.residual = nn.Linear(shape.wide_in, shape.wide_out, bias=False)

    def forward(self, vectors_VD: Tensor) -> Tensor:
        out_VD: Tensor = self.activation(self.linear(vectors_VD))
        return out_VD if self.residual is None else out_VD + self.residual(vectors_VD)


class _Norm(nn.Module):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(layer_norm_shape(folder).wide_in)

    def forward(self, vectors_VD: Tensor) -> Tensor:
        normed_VD: Tensor = self.norm(vectors_VD)
        return normed_VD


class _Unit(nn.Module):
    def forward(self, vectors_VD: Tensor) -> Tensor:
        return normalize(vectors_VD)


def _made(head: Head, backbone: Backbone, directory: Path, recipe: Recipe) -> nn.Module:
    if isinstance(head, Pooler):
        return _own_pooler(backbone, recipe)
    if isinstance(head, Dense):
        return _filled(_DenseLayer(directory / head.dense), directory / head.dense, recipe)
    if isinstance(head, LayerNorm):
        return _filled(_Norm(directory / head.layer_norm), directory / head.layer_norm, recipe)
    return _Unit()


def _own_pooler(backbone: Backbone, recipe: Recipe) -> nn.Module:
    """A copy in float32, so that a rescue in float32 and all else give the same."""
    if backbone.missing:
        raise ModelError(
            f"encoder.heads: pooler: the weights of {recipe.model} have no pooler"
            f" ({', '.join(sorted(backbone.missing))} missing), and a random one would be noise;"
            " use a checkpoint that was saved with it, or leave the head out"
        )
    linear, activation = _pooler_parts(backbone.model)
    if not isinstance(linear, nn.Linear) or not isinstance(activation, nn.Tanh):
        raise ModelError(
            f"encoder.heads: pooler: {type(backbone.model).__name__} has no layer of its own with"
            " a tanh over a pooled vector, as BERT and RoBERTa have it; leave the head out"
        )
    copy = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    copy.load_state_dict({name: tensor.float() for name, tensor in linear.state_dict().items()})
    return nn.Sequential(copy, nn.Tanh())


def _pooler_parts(model: PreTrainedModel) -> tuple[object, object]:
    pooler = getattr(model, "pooler", None)
    if isinstance(pooler, nn.Linear):  # ALBERT
        return pooler, getattr(model, "pooler_activation", None)
    return getattr(pooler, "dense", None), getattr(pooler, "activation", None)


def _filled(module: nn.Module, folder: Path, recipe: Recipe) -> nn.Module:
    """The module with the weights of its directory: those, all of those, and no others."""
    found = module_tensors(folder, allow_pickle=recipe.allow_pickle)
    require_tensors(found, module.state_dict(), str(folder))
    module.load_state_dict({name: tensor.float() for name, tensor in found.items()})
    return module


def require_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    """ModelError unless these tensors are there, of these shapes, and no others."""
    differ = sorted(
        name
        for name in {*found, *wanted}
        if name not in found or name not in wanted or found[name].shape != wanted[name].shape
    )
    if differ:
        raise ModelError(
            f"{where}: its weights do not fit its config.json: {', '.join(differ[:3])} are missing,"
            " too many or of another shape; was it saved whole?"
        )
