"""Causal or bidirectional attention: set on a loaded model, then observed on an example.

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
_OBSERVED, _CHANGED = 1, 3
# Relative to the state's norm. In a causal model the observed state stays the same to the last bit,
# unless a router assigns experts anew; in a bidirectional model it moves by some per cent.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}
StatesFunction = Callable[[Tensor, Tensor], Tensor]


def set_attention(
    model: PreTrainedModel, attention: Attention, *, states: StatesFunction, vocabulary: int
) -> None:
    """Set a model's attention to causal or bidirectional.

    A model that is bidirectional by itself is left alone: it may have windows of its own for that.

    Raises:
        ModelError: tokens of the model's `states` still see later tokens, or still do not.
    """
    tolerance = _TOLERANCE[model.dtype]
    wanted = attention == "bidirectional"
    if wanted and any(
        change <= tolerance for change in _relative_changes(states, vocabulary=vocabulary)
    ):
        _make_bidirectional(model)
    for change in _relative_changes(states, vocabulary=vocabulary):
        sees = change > tolerance
        if sees != wanted:
            raise ModelError(
                f"encoder.attention: got {attention}, but a token of this model"
                f" {'sees' if sees else 'does not see'} later ones (its state changes by"
                f" {change:.1e}), and this architecture cannot be set to it; set"
                f" encoder.attention: {'bidirectional' if sees else 'causal'}"
            )


def configs_of(model: PreTrainedModel) -> list[PretrainedConfig]:
    """Return the configs that a model's parts read: its own, and its text model's if different."""
    return list({id(c): c for c in (model.config, model.config.get_text_config())}.values())


def _make_bidirectional(model: PreTrainedModel) -> None:
    # Both are needed: the mask is built by the config's flag (else padded batches stay causal), and
    # where no mask is built the kernel asks the module's.
    for config in configs_of(model):
        config.is_causal = False
    for module in model.modules():
        if isinstance(getattr(module, "is_causal", None), bool):
            module.is_causal = False  # type: ignore[assignment]


def _relative_changes(states: StatesFunction, *, vocabulary: int) -> Iterator[float]:
    """Yield the relative change of a state by a later token: without padding, then with padding.

    Both are needed, because padded batches take another path through a model.
    """
    ids_T = torch.tensor(_PROBE).remainder(vocabulary)
    changed_T = ids_T.clone()
    changed_T[_CHANGED] = (ids_T[_CHANGED] + 7) % vocabulary
    for padding in (0, 2):
        mask_VT = torch.arange(len(_PROBE) + padding)[None] < len(_PROBE)
        # One call for each: two equal rows of one call may differ in their last bits.
        before_D, after_D = (
            states(nn.functional.pad(ids, (0, padding))[None], mask_VT)[0, _OBSERVED].float()
            for ids in (ids_T, changed_T)
        )
        yield float((before_D - after_D).norm() / before_D.norm().clamp(min=1e-12))
