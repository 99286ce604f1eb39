"""A transformer without a head: padded token ids in, hidden states out.

Legend: V views, T tokens, D width.
"""

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from embedjob.encoder.attention import Attention, require_attention, set_attention
from embedjob.encoder.facts import ModelFacts, facts_of
from embedjob.encoder.latent_attention import LatentAttention
from embedjob.encoder.layers import LayerReader
from embedjob.encoder.loading import load_model
from embedjob.errors import ModelError
from embedjob.recipe import Recipe

Layer = int | tuple[int, ...]


class Backbone:
    """A loaded model whose attention looks the way that was asked for."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        attention: Attention,
        latent_attention: LatentAttention | None = None,
        missing: Collection[str] = (),
    ) -> None:
        """Sets the model's attention, and refuses one that then does not look that way.

        `missing` are the weights of its pooler that the checkpoint did not have.
        """
        self.model = model.eval()
        self.latent_attention = latent_attention
        self.missing = frozenset(missing)
        # No cache is kept: every view goes through once.
        model.config.use_cache = False
        self.facts: ModelFacts = facts_of(model.config.to_dict())
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._first_position = _first_position(model)
        self._reader = LayerReader(self.model, layers=self.facts.layers, vocabulary=self.vocabulary)
        set_attention(model, attention)
        require_attention(
            lambda ids, mask: self.states(ids, mask, layer=-1),
            attention,
            vocabulary=self.vocabulary,
            dtype=model.dtype,
        )

    @property
    def device(self) -> torch.device:
        """Where ids go in and states come out; of a model that is spread, its embeddings' place."""
        place: torch.device = self.model.get_input_embeddings().weight.device
        return place

    @property
    def width(self) -> int:
        """The length of one hidden state."""
        return self.facts.hidden_size

    @property
    def vocabulary(self) -> int:
        """How many token ids have an embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @torch.inference_mode()
    def states(
        self, ids_VT: Tensor, mask_VT: Tensor, *, layer: Layer, position: int | Tensor = 0
    ) -> Tensor:
        """The hidden states of a layer [V, T, D]: -1 is after the final norm, a tuple the average.

        Padding may be on either side: positions are counted along the mask, from `position` on,
        unless that is all of them [V, T].
        """
        # On a GPU an id outside the table would kill the process, not the row.
        if int(ids_VT.max()) >= self.vocabulary:
            raise ModelError(
                f"the tokenizer gave id {int(ids_VT.max())}, but the model embeds only"
                f" {self.vocabulary}; tokenizer and weights do not belong together"
            )
        ids_VT, mask_VT = ids_VT.to(self.device), mask_VT.to(self.device)
        inputs = {"input_ids": ids_VT, "attention_mask": mask_VT.long()}
        if self.takes_positions:
            if isinstance(position, int):
                position = (mask_VT.long().cumsum(dim=1) - 1).clamp(min=0) + position
            inputs["position_ids"] = position.to(self.device) + self._first_position
        layers = (layer,) if isinstance(layer, int) else layer
        # One more than the blocks: 0 is the embeddings.
        chosen = [one % (self.facts.layers + 1) for one in layers]
        found = self._reader.read(inputs, frozenset(chosen))
        if len(chosen) == 1:
            return found[chosen[0]].to(self.device)
        return torch.stack([found[one].to(self.device) for one in chosen]).mean(dim=0)

    @contextmanager
    def float32(self) -> Iterator[None]:
        """Within it the weights are float32; afterwards they are, to the bit, what they were."""
        narrow = [
            (tensor, tensor.dtype)
            for tensor in chain(self.model.parameters(), self.model.buffers())
            if tensor.is_floating_point() and tensor.dtype != torch.float32
        ]
        for tensor, _ in narrow:
            tensor.data = tensor.data.float()
        try:
            yield
        finally:
            for tensor, dtype in narrow:
                tensor.data = tensor.data.to(dtype)


def load_backbone(recipe: Recipe, *, device: torch.device, gpus: int = 1) -> Backbone:
    """The recipe's model on a device, or spread over several GPUs; ModelError if it is not whole.

    Raises:
        ResourceError: the GPUs are fewer, or smaller, than the model needs.
    """
    found = load_model(recipe, device=device, gpus=gpus)
    return Backbone(
        found.model,
        attention=recipe.attention,
        latent_attention=found.latent_attention,
        missing=found.missing,
    )


def _first_position(model: PreTrainedModel) -> int:
    """The position of a view's first token: RoBERTa and its kin count from the padding id on."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else int(module.padding_idx) + 1
    return 0
