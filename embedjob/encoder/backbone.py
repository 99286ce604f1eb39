"""A transformer without a head: padded token ids in, hidden states out.

Legend: V views, T tokens, D width.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, PreTrainedModel

from embedjob.encoder.attention import Attention, require_attention, set_attention
from embedjob.encoder.facts import T5_TYPES, ModelFacts, config_of, facts_of, require_fit
from embedjob.encoder.layers import LayerReader
from embedjob.encoder.quiet import quiet
from embedjob.encoder.source import materialize, source_of, transformer_directory
from embedjob.errors import ModelError
from embedjob.recipe import Recipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Layer = int | tuple[int, ...]


class Backbone:
    """A loaded model whose attention looks the way that was asked for."""

    def __init__(self, model: PreTrainedModel, *, attention: Attention) -> None:
        """Sets the model's attention, and refuses one that then does not look that way."""
        self.model = model.eval()
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
        """Where the weights are."""
        place: torch.device = next(self.model.parameters()).device
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
            return found[chosen[0]]
        return torch.stack([found[one] for one in chosen]).mean(dim=0)

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


def load_backbone(recipe: Recipe, *, device: torch.device) -> Backbone:
    """The recipe's model on a device; ModelError if it cannot be loaded whole."""
    directory = transformer_directory(materialize(source_of(recipe)))
    require_fit(recipe, facts_of(config_of(directory)))
    auto = "bfloat16" if device.type == "cuda" else "float32"
    dtype = DTYPES[auto if recipe.dtype == "auto" else recipe.dtype]
    model = _load(directory, recipe, dtype)
    nn.Module.to(model, device)
    return Backbone(model, attention=recipe.attention)


def _load(directory: Path, recipe: Recipe, dtype: torch.dtype) -> PreTrainedModel:
    trust = recipe.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust)
        auto = AutoModelForTextEncoding if config.model_type in T5_TYPES else AutoModel
        with quiet():
            model, report = auto.from_pretrained(
                directory,
                dtype=dtype,
                trust_remote_code=trust,
                use_safetensors=None if recipe.allow_pickle else True,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ModelError(f"encoder.model: {recipe.model} cannot be loaded: {reason}") from error
    # transformers fills what is missing with random numbers; a pooler is never asked for.
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise ModelError(
            f"encoder.model: the weights of {recipe.model} lack {len(missing)} tensors of"
            f" {type(model).__name__} ({', '.join(missing[:3])}, ...); was the model saved whole,"
            " and does its config.json belong to it?"
        )
    return model  # type: ignore[no-any-return]


def _first_position(model: PreTrainedModel) -> int:
    """The position of a view's first token: RoBERTa and its kin count from the padding id on."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else int(module.padding_idx) + 1
    return 0
