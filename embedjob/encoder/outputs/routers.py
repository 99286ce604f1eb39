"""Router scores: the logits that a mixture of experts gives its experts for every token.

Legend: V views, T tokens, L layers with experts, E experts.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from embedjob.errors import ModelError

_PROBE = (1, 2, 3, 4, 5)


class Routers:
    """The scores that a model's routers gave in its latest forward."""

    def __init__(self, model: PreTrainedModel, *, scores: Literal["logits", "softmax"]) -> None:
        """Hook the routers that transformers records; ModelError if there are none."""
        self._softmax = scores == "softmax"
        self._heard: dict[int, Tensor] = {}
        recorder = _recorder(model)
        kind, index = getattr(recorder, "target_class", nn.Module), getattr(recorder, "index", 0)
        modules = [m for m in model.modules() if recorder is not None and isinstance(m, kind)]
        if not modules:
            raise ModelError(
                f"encoder.heads: router: {type(model).__name__} has no routers that transformers"
                " records; give a mixture of experts as encoder.model (OLMoE, Qwen-MoE, DeepSeek)"
            )
        for number, module in enumerate(modules):
            module.register_forward_hook(self._listener(number, index))
        with torch.inference_mode():
            model(input_ids=torch.tensor([_PROBE], device=model.device))
        self.width = self.scores(1, len(_PROBE)).shape[-1]

    def scores(self, views: int, tokens: int) -> Tensor:
        """Return the scores [V, T, L x E] in float32 of the tokens of the latest forward."""
        layers = [self._heard[number].float() for number in sorted(self._heard)]
        if self._softmax:
            layers = [scores.softmax(dim=-1) for scores in layers]
        by_layer = [one.reshape(views, tokens, -1).to(layers[0].device) for one in layers]
        return torch.cat(by_layer, dim=-1)

    def _listener(self, number: int, index: int) -> Any:
        def hear(module: nn.Module, args: Any, output: Any) -> None:
            self._heard[number] = output[index] if isinstance(output, tuple) else output

        return hear


def _recorder(model: PreTrainedModel) -> Any:
    """Return the entry by which transformers itself records the model's router logits."""
    return (getattr(model, "_can_record_outputs", None) or {}).get("router_logits")
