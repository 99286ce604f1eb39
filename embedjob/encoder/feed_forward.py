"""Of the last block that is run, the feed-forward layer for those tokens alone that are read.

Attention has brought a token all that it is to know of the others; what comes after it in the last
block is done to every token by itself, and is lost on those that no pooling looks at.

Legend: V views, T tokens, N tokens that are read, D width.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from embedjob.beside import router_in
from embedjob.encoder.transfers import onto
from embedjob.recipe import Recipe

_LOG = logging.getLogger(__name__)
_PROBE = (1, 2, 3, 4, 5)


def reads_last_tokens(recipe: Recipe) -> bool:
    """Whether nothing but the state of each view's last token is read of a causal model."""
    more = router_in(recipe.heads) or recipe.interventions or recipe.decode
    return recipe.span == "last_token" and recipe.attention == "causal" and not more


def feed_forward(block: nn.Module) -> nn.Module | None:
    """A block's feed-forward layer, if it goes by the name that most models give it."""
    found = getattr(block, "mlp", None)
    return found if isinstance(found, nn.Module) else None


def same_alone(states: Callable[..., Tensor], *, vocabulary: int, tolerance: float) -> bool:
    """Whether `states` gives the same for tokens of a small example if they alone are read."""
    ids_VT = torch.tensor([_PROBE, _PROBE[::-1]]).remainder(vocabulary)
    read_VT = torch.arange(len(_PROBE)) == torch.tensor([[len(_PROBE) - 1], [1]])
    mask_VT = torch.ones_like(read_VT)
    expected_VTD = states(ids_VT, mask_VT)
    here_VT = read_VT.to(expected_VTD.device)
    expected_ND = expected_VTD[here_VT].float()
    try:
        found_ND = states(ids_VT, mask_VT, read_VT=read_VT)[here_VT].float()
    except Exception as error:
        # Whatever a layer raises when it is given fewer tokens, it runs them all.
        _LOG.debug("the last block runs all tokens: %s", error)
        return False
    return bool((found_ND - expected_ND).norm() <= tolerance * expected_ND.norm())


@contextmanager
def only_for(read_VT: Tensor | None, layer: nn.Module | None) -> Iterator[None]:
    """Within it a feed-forward layer runs the tokens that are read, and gives 0 for the others.

    If it is not said which they are, or there is no such layer, all goes on as ever.
    """
    if read_VT is None or layer is None:
        yield
        return
    shape = read_VT.shape
    # On the host, so that no device is waited for.
    index_N = read_VT.flatten().nonzero()[:, 0]

    def gathered(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # What goes in, and perhaps what it is added to.
        return tuple(one.flatten(0, 1)[onto(index_N, one.device)][None] for one in given)

    def spread(_: nn.Module, given: tuple[Tensor, ...], states_1ND: Tensor) -> Tensor:
        wide = states_1ND.new_zeros(shape.numel(), states_1ND.shape[-1])
        wide.index_copy_(0, onto(index_N, wide.device), states_1ND[0])
        return wide.view(*shape, -1)

    with ExitStack() as hooks:
        hooks.callback(layer.register_forward_pre_hook(gathered).remove)
        hooks.callback(layer.register_forward_hook(spread).remove)
        yield
