"""Intervention hooks: changes to the states inside a model, installed for one micro-batch.

Legend: V views, T tokens, D width.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from embedjob.config.interventions import Contrast, Prepend, given
from embedjob.config.recipe import Recipe
from embedjob.encoder.attention.shared_prefix import Prefixes
from embedjob.encoder.backbone import Backbone
from embedjob.encoder.batching.padding import MicroBatch, Side, pad_views
from embedjob.encoder.batching.transfers import to_device
from embedjob.errors import ModelError
from embedjob.text.arrays import Ints
from embedjob.text.views import TokenViews

# The projection of a block's concatenated attention heads, by architecture.
PROJECTIONS = (
    "self_attn.o_proj",
    "self_attn.out_proj",
    "self_attn.dense",
    "attention.dense",
    "self_attention.dense",
    "attn.c_proj",
    "attn.out_proj",
    "attn.o_proj",
    "attention.o_proj",
    "attn.attention.out_proj",
)
TokenPlaces = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SteeredBatch:
    """A micro-batch of chosen views, without their first `skip` tokens."""

    views: TokenViews
    chosen: Ints
    batch: MicroBatch
    skip: int = 0


# Hooks are put in when all interventions have prepared theirs: an auxiliary pass runs without.
Put = Callable[[], Iterable[RemovableHandle]]
Prepare = Callable[[SteeredBatch], Put]


@dataclass(frozen=True)
class Host:
    """A model with its hooks installed; `others` are the interventions on its auxiliary passes."""

    prefixes: Prefixes
    blocks: nn.ModuleList
    side: Side
    others: tuple[Prepare, ...] = ()

    @property
    def backbone(self) -> Backbone:
        """Return the loaded model."""
        return self.prefixes.backbone


class _Captured(Exception):
    """Ends an auxiliary pass once its values are captured."""


class InterventionHooks:
    """The interventions of one recipe in a loaded model; usually there are none."""

    def __init__(self, prefixes: Prefixes, recipe: Recipe, *, side: Side) -> None:
        """Find the places of all hooks; ModelError if the model does not have them."""
        found = tuple(given(recipe.interventions))
        blocks = _blocks(prefixes.backbone) if found else nn.ModuleList()
        host = Host(prefixes, blocks, side)
        plain = tuple(
            INSTALL[type(one.settings)](one.settings, host) for one in found if one.template is None
        )
        host = replace(host, others=plain)
        auxiliary = tuple(
            INSTALL[type(one.settings)](one.settings, host)
            for one in found
            if one.template is not None
        )
        self._prepared = (*auxiliary, *plain)

    @contextmanager
    def installed(
        self, views: TokenViews, chosen: Ints, batch: MicroBatch, *, skip: int = 0
    ) -> Iterator[None]:
        """Steer the chosen views' micro-batch, which lacks its first `skip` tokens, while inside.

        It may replace ids at slots: the model may have no embedding for them.
        """
        with _hooked(self._prepared, SteeredBatch(views, chosen, batch, skip)):
            yield


@contextmanager
def _hooked(prepared: Sequence[Prepare], steered: SteeredBatch) -> Iterator[None]:
    puts = [prepare(steered) for prepare in prepared]
    with ExitStack() as stack:
        for put in puts:
            for handle in put():
                stack.callback(handle.remove)
        yield


def install_prepend(prepend: Prepend, host: Host) -> Prepare:
    """Prepare token prepending (Fu et al. 2024): slots get the state of the last token."""
    embeds: Any = host.backbone.model.get_input_embeddings()
    row_D = _row(embeds, prepend.seed) if prepend.embedding is None else None

    def prepare(steered: SteeredBatch) -> Put:
        views, batch = steered.views, steered.batch
        if not views.slots:
            return lambda: ()
        of_template = np.array(views.slots, np.int64)[steered.chosen % views.views_per_text]
        each_V, last_V = _last(batch.mask_VT)
        offset_V = torch.from_numpy(of_template - steered.skip)
        slot_V = last_V + 1 - batch.mask_VT.sum(dim=1) + offset_V
        slots_on, lasts_on = at((each_V, slot_V)), at((each_V, last_V))

        def embed(_: nn.Module, args: Any, embedded_VTD: Tensor) -> Tensor:
            assert row_D is not None, "the slot has the embedding of a token"
            row = row_D.to(embedded_VTD.device, embedded_VTD.dtype)
            return embedded_VTD.index_put(slots_on(embedded_VTD.device), row)

        def show_last(hidden_VTD: Tensor) -> Tensor:
            last_VD = hidden_VTD[lasts_on(hidden_VTD.device)]
            return hidden_VTD.index_put(slots_on(hidden_VTD.device), last_VD)

        def put() -> Iterator[RemovableHandle]:
            if row_D is not None:
                batch.ids_VT[each_V, slot_V] = 0
                yield embeds.register_forward_hook(embed)
            for block in host.blocks[prepend.start : prepend.exit]:
                yield before_block(block, show_last)

        return put

    return prepare


def install_contrast(contrast: Contrast, host: Host) -> Prepare:
    """Prepare contrastive prompting (Cheng et al. 2025): subtract the auxiliary view's heads."""
    projection = _projection(host.blocks[contrast.layer], host.backbone)
    change = _CONTRASTS[contrast.mode]

    def prepare(steered: SteeredBatch) -> Put:
        less_VD = _auxiliary_heads(projection, steered, host)
        lasts_on = at(_last(steered.batch.mask_VT))

        def subtract(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            lasts = lasts_on(args[0].device)
            changed_VD = change(args[0][lasts], less_VD, contrast)
            return (args[0].index_put(lasts, changed_VD), *args[1:])

        return lambda: (projection.register_forward_pre_hook(subtract),)

    return prepare


def _auxiliary_heads(projection: nn.Module, steered: SteeredBatch, host: Host) -> Tensor:
    """Return the last token's concatenated attention heads [V, D] in the auxiliary views.

    These go whole where the views themselves do: shared prefixes are not computed in float32.
    """
    views = steered.views.auxiliary
    assert views is not None, "the views were tokenized by a recipe without this contrast"
    texts = steered.chosen // steered.views.views_per_text
    shared = views.prefixes[0]
    longest = int(views.lengths[texts].max())
    share = steered.skip > 0 and bool((views.prefix[texts] == 0).all())
    share = share and host.prefixes.serves(len(shared), longest)
    batch = pad_views(views, texts, side=host.side, whole=not share)
    lasts_on = at(_last(batch.mask_VT))
    captured: list[Tensor] = []

    def capture(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        captured.append(args[0][lasts_on(args[0].device)])
        raise _Captured

    if share:
        host.prefixes.key_values(shared)
    auxiliary = SteeredBatch(views, texts, batch, len(shared) if share else 0)
    with _hooked(host.others, auxiliary), ExitStack() as stack, suppress(_Captured):
        stack.callback(projection.register_forward_pre_hook(capture).remove)
        if share:
            host.prefixes.states(shared, batch.ids_VT, batch.mask_VT, layer=-1)
        else:
            host.backbone.states(batch.ids_VT, batch.mask_VT, layer=-1)
    return captured[0]


# Each kind of intervention, by its settings, to what finds its places in a model.
INSTALL: Mapping[type, Callable[[Any, Host], Prepare]] = {
    Prepend: install_prepend,
    Contrast: install_contrast,
}


def _scaled(own_VD: Tensor, less_VD: Tensor, how: Contrast) -> Tensor:
    """Return the difference times alpha."""
    return (own_VD - less_VD) * (how.alpha or 0.0)


def _at_norm(own_VD: Tensor, less_VD: Tensor, how: Contrast) -> Tensor:
    """Return the difference, scaled to the norm of the own heads."""
    left_VD = own_VD - less_VD
    norm_V1 = left_VD.norm(dim=1, keepdim=True).clamp(min=torch.finfo(left_VD.dtype).tiny)
    at_norm_VD: Tensor = left_VD * (own_VD.norm(dim=1, keepdim=True) / norm_V1)
    return at_norm_VD


_CONTRASTS: Mapping[str, Callable[[Tensor, Tensor, Contrast], Tensor]] = {
    "scaled": _scaled,
    "norm": _at_norm,
}


def before_block(block: nn.Module, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Change the states that go into a block."""

    def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return block.register_forward_pre_hook(hook, with_kwargs=True)


def _last(mask_VT: Tensor) -> TokenPlaces:
    """Return each view's number [V] and the place of its last token [V], on either padding side."""
    longest = mask_VT.shape[1]
    return torch.arange(len(mask_VT)), longest - 1 - mask_VT.flip(1).int().argmax(dim=1)


def at(places: TokenPlaces) -> Callable[[torch.device], TokenPlaces]:
    """Return the places on any device: the blocks of a spread model are on several."""

    @cache
    def there(device: torch.device) -> TokenPlaces:
        return to_device(places[0], device), to_device(places[1], device)

    return there


def _row(embeds: Any, seed: int) -> Tensor:
    """Draw the slot's embedding [D]; NumPy keeps the stream of this generator for ever."""
    drawn = np.random.RandomState(seed).standard_normal(embeds.weight.shape[1])
    # Some models scale inside the embedding layer, others after it.
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
    projection = next((names[name] for name in PROJECTIONS if name in names), None)
    if projection is None:
        raise ModelError(
            f"encoder.interventions: contrast: a block of {type(backbone.model).__name__} has none"
            f" of {', '.join(PROJECTIONS)}, of which it changes the input; choose another model,"
            " or leave it out"
        )
    return projection
