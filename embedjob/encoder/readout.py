"""From the hidden states of views to their vectors: the pooling of a recipe.

Legend: V views, T tokens, D width.
"""

from torch import Tensor

from embedjob.encoder.backbone import Backbone
from embedjob.encoder.recovery import Vectors
from embedjob.recipe import Recipe
from embedjob.vectors.pooling import POOLINGS


class Readout:
    """What a recipe reads off a loaded model."""

    def __init__(self, backbone: Backbone, recipe: Recipe) -> None:
        """Runs nothing yet."""
        self._pool = POOLINGS[recipe.pooling]
        self.width = backbone.width

    def __call__(self, hidden_VTD: Tensor, span_VT: Tensor) -> Vectors:
        """The vectors [V, width] of views whose spans are these."""
        vectors_VD = self._pool(hidden_VTD, span_VT.to(hidden_VTD.device))
        return vectors_VD.float().cpu().numpy()
