"""From the hidden states of views to their vectors: the pooling of a recipe, then its heads.

Legend: V views, T tokens, D width.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from embedjob.config.heads import anchors_in, router_in, sparse_in
from embedjob.config.pooling import Dense, Head, LayerNorm, Pooler
from embedjob.config.recipe import Recipe
from embedjob.encoder.backbone import Backbone
from embedjob.encoder.batching.transfers import to_device
from embedjob.encoder.outputs.likelihoods import log_probabilities
from embedjob.encoder.outputs.routers import Routers
from embedjob.encoder.outputs.sparse_lm import sparse_rows
from embedjob.encoder.weight_files import module_tensors
from embedjob.errors import ModelError
from embedjob.models.sentence_transformers import dense_shape, layer_norm_shape, vector_width
from embedjob.models.source import materialize, source_of
from embedjob.text.arrays import Ids
from embedjob.vectors.finishing import normalize
from embedjob.vectors.poolers import PoolingFunction, mean, pooler
from embedjob.vectors.sparse import Row


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


class Readout:
    """What a recipe reads off a loaded model.

    A reading, `width` wide, is a vector and behind it the routers' scores. They are those of the
    latest forward, which is why a reading is taken before the next one.
    """

    def __init__(self, backbone: Backbone, recipe: Recipe) -> None:
        """Loads the heads; ModelError if the model does not have them."""
        self._pool: PoolingFunction = _pool(backbone, recipe)
        self._heads = Heads(recipe, backbone)
        asked = router_in(recipe.heads)
        self._routers = asked and Routers(backbone.model, scores=asked.scores)
        self.router_width = self._routers.width if self._routers else 0
        self.width = self._heads.width + self.router_width
        if recipe.reads_logits and backbone.head is None:
            raise ModelError(
                "encoder.heads: sparse_lm and anchors, and encoder.decode, need the language-model"
                " head, and the model was loaded without it; load it by a recipe that asks for one"
            )
        self._head = backbone.head
        self.sparse = sparse_in(recipe.heads)
        self._scores_anchors = bool(anchors_in(recipe.heads))

    @torch.inference_mode()
    def __call__(self, hidden_VTD: Tensor, span_VT: Tensor, ids_VT: Tensor) -> Tensor:
        """The readings [V, width] of views with these spans, in float32 on the model's device.

        Nothing here may wait for the device: the next micro-batch is made meanwhile. Only latent
        attention does, twice, to run no token but those of the spans.
        """
        if self._scores_anchors:
            assert self._head is not None
            return log_probabilities(self._head, hidden_VTD, span_VT, ids_VT)
        span_VT = to_device(span_VT, hidden_VTD.device)
        vectors_VD: Tensor = self._heads(self._pool(hidden_VTD, span_VT).float())
        if self._routers:
            scores_VTE = self._routers.scores(*span_VT.shape).to(span_VT.device)
            vectors_VD = torch.cat([vectors_VD, mean(scores_VTE, span_VT)], dim=1)
        return vectors_VD

    def rows(self, hidden_VTD: Tensor, span_VT: Tensor, words: Sequence[Ids] | None) -> list[Row]:
        """The sparse entries of the same views, of these words only where they are given."""
        assert self.sparse is not None
        assert self._head is not None
        return sparse_rows(self._head, hidden_VTD, span_VT, asked=self.sparse, words=words)


def _pool(backbone: Backbone, recipe: Recipe) -> PoolingFunction:
    if recipe.pooling != "latent_attention":
        return pooler(recipe.pooling)
    if backbone.latent_attention is None:
        raise ModelError(
            f"encoder.pooling: got latent_attention, but {recipe.model} has no such layer, which"
            " NV-Embed's checkpoints have; allowed is another pooling"
        )
    return backbone.latent_attention
