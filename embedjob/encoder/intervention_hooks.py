"""What a recipe does to the states inside a model: hooks, put in for one micro-batch.

Legend: V views, T tokens, D width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embedjob.config.interventions import Contrast, Prepend
from embedjob.config.recipe import Recipe
from embedjob.encoder.attention.shared_prefix import Prefixes
from embedjob.encoder.backbone import Backbone
from embedjob.encoder.batching.padding import MicroBatch, Side, assemble
from embedjob.encoder.batching.transfers import to_device
from embedjob.errors import ModelError
from embedjob.text.arrays import Ints
from embedjob.text.views import TokenViews

# Where in a block the heads of its attention are brought together, by architecture.
_PROJECTIONS_WORDS = """
self_attn.o_proj self_attn.out_proj self_attn.dense attention.dense self_attention.dense
attn.c_proj attn.out_proj attn.o_proj attention.o_proj attn.attention.out_proj
"""
PROJECTIONS = tuple(_PROJECTIONS_WORDS.split())
Places = tuple[Tensor, Tensor]


class _Captured(Exception):
    """What the auxiliary run was for is there."""


class InterventionHooks:
    """The interventions of one recipe in a loaded model; those of most recipes are none."""

    def __init__(self, prefixes: Prefixes, recipe: Recipe, *, side: Side) -> None:
        """ModelError if the model has no place for them."""
        self._prefixes = prefixes
        self._backbone = prefixes.backbone
        self._side = side
        self._prepend, self._contrast = recipe.prepend, recipe.contrast
        self._blocks = _blocks(self._backbone) if recipe.interventions else nn.ModuleList()
        if self._prepend and self._prepend.embedding is None:
            self._embeds: Any = self._backbone.model.get_input_embeddings()
            self._row_D = _row(self._embeds, self._prepend.seed)
        if self._contrast:
            self._projection = _projection(self._blocks[self._contrast.layer], self._backbone)

    @contextmanager
    def over(
        self, views: TokenViews, chosen: Ints, batch: MicroBatch, *, skip: int = 0
    ) -> Iterator[None]:
        """Within it the chosen views' micro-batch, without its first `skip` tokens, is steered.

        The ids at slots of drawn embeddings are taken out of it: the model may embed none such.
        """
        with ExitStack() as hooks:
            if self._contrast:
                assert views.auxiliary is not None, "views of a recipe without this contrast"
                texts = chosen // views.views_per_text
                less_VD = self._contrasted(views.auxiliary, texts, share=skip > 0)
                self._put_contrast(hooks, batch, less_VD, self._contrast)
            if self._prepend and views.slots:
                slots = np.array(views.slots, np.int64)[chosen % views.views_per_text] - skip
                self._put_slots(hooks, batch, slots, self._prepend)
            yield

    def _put_slots(self, hooks: ExitStack, batch: MicroBatch, slots: Ints, how: Prepend) -> None:
        """Gives the slots their embedding, and before each block the state of the last token."""
        each_V, last_V = _last(batch.mask_VT)
        slot_V = last_V + 1 - batch.mask_VT.sum(dim=1) + torch.from_numpy(slots)
        slots_on, lasts_on = at((each_V, slot_V)), at((each_V, last_V))

        def embed(_: nn.Module, args: Any, embedded_VTD: Tensor) -> Tensor:
            row_D = self._row_D.to(embedded_VTD.device, embedded_VTD.dtype)
            return embedded_VTD.index_put(slots_on(embedded_VTD.device), row_D)

        def prepend(hidden_VTD: Tensor) -> Tensor:
            last_VD = hidden_VTD[lasts_on(hidden_VTD.device)]
            return hidden_VTD.index_put(slots_on(hidden_VTD.device), last_VD)

        if how.embedding is None:
            batch.ids_VT[each_V, slot_V] = 0
            hooks.callback(self._embeds.register_forward_hook(embed).remove)
        for block in self._blocks[how.start : how.exit]:
            handle = block.register_forward_pre_hook(_changing(prepend), with_kwargs=True)
            hooks.callback(handle.remove)

    def _put_contrast(
        self, hooks: ExitStack, batch: MicroBatch, less_VD: Tensor, how: Contrast
    ) -> None:
        """Changes what the last tokens' heads bring together."""
        lasts_on = at(_last(batch.mask_VT))
        change = _CONTRASTS[how.mode]

        def contrast(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            lasts = lasts_on(args[0].device)
            return (args[0].index_put(lasts, change(args[0][lasts], less_VD, how)), *args[1:])

        hooks.callback(self._projection.register_forward_pre_hook(contrast).remove)

    def _contrasted(self, views: TokenViews, texts: Ints, *, share: bool) -> Tensor:
        """What the last token's heads bring together under the auxiliary template [V, D].

        Whole where the views themselves are: what is shared was not computed in float32.
        """
        shared = views.prefixes[0]
        longest = int(views.lengths[texts].max())
        share = share and bool((views.prefix[texts] == 0).all())
        share = share and self._prefixes.serves(len(shared), longest)
        batch = assemble(views, texts, side=self._side, whole=not share)
        lasts_on = at(_last(batch.mask_VT))
        found: list[Tensor] = []

        def capture(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.append(args[0][lasts_on(args[0].device)])
            raise _Captured

        if share:
            self._prefixes.key_values(shared)
        with ExitStack() as hooks, suppress(_Captured):
            if self._prepend and views.slots:
                slots = np.full(len(texts), views.slots[0] - (len(shared) if share else 0))
                self._put_slots(hooks, batch, slots, self._prepend)
            hooks.callback(self._projection.register_forward_pre_hook(capture).remove)
            if share:
                self._prefixes.states(shared, batch.ids_VT, batch.mask_VT, layer=-1)
            else:
                self._backbone.states(batch.ids_VT, batch.mask_VT, layer=-1)
        return found[0]


def _scaled(own_VD: Tensor, less_VD: Tensor, how: Contrast) -> Tensor:
    """The difference, times alpha."""
    return (own_VD - less_VD) * (how.alpha or 0.0)


def _at_norm(own_VD: Tensor, less_VD: Tensor, how: Contrast) -> Tensor:
    """The difference, at the norm that was there."""
    left_VD = own_VD - less_VD
    norm_V1 = left_VD.norm(dim=1, keepdim=True).clamp(min=torch.finfo(left_VD.dtype).tiny)
    at_norm_VD: Tensor = left_VD * (own_VD.norm(dim=1, keepdim=True) / norm_V1)
    return at_norm_VD


_CONTRASTS: Mapping[str, Callable[[Tensor, Tensor, Contrast], Tensor]] = {
    "scaled": _scaled,
    "norm": _at_norm,
}


def _changing(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """The hook that changes the states that go into a block."""

    def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return hook


def _last(mask_VT: Tensor) -> Places:
    """The number of each view [V], and where its last token is [V], whichever side is padded."""
    longest = mask_VT.shape[1]
    return torch.arange(len(mask_VT)), longest - 1 - mask_VT.flip(1).int().argmax(dim=1)


def at(places: Places) -> Callable[[torch.device], Places]:
    """The same places on any device: a model may be spread, and each of its blocks has its own."""

    @cache
    def there(device: torch.device) -> Places:
        return to_device(places[0], device), to_device(places[1], device)

    return there


def _row(embeds: Any, seed: int) -> Tensor:
    """The slot's embedding [D]; NumPy keeps this generator's stream as it is for ever."""
    drawn = np.random.RandomState(seed).standard_normal(embeds.weight.shape[1])
    # Some models scale within the embedding what others scale after it.
    return torch.from_numpy(drawn) * float(getattr(embeds, "embed_scale", 1.0))


def _blocks(backbone: Backbone) -> nn.ModuleList:
    if backbone.blocks is None:
        raise ModelError(
            "encoder.interventions: the blocks that states go through cannot be found in"
            f" {type(backbone.model).__name__}; choose another model, or leave interventions empty"
        )
    return backbone.blocks


def _projection(block: nn.Module, backbone: Backbone) -> nn.Module:
    names: dict[str, nn.Module] = dict(block.named_modules())
    found = next((names[name] for name in PROJECTIONS if name in names), None)
    if found is None:
        raise ModelError(
            f"encoder.interventions: contrast: a block of {type(backbone.model).__name__} has none"
            f" of {', '.join(PROJECTIONS)}, of which it changes the input; choose another model,"
            " or leave it out"
        )
    return found
