"""Which way attention looks: set on a loaded model, and then seen to be so.

Legend: V views, T tokens, D width.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from embedjob.errors import ModelError

Attention = Literal["causal", "bidirectional"]
_PROBE = (1, 2, 3, 4, 5)
_WATCHED, _CHANGED = 1, 3
# Relative to the state's norm. In a causal model the watched state is the same to the last bit,
# but where experts are shared out anew; in a bidirectional one it moves by some per cent.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}


States = Callable[[Tensor, Tensor], Tensor]


def set_attention(
    model: PreTrainedModel, attention: Attention, *, states: States, vocabulary: int
) -> None:
    """Make a model's attention look so; ModelError if its `states` then do not.

    A model that looks both ways by itself is left alone: it may have windows of its own for that.
    """
    least = _TOLERANCE[model.dtype]
    wanted = attention == "bidirectional"
    if wanted and any(change <= least for change in _changes(states, vocabulary=vocabulary)):
        _look_both_ways(model)
    for change in _changes(states, vocabulary=vocabulary):
        sees = change > least
        if sees != wanted:
            raise ModelError(
                f"encoder.attention: got {attention}, but a token of this model"
                f" {'sees' if sees else 'does not see'} later ones (its state changes by"
                f" {change:.1e}), and this architecture cannot be set to it; set"
                f" encoder.attention: {'bidirectional' if sees else 'causal'}"
            )


def configs_of(model: PreTrainedModel) -> list[PretrainedConfig]:
    """The configs that a model's parts read: its own, and of its text part if that has another."""
    return list({id(c): c for c in (model.config, model.config.get_text_config())}.values())


def _look_both_ways(model: PreTrainedModel) -> None:
    # Both are needed: the mask is built by the config's flag (else padded batches stay causal), and
    # where no mask is built the kernel asks the module's.
    for config in configs_of(model):
        config.is_causal = False
    for module in model.modules():
        if isinstance(getattr(module, "is_causal", None), bool):
            module.is_causal = False  # type: ignore[assignment]


def _changes(states: States, *, vocabulary: int) -> Iterator[float]:
    """By how much of its norm a state changes with a later token: without padding, and with some.

    Both, because the two take different ways through a model.
    """
    ids_T = torch.tensor(_PROBE).remainder(vocabulary)
    changed_T = ids_T.clone()
    changed_T[_CHANGED] = (ids_T[_CHANGED] + 7) % vocabulary
    for padding in (0, 2):
        mask_VT = torch.arange(len(_PROBE) + padding)[None] < len(_PROBE)
        # One call each: two rows of one call may differ in their last bits all by themselves.
        before_D, after_D = (
            states(nn.functional.pad(ids, (0, padding))[None], mask_VT)[0, _WATCHED].float()
            for ids in (ids_T, changed_T)
        )
        yield float((before_D - after_D).norm() / before_D.norm().clamp(min=1e-12))
