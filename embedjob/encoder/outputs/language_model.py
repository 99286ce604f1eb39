"""The language-model head of a loaded model, run alone on hidden states.

Legend: N states, D width, W vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from embedjob.errors import ModelError

_PROBE = (1, 2, 3, 4, 5)
# Logits per call: 32 MiB on a CPU, 256 MiB on a GPU.
_MOST_LOGITS, _MOST_LOGITS_ON_GPU = 1 << 23, 1 << 26
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


class _Given(nn.Module):
    """Takes the place of the model's body, and returns the states that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.states = torch.empty(0)

    @property
    def decoder(self) -> "_Given":
        """Return itself: OPT calls the body of its body."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.states)


class LanguageHead:
    """The layers of a language model after its last hidden state."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Detach the model's body; ModelError if the head alone gives other logits."""
        self.body: PreTrainedModel = getattr(model, model.base_model_prefix)
        self._given = _Given()
        vocabulary = int(self.body.get_input_embeddings().weight.shape[0])
        ids_VT = torch.tensor([_PROBE], device=model.device).remainder(vocabulary)
        mask_VT = torch.ones_like(ids_VT)
        with torch.inference_mode():
            whole_VTW = model.eval()(input_ids=ids_VT, attention_mask=mask_VT).logits
            states_VTD = self.body(input_ids=ids_VT, attention_mask=mask_VT).last_hidden_state
            setattr(model, model.base_model_prefix, self._given)
            self.module = model
            # The last states of a spread model are on another device, and so would be the logits.
            apart_NW = self.logits(states_VTD[0].to(ids_VT.device))
        self.vocabulary = apart_NW.shape[-1]
        difference = float((apart_NW - whole_VTW[0].float()).norm())
        if not difference <= _TOLERANCE[model.dtype] * float(whole_VTW.float().norm()):
            raise ModelError(
                f"encoder.heads: the language-model head of {type(model).__name__}"
                " cannot be run by itself; this architecture is not available in this version"
            )

    def most_states(self, device: torch.device) -> int:
        """Return how many states fit into one call on this device."""
        most = _MOST_LOGITS if device.type == "cpu" else _MOST_LOGITS_ON_GPU
        return max(1, most // self.vocabulary)

    @torch.inference_mode()
    def logits(self, states_ND: Tensor) -> Tensor:
        """Return the logits [N, W] in float32 of states after the final norm."""
        self._given.states = states_ND[None]
        # The input is not read: the stand-in for the body returns the states.
        found_NW: Tensor = self.module(inputs_embeds=self._given.states).logits[0].float()
        self._given.states = torch.empty(0)
        return found_NW
