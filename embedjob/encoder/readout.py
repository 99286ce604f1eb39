"""From the hidden states of views to their vectors: the pooling of a recipe, then its heads.

Legend: V views, T tokens, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from embedjob.beside import anchors_in, router_in, sparse_in
from embedjob.encoder.anchors import log_probabilities
from embedjob.encoder.backbone import Backbone
from embedjob.encoder.heads import Heads
from embedjob.encoder.routers import Routers
from embedjob.encoder.sparse import sparse_rows
from embedjob.encoder.transfers import onto
from embedjob.errors import ModelError
from embedjob.recipe import Recipe
from embedjob.text.runs import Ids
from embedjob.vectors.pooling import Pool, mean, pooler
from embedjob.vectors.sparse import Row


class Readout:
    """What a recipe reads off a loaded model.

    A reading, `width` wide, is a vector and behind it the routers' scores. They are those of the
    latest forward, which is why a reading is taken before the next one.
    """

    def __init__(self, backbone: Backbone, recipe: Recipe) -> None:
        """Loads the heads; ModelError if the model does not have them."""
        self._pool: Pool = _pool(backbone, recipe)
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
        span_VT = onto(span_VT, hidden_VTD.device)
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


def _pool(backbone: Backbone, recipe: Recipe) -> Pool:
    if recipe.pooling != "latent_attention":
        return pooler(recipe.pooling)
    if backbone.latent_attention is None:
        raise ModelError(
            f"encoder.pooling: got latent_attention, but {recipe.model} has no such layer, which"
            " NV-Embed's checkpoints have; allowed is another pooling"
        )
    return backbone.latent_attention
