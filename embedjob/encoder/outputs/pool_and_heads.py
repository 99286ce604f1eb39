"""Pooling and heads: from the hidden states of views to their vectors, by tables of loaders.

Legend: V views, T tokens, D width, E router scores.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from embedjob.config.heads import (
    Continuations,
    Dense,
    LayerNorm,
    Pooler,
    RouterHead,
    SparseHead,
    kinds_of,
)
from embedjob.config.pooling import Normalize, WordWeights
from embedjob.config.recipe import Recipe
from embedjob.config.types import Section
from embedjob.encoder.backbone import Backbone
from embedjob.encoder.batching.transfers import to_device
from embedjob.encoder.outputs.language_model import LanguageHead
from embedjob.encoder.outputs.latent_attention import load_latent_attention
from embedjob.encoder.outputs.likelihoods import log_probabilities
from embedjob.encoder.outputs.routers import Routers
from embedjob.encoder.outputs.sparse_lm import finite, sparse_rows
from embedjob.encoder.outputs.view_states import ViewStates
from embedjob.encoder.weight_files import module_tensors
from embedjob.errors import ModelError
from embedjob.models.sentence_transformers import dense_shape, layer_norm_shape, vector_width
from embedjob.models.source import materialize, source_of
from embedjob.vectors.finishing import normalize
from embedjob.vectors.poolers import PoolingFunction, mean, pooler


@dataclass(frozen=True)
class LoadedHead:
    """A head in a loaded model: the views' vectors [V, D] before it to those after it.

    `behind` is the number of scores that it puts behind the vector.
    """

    apply: Callable[[ViewStates, Tensor], Tensor]
    behind: int = 0


class DenseLayer(nn.Module):
    """A matrix, an activation, and a residual connection where the config has one."""

    def __init__(self, folder: Path) -> None:
        """Make the layer of a module directory, without its weights."""
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
        """Return the vectors after the layer [V, D]."""
        out_VD: Tensor = self.activation(self.linear(vectors_VD))
        return out_VD if self.residual is None else out_VD + self.residual(vectors_VD)


class _Norm(nn.Module):
    """A LayerNorm under the name that sentence-transformers saves it by."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(layer_norm_shape(folder).wide_in)

    def forward(self, vectors_VD: Tensor) -> Tensor:
        normed_VD: Tensor = self.norm(vectors_VD)
        return normed_VD


def _layer(module: nn.Module, backbone: Backbone) -> LoadedHead:
    """Return a layer over the vector, in float32."""
    module.float().to(backbone.device).requires_grad_(False).eval()
    return LoadedHead(lambda states, vectors_VD: module(vectors_VD))


def _dense(head: Dense, backbone: Backbone, recipe: Recipe) -> LoadedHead:
    folder = materialize(source_of(recipe)) / head.dense
    return _layer(_with_weights(DenseLayer(folder), folder, recipe), backbone)


def _layer_norm(head: LayerNorm, backbone: Backbone, recipe: Recipe) -> LoadedHead:
    folder = materialize(source_of(recipe)) / head.layer_norm
    return _layer(_with_weights(_Norm(folder), folder, recipe), backbone)


def _normalize(head: Normalize, backbone: Backbone, recipe: Recipe) -> LoadedHead:
    return LoadedHead(lambda states, vectors_VD: normalize(vectors_VD))


def _own_pooler(head: Pooler, backbone: Backbone, recipe: Recipe) -> LoadedHead:
    """Copy the model's own pooler in float32, so that a retry in float32 gives the same."""
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
    return _layer(nn.Sequential(copy, nn.Tanh()), backbone)


def _pooler_parts(model: PreTrainedModel) -> tuple[object, object]:
    pooler = getattr(model, "pooler", None)
    if isinstance(pooler, nn.Linear):  # ALBERT
        return pooler, getattr(model, "pooler_activation", None)
    return getattr(pooler, "dense", None), getattr(pooler, "activation", None)


def _with_weights(module: nn.Module, folder: Path, recipe: Recipe) -> nn.Module:
    """Load the weights of a module's directory: all that it needs, and no others."""
    tensors = module_tensors(folder, allow_pickle=recipe.allow_pickle)
    check_tensors(tensors, module.state_dict(), str(folder))
    module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return module


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    """Raise ModelError unless exactly these tensors are there, of these shapes."""
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


