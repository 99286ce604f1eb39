"""The encoder of token views: micro-batches through a model to finished embeddings.

Legend: R texts, V views, T tokens, D width.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from embedjob.config.recipe import Recipe, Role
from embedjob.encoder.attention.packing import Packing
from embedjob.encoder.attention.shared_prefix import Prefixes
from embedjob.encoder.backbone import Backbone, require_one_model
from embedjob.encoder.batching.budget import WORTH_MEASURING, measured_budget, search_for
from embedjob.encoder.batching.encode_all import ChunkCallbacks, encode_distinct
from embedjob.encoder.batching.flops import Meter
from embedjob.encoder.batching.forward import Loaded
from embedjob.encoder.batching.padding import Side
from embedjob.encoder.batching.scheduler import raising_device_lost
from embedjob.encoder.intervention_hooks import InterventionHooks
from embedjob.encoder.method_recipes import MethodRecipes
from embedjob.encoder.outputs.assemble import encoded
from embedjob.encoder.outputs.pool_and_heads import Readout
from embedjob.text.views import TokenViews
from embedjob.vectors.encoded import Encoded
from embedjob.vectors.finishing import NO_FITS
from embedjob.vectors.fits.fitted import Fitted


class ViewEncoder:
    """A loaded model under the recipes of one method, for token views."""

    def __init__(
        self,
        backbone: Backbone,
        recipe: Recipe,
        *,
        recipes: Mapping[Role, Recipe] | None = None,
        fitted: Mapping[str, Fitted] = NO_FITS,
        tokens_per_microbatch: Literal["auto"] | int = "auto",
        padding_side: Side | Literal["none"] = "right",
    ) -> None:
        """Take a loaded model; `Encoder.from_recipe` loads one.

        On a GPU views go without padding where that is as good, for a side of "none" anywhere.
        `fitted` is what the fits of finishing steps left, by the sha256 that a step names.
        """
        self.backbone = backbone
        self._prefixes = Prefixes(backbone)
        wanted = {"none": True, "left": False}.get(padding_side)
        self._packing = Packing(self._prefixes, wanted=wanted)
        self._meter = Meter(backbone)
        self.recipes = MethodRecipes(recipe, recipes)
        self._readouts: dict[tuple[Any, ...], Readout] = {}
        self._readout(recipe)
        for other in self.recipes:
            require_one_model(other, recipe)
        self._fitted = fitted
        # None until it is found.
        self._budget = None if tokens_per_microbatch == "auto" else tokens_per_microbatch
        self._side: Side = "left" if padding_side == "left" else "right"
        self._hooks = {
            one.role: InterventionHooks(self._prefixes, one, side=self._side)
            for one in self.recipes
        }

    @raising_device_lost()
    def encode_views(
        self,
        views: TokenViews,
        *,
        stop: Callable[[], bool] = lambda: False,
        on_progress: Callable[[int, int], None] = lambda texts, tokens: None,
        role: Role | None = None,
    ) -> Encoded:
        """Return the embeddings of the views' texts, and why some of them have none.

        Equal views go through the model once. `stop` is asked between micro-batches, and answers
        with InterruptedRunError; `on_progress` is told the texts and tokens done so far. A device
        that answers nothing more raises DeviceLostError, and its process can only end.
        """
        recipe = self.recipes.of(role)
        loaded = self._loaded(recipe)
        budget = self._budget_for(views, loaded)
        callbacks, started = ChunkCallbacks(stop, on_progress), time.monotonic()
        passed = encode_distinct(views, loaded, budget=budget, callbacks=callbacks)
        if passed.budget < budget:
            self._budget = passed.budget
        router_width = loaded.readout.router_width
        outputs = encoded(passed, views, recipe, router_width=router_width, fitted=self._fitted)
        seconds = time.monotonic() - started - passed.stats["copy_seconds"]
        stats = {"compute_seconds": seconds, "tokens_per_microbatch": passed.budget}
        stats |= self._meter.utilization(recipe, passed.stats, seconds=seconds)
        return replace(outputs, stats={**outputs.stats, **stats})

    def _loaded(self, recipe: Recipe) -> Loaded:
        return Loaded(
            prefixes=self._prefixes,
            packing=self._packing,
            readout=self._readout(recipe),
            recipe=recipe,
            side=self._side,
            hooks=self._hooks[recipe.role],
        )

    def _budget_for(self, views: TokenViews, loaded: Loaded) -> int:
        """Return the token budget of a micro-batch, measured where the views have enough tokens."""
        if self._budget is not None:
            return self._budget
        # A view without a span is not run.
        full = views.span[:, 0] < views.span[:, 1]
        if views.lengths[full].sum() < WORTH_MEASURING:
            return search_for(self.backbone.device).default
        self._budget = measured_budget(views, loaded)
        return self._budget

    def _readout(self, recipe: Recipe) -> Readout:
        # Roles with the same pooling and heads share the weights of these.
        key = (recipe.pooling, recipe.heads, recipe.decode)
        if key not in self._readouts:
            self._readouts[key] = Readout(self.backbone, recipe)
        return self._readouts[key]
