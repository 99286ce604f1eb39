"""Which way attention looks: set on a loaded model, and then seen to be so.

Legend: V views, T tokens, D width.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from embedjob.errors import ModelError

Attention = Literal["causal", "bidirectional"]
_PROBE_TOKENS = 5
# Relative to the state's norm. A state that must not change is equal to the last bit but for
# kernels that reorder sums; one that must change differs by far more, even in an untrained model.
_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}


def set_attention(model: PreTrainedModel, attention: Attention) -> None:
    """Make a decoder's attention look both ways, or leave it as it is.

    Both are needed: the mask is built by the config's flag (else padded batches stay causal), and
    where no mask is built the kernel asks the module's.
    """
    if attention == "causal":
        return
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.is_causal = False
    for module in model.modules():
        if isinstance(getattr(module, "is_causal", None), bool):
            module.is_causal = False  # type: ignore[assignment]


def require_attention(
    states: Callable[[Tensor, Tensor], Tensor],
    attention: Attention,
    *,
    vocabulary: int,
    dtype: torch.dtype,
) -> None:
    """ModelError unless the first state sees a later token exactly when it should.

    Checked with and without padding, because the two take different ways through a model.
    """
    ids_VT = torch.arange(1, _PROBE_TOKENS + 1).remainder(vocabulary).repeat(2, 1)
    ids_VT[1, 2] = (ids_VT[1, 2] + 1) % vocabulary
    for padding in (0, 2):
        mask_VT = torch.ones(2, _PROBE_TOKENS + padding, dtype=torch.bool)
        mask_VT[:, _PROBE_TOKENS:] = False
        padded_VT = torch.nn.functional.pad(ids_VT, (0, padding))
        first_VD = states(padded_VT, mask_VT)[:, 0].float()
        change = float((first_VD[0] - first_VD[1]).norm() / first_VD[0].norm().clamp(min=1e-12))
        if (change > _TOLERANCE[dtype]) != (attention == "bidirectional"):
            sees = "sees" if change > _TOLERANCE[dtype] else "does not see"
            raise ModelError(
                f"encoder.attention: got {attention}, but the first token of this model {sees}"
                f" later ones (its state changes by {change:.1e}); this architecture cannot be set"
                " to it"
            )