def _sparse(head: SparseHead, backbone: Backbone, recipe: Recipe) -> LoadedHead:
    language_head = _language_head(backbone)

    def apply(states: ViewStates, vectors_VD: Tensor) -> Tensor:
        """Write the sparse entries; a view whose entries are not finite gets a vector of NaN.

        Such a view is then retried as for its vector.
        """
        states.rows = sparse_rows(
            language_head,
            states.hidden_VTD,
            states.span_VT,
            asked=head.sparse_lm,
            words=states.words,
        )
        broken_V = torch.tensor([not finite(entries) for entries in states.rows])
        return vectors_VD.masked_fill(to_device(broken_V, vectors_VD.device)[:, None], torch.nan)

    return LoadedHead(apply)


def _routers(head: RouterHead, backbone: Backbone, recipe: Recipe) -> LoadedHead:
    routers = Routers(backbone.model, scores=head.router.scores)

    def apply(states: ViewStates, vectors_VD: Tensor) -> Tensor:
        # The scores are those of the latest forward, so they are read before the next one.
        span_VT = to_device(states.span_VT, vectors_VD.device)
        scores_VTE = routers.scores(*span_VT.shape).to(span_VT.device)
        return torch.cat([vectors_VD, mean(scores_VTE, span_VT)], dim=1)

    return LoadedHead(apply, behind=routers.width)


def _continuations(head: Continuations, backbone: Backbone, recipe: Recipe) -> LoadedHead:
    language_head = _language_head(backbone)
    return LoadedHead(lambda states, vectors_VD: log_probabilities(language_head, states))


def _language_head(backbone: Backbone) -> LanguageHead:
    if backbone.head is None:
        raise ModelError(
            "encoder.heads: sparse_lm and continuations, and encoder.decode, need the"
            " language-model head, and the model was loaded without it; load it by a recipe that"
            " asks for one"
        )
    return backbone.head


# Each kind of head, by what its config value is, to its loader.
HEAD_LOADERS: Mapping[type[Section], Callable[[Any, Backbone, Recipe], LoadedHead]] = {
    Pooler: _own_pooler,
    Dense: _dense,
    LayerNorm: _layer_norm,
    Normalize: _normalize,
    SparseHead: _sparse,
    RouterHead: _routers,
    Continuations: _continuations,
}
# Poolings with weights. Each is a module of this folder with a loader.
POOLING_LOADERS: Mapping[str, Callable[[Backbone, Recipe], PoolingFunction]] = {
    "latent_attention": load_latent_attention,
}
# Scores stand behind the vector; last comes what may make a vector NaN.
_ORDER = ("pooled", "router_logits", "logits")


class Readout:
    """A recipe's pooling and heads in a loaded model.

    It gives each view `width` numbers: its vector, and behind it `router_width` scores of routers.
    """

    def __init__(self, backbone: Backbone, recipe: Recipe) -> None:
        """Load the pooling and the heads; ModelError if the model does not have them."""
        kinds = sorted(kinds_of(recipe.heads), key=lambda found: _ORDER.index(found[1].reads))
        # A head with a width of its own takes the place of the pooled vector.
        replaced = any(isinstance(kind.width, int) for _, kind, _ in kinds)
        self._pool = None if replaced else _pooling(backbone, recipe)
        in_folder = any(kind.width == "module" for _, kind, _ in kinds)
        directory = materialize(source_of(recipe)) if in_folder else Path()
        width = vector_width(recipe, backbone.width, directory)
        if recipe.decode is not None:
            _language_head(backbone)
        self._heads = [HEAD_LOADERS[type(head)](head, backbone, recipe) for _, _, head in kinds]
        # Nothing is pooled: a row of states may have the spans of many views.
        self.takes_rows = self._pool is None
        self.router_width = sum(head.behind for head in self._heads)
        self.width = width + self.router_width

    @torch.inference_mode()
    def __call__(self, states: ViewStates) -> Tensor:
        """Return the vectors and scores [V, width] of views, in float32 on the model's device.

        Nothing here may wait for the device, as the next micro-batch is made meanwhile. Only latent
        attention and sparse entries do, to run only the tokens of the spans.
        """
        hidden_VTD = states.hidden_VTD
        vectors_VD = hidden_VTD.new_empty(len(hidden_VTD), 0)
        if self._pool is not None:
            span_VT = to_device(states.span_VT, hidden_VTD.device)
            vectors_VD = self._pool(hidden_VTD, span_VT).float()
        for head in self._heads:
            vectors_VD = head.apply(states, vectors_VD)
        return vectors_VD


def _pooling(backbone: Backbone, recipe: Recipe) -> PoolingFunction:
    if isinstance(recipe.pooling, str) and recipe.pooling in POOLING_LOADERS:
        return POOLING_LOADERS[recipe.pooling](backbone, recipe)
    assert not isinstance(recipe.pooling, WordWeights), "weights of words need a table"
    return pooler(recipe.pooling)
