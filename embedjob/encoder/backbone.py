"""A transformer without a head: padded token ids in, hidden states out.

Legend: V views, T tokens, D width.
"""

import inspect
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForTextEncoding,
    Cache,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from embedjob.encoder import nvembed
from embedjob.encoder.attention import Attention, require_attention, set_attention
from embedjob.encoder.facts import (
    T5_TYPES,
    ModelFacts,
    config_of,
    facts_of,
    is_causal,
    require_fit,
)
from embedjob.encoder.language_head import LanguageHead
from embedjob.encoder.latent_attention import LatentAttention
from embedjob.encoder.layers import LayerReader
from embedjob.encoder.quiet import quiet
from embedjob.encoder.source import materialize, source_of, transformer_directory
from embedjob.encoder.tensors import prefixed_tensors
from embedjob.encoder.transfers import onto
from embedjob.errors import ModelError
from embedjob.recipe import Recipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
        head: LanguageHead | None = None,
    ) -> None:
        """Sets the model's attention, and refuses one that then does not look that way.

        `missing` are the weights of its pooler that the checkpoint did not have, `head`
        its own language-model head where a recipe reads logits.
        """
        self.model = model.eval()
        self.head = head
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
        ids_VT, mask_VT = onto(ids_VT, self.device), onto(mask_VT, self.device)
        inputs = {"input_ids": ids_VT, "attention_mask": mask_VT.long()}
        if self.takes_positions:
            if isinstance(position, int):
                position = (mask_VT.long().cumsum(dim=1) - 1).clamp(min=0) + position
            inputs["position_ids"] = onto(position, self.device) + self._first_position
        # One more than the blocks: 0 is the embeddings.
        chosen = [one % (self.facts.layers + 1) for one in np.atleast_1d(layer).tolist()]
        found = self._reader.read(inputs, frozenset(chosen))
        if len(chosen) == 1:
            return found[chosen[0]]
        return torch.stack([found[one] for one in chosen]).mean(dim=0)

    def prepare(self, layer: Layer) -> None:
        """Finds out how a layer is read, before another attention is put in the model's place."""
        if layer != -1:
            self._reader.prepare()

    @torch.inference_mode()
    def continued(
        self, ids_VT: Tensor, mask_VT: Tensor, cache: Cache, *, position_VT: Tensor | None = None
    ) -> Tensor:
        """The last states [V, T, D] of what follows the cache, to which it is added.

        The mask is of all tokens, those of the cache too; positions count along it if not given.
        """
        inputs = {"input_ids": ids_VT, "attention_mask": mask_VT}
        if self.takes_positions:
            if position_VT is None:
                position_VT = (mask_VT.cumsum(dim=1) - 1).clamp(min=0)
            inputs["position_ids"] = position_VT + self._first_position
        output = self.model(**inputs, past_key_values=cache, use_cache=True, return_dict=True)
        return output.last_hidden_state  # type: ignore[no-any-return]

    @contextmanager
    def float32(self) -> Iterator[None]:
        """Within it the weights are float32; afterwards they are, to the bit, what they were."""
        parts = [self.model, *([self.head.module] if self.head else [])]
        narrow = [
            (tensor, tensor.dtype)
            for tensor in chain.from_iterable((*p.parameters(), *p.buffers()) for p in parts)
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
    model, missing = _load(directory, recipe, dtype)
    nn.Module.to(model, device)
    head = LanguageHead(model) if recipe.reads_logits else None
    latent = _latent_attention(directory, recipe, device=device, dtype=dtype)
    return Backbone(
        head.body if head else model,
        attention=recipe.attention,
        latent_attention=latent,
        missing=missing,
        head=head,
    )


def _load(
    directory: Path, recipe: Recipe, dtype: torch.dtype
) -> tuple[PreTrainedModel, frozenset[str]]:
    """The model, and the weights of its pooler that the checkpoint does not have."""
    trust = recipe.trust_remote_code
    try:
        config, mapping = _config(directory, trust=trust)
        auto: Any = AutoModelForTextEncoding if config.model_type in T5_TYPES else AutoModel
        if recipe.reads_logits:
            auto = AutoModelForCausalLM if is_causal(config.to_dict()) else AutoModelForMaskedLM
        with quiet():
            model, report = auto.from_pretrained(
                directory,
                config=config,
                key_mapping=mapping,
                dtype=dtype,
                trust_remote_code=trust,
                use_safetensors=None if recipe.allow_pickle else True,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ModelError(f"encoder.model: {recipe.model} cannot be loaded: {reason}") from error
    # transformers fills what is missing with random numbers; a pooler is seldom asked for.
    pooler = frozenset(key for key in report["missing_keys"] if "pooler" in key)
    if missing := sorted(set(report["missing_keys"]) - pooler):
        raise ModelError(
            f"encoder.model: the weights of {recipe.model} lack {len(missing)} tensors of"
            f" {type(model).__name__} ({', '.join(missing[:3])}, ...); was the model saved whole,"
            " and does its config.json belong to it?"
        )
    return model, pooler


def _config(directory: Path, *, trust: bool) -> tuple[PreTrainedConfig, dict[str, str] | None]:
    """The model's config, and what its tensors are called if not as transformers calls them."""
    written = config_of(directory)
    if nvembed.is_nvembed(written):
        renamed = {f"^{re.escape(nvembed.BACKBONE_PREFIX)}": ""}
        return MistralConfig(**nvembed.mistral_keys(written)), renamed
    return AutoConfig.from_pretrained(directory, trust_remote_code=trust), None


def _latent_attention(
    directory: Path, recipe: Recipe, *, device: torch.device, dtype: torch.dtype
) -> LatentAttention | None:
    config = config_of(directory)
    if recipe.pooling != "latent_attention" or not nvembed.is_nvembed(config):
        return None
    prefix, pickles = nvembed.LATENT_PREFIX, recipe.allow_pickle
    tensors = prefixed_tensors(directory, prefix, allow_pickle=pickles)
    return LatentAttention(tensors, nvembed.latent_sizes(config), device=device, dtype=dtype)


def _first_position(model: PreTrainedModel) -> int:
    """The position of a view's first token: RoBERTa and its kin count from the padding id on."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else int(module.padding_idx) + 1
    return 0
