"""From the hidden states of views to their vectors: the pooling of a recipe, then its heads.

Legend: V views, T tokens, D width.
"""

import torch
from torch import Tensor

from embedjob.encoder.backbone import Backbone
from embedjob.encoder.heads import Heads
from embedjob.encoder.transfers import onto
from embedjob.errors import ModelError
from embedjob.recipe import Recipe
from embedjob.vectors.pooling import Pool, pooler


class Readout:
    """What a recipe reads off a loaded model; `width` is of one vector."""

    def __init__(self, backbone: Backbone, recipe: Recipe) -> None:
        """Loads the heads; ModelError if the model does not have them."""
        self._pool: Pool = _pool(backbone, recipe)
        self._heads = Heads(recipe, backbone)
        self.width = self._heads.width

    @torch.inference_mode()
    def __call__(self, hidden_VTD: Tensor, span_VT: Tensor) -> Tensor:
        """The vectors [V, width] of views whose spans are these, in float32 on the model's device.

        Nothing here may wait for the device: the next micro-batch is made meanwhile.
        """
        pooled_VD = self._pool(hidden_VTD, onto(span_VT, hidden_VTD.device))
        vectors_VD: Tensor = self._heads(pooled_VD.float())
        return vectors_VD


def _pool(backbone: Backbone, recipe: Recipe) -> Pool:
    if recipe.pooling != "latent_attention":
        return pooler(recipe.pooling)
    if backbone.latent_attention is None:
        raise ModelError(
            f"encoder.pooling: got latent_attention, but {recipe.model} has no such layer, which"
            " NV-Embed's checkpoints have; allowed is another pooling"
        )
    return backbone.latent_attention
