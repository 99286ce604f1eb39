"""Backbone: a transformer without a head, from padded token ids to hidden states.

Legend: V views, T tokens, D width.
"""

import inspect
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from embedjob.config.recipe import Recipe
from embedjob.encoder.attention.direction import Attention, set_attention
from embedjob.encoder.batching.transfers import to_device
from embedjob.encoder.loading import dequantized, load_model, quantize_weights
from embedjob.encoder.outputs.language_model import LanguageHead
from embedjob.errors import ConfigError, ModelError
from embedjob.models.architecture import ModelInfo, check_quantizer, info_of, windows_of

_LOG = logging.getLogger(__name__)
_PROBE = (1, 2, 3, 4, 5)
_ROUNDING = 1e-5
_OF_ONE_MODEL = (
    "model",
    "revision",
    "base",
    "adapters",
    "attention",
    "dtype",
    "quantize",
    "generate",
)


class _AllRead(Exception):
    """Ends a forward once every layer that is read has been captured."""


class LayerReader:
    """Reader of hidden states 0 (the embeddings) to `layers` (after the final norm) of a model."""

    def __init__(self, model: PreTrainedModel, *, layers: int, vocabulary: int) -> None:
        """Find the model's blocks; how they are read is found out at the first use."""
        self._model = model
        self._layers = layers
        self._vocabulary = vocabulary
        stacks = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers)
        self.stack = next(stacks, None)
        self._reads_blocks: bool | None = None

    def read(self, inputs: Mapping[str, Tensor], layers: frozenset[int]) -> dict[int, Tensor]:
        """Return the hidden states [V, T, D] of these layers."""
        if layers == {self._layers}:
            return {self._layers: self._model(**inputs, return_dict=True).last_hidden_state}
        if self.blocks is None:
            return self._all_layers(inputs, layers)
        return self._first_layers(inputs, layers)

    @property
    def blocks(self) -> nn.ModuleList | None:
        """Return the model's blocks, if the input of block i is proven to be hidden state i."""
        self.prepare()
        return self.stack if self._reads_blocks else None

    def prepare(self) -> None:
        """Find out, once, whether blocks can be read, under the attention that is set now."""
        if self._reads_blocks is None:
            self._reads_blocks = self._blocks_are_states()

    def _all_layers(
        self, inputs: Mapping[str, Tensor], layers: frozenset[int]
    ) -> dict[int, Tensor]:
        output = self._model(**inputs, output_hidden_states=True, return_dict=True)
        states = (*output.hidden_states[: self._layers], output.last_hidden_state)
        return {layer: states[layer] for layer in layers}

    def _first_layers(
        self, inputs: Mapping[str, Tensor], layers: frozenset[int]
    ) -> dict[int, Tensor]:
        states: dict[int, Tensor] = {}
        with self._capturing(states, layers):
            try:
                output = self._model(**inputs, return_dict=True)
            except _AllRead:
                return states
        return {**states, self._layers: output.last_hidden_state}

    @contextmanager
    def _capturing(self, states: dict[int, Tensor], layers: frozenset[int]) -> Iterator[None]:
        """Have the blocks put their inputs into `states`; the last one read ends the forward."""
        with ExitStack() as hooks:
            for layer in layers - {self._layers}:

                def keep(_: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
                    states[layer] = args[0] if args else kwargs["hidden_states"]
                    if layer == max(layers):
                        raise _AllRead

                # The input of block i is hidden state i.
                block: nn.Module = self.stack[layer]  # type: ignore[index]
                handle = block.register_forward_pre_hook(keep, with_kwargs=True)
                hooks.callback(handle.remove)
            yield

    @torch.inference_mode()
    def _blocks_are_states(self) -> bool:
        """Return whether the blocks' inputs are the hidden states that the model itself reports."""
        if self.stack is not None:
            device: torch.device = next(self._model.parameters()).device
            ids_VT = torch.tensor([_PROBE], device=device).remainder(self._vocabulary)
            inputs = {"input_ids": ids_VT, "attention_mask": torch.ones_like(ids_VT)}
            every = frozenset(range(self._layers + 1))
            expected = self._all_layers(inputs, every)
            try:
                captured = self._first_layers(inputs, every)
            except (KeyError, TypeError, AttributeError) as error:
                captured = {}
                _LOG.debug("blocks cannot be read: %s", error)
            if set(captured) == every and all(_equal(captured[i], expected[i]) for i in every):
                return True
        name = type(self._model).__name__
        _LOG.warning("every layer of %s is run: its blocks' inputs are not its hidden states", name)
        return False


def _equal(captured: Tensor, expected: Tensor) -> bool:
    # A spread model reports all states on its first device; its blocks have them on their own.
    captured = captured.to(expected.device)
    difference = (captured.float() - expected.float()).norm()
    within = bool(difference <= _ROUNDING * expected.float().norm())
    return captured.shape == expected.shape and within


ReadLayer = int | tuple[int, ...]
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}


class Backbone:
    """A loaded model, causal or bidirectional as the recipe asks."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        attention: Attention,
        missing: Collection[str] = (),
        head: LanguageHead | None = None,
    ) -> None:
        """Set the direction of the model's attention; ConfigError if the model does not follow it.

        `missing` names the pooler's weights that the checkpoint lacks; `head` is the model's own
        language-model head, where a recipe reads logits.
        """
        self.model = model.eval()
        self.head = head
        self.missing = frozenset(missing)
        # States of another path through the model may differ by this share of their norm.
        self.tolerance = _TOLERANCE[model.dtype]
        # No cache is kept: every view goes through once.
        model.config.use_cache = False
        self.info: ModelInfo = info_of(model.config.to_dict())
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._first_position = _first_position(model)
        self._reader = LayerReader(self.model, layers=self.info.layers, vocabulary=self.vocabulary)
        states = partial(self.states, layer=-1)
        set_attention(model, attention, states=states, vocabulary=self.vocabulary)

    @property
    def device(self) -> torch.device:
        """Return the device of the embeddings: ids go in there, and states are returned there."""
        place: torch.device = self.model.get_input_embeddings().weight.device
        return place

    @property
    def width(self) -> int:
        """Return the length of one hidden state."""
        return self.info.hidden_size

    @property
    def vocabulary(self) -> int:
        """Return the number of token ids that have an embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def stack(self) -> nn.ModuleList | None:
        """Return the model's list of modules, one per layer, if there is one; inputs unchecked."""
        return self._reader.stack

    @property
    def blocks(self) -> nn.ModuleList | None:
        """Return the model's blocks, if the input of block i is hidden state i."""
        return self._reader.blocks

    @property
    def windows(self) -> tuple[int, ...]:
        """Return the lengths of the sliding windows in tokens; none if attention has no limit."""
        # The config as it runs: the number that Gemma 3 writes to a file is another one.
        config = self.model.config
        return windows_of({**vars(config), "text": vars(config.get_text_config())})

    @torch.inference_mode()
    def states(
        self,
        ids_VT: Tensor,
        mask_VT: Tensor,
        *,
        layer: ReadLayer,
        position: int | Tensor = 0,
    ) -> Tensor:
        """Return the hidden states [V, T, D] of a layer, or the mean over a tuple of layers.

        Layer -1 is after the final norm. Padding may be on either side: positions count along the
        mask from `position`, or are `position` itself if it has the shape [V, T]. ModelError if
        an id has no embedding.
        """
        # On a GPU an id outside the table would kill the process, not the row.
        if int(ids_VT.max()) >= self.vocabulary:
            raise ModelError(
                f"the tokenizer gave id {int(ids_VT.max())}, but the model embeds only"
                f" {self.vocabulary}; tokenizer and weights do not belong together"
            )
        ids_VT, mask_VT = to_device(ids_VT, self.device), to_device(mask_VT, self.device)
        inputs = {"input_ids": ids_VT, "attention_mask": mask_VT.long()}
        if self.takes_positions:
            if isinstance(position, int):
                position = (mask_VT.long().cumsum(dim=1) - 1).clamp(min=0) + position
            inputs["position_ids"] = to_device(position, self.device) + self._first_position
        chosen = self._numbers(layer)
        states = self._reader.read(inputs, frozenset(chosen))
        if len(chosen) == 1:
            return states[chosen[0]].to(self.device)
        return torch.stack([states[number].to(self.device) for number in chosen]).mean(dim=0)

    def _numbers(self, layer: ReadLayer) -> list[int]:
        """Return the numbers of hidden states, 0 (the embeddings) to the number of blocks."""
        return [number % (self.info.layers + 1) for number in np.atleast_1d(layer).tolist()]

    def prepare(self, layer: ReadLayer) -> None:
        """Find out how a layer is read, before another attention replaces the model's own."""
        if layer != -1:
            self._reader.prepare()

    @torch.inference_mode()
    def continued(
        self, ids_VT: Tensor, mask_VT: Tensor, cache: Cache, *, position_VT: Tensor | None = None
    ) -> Tensor:
        """Return the last states [V, T, D] of tokens that follow the cache, and add them to it.

        The mask covers the cached tokens too; positions count along it unless they are given.
        """
        inputs = {"input_ids": ids_VT, "attention_mask": mask_VT}
        if self.takes_positions:
            if position_VT is None:
                position_VT = (mask_VT.cumsum(dim=1) - 1).clamp(min=0)
            inputs["position_ids"] = position_VT + self._first_position
        output = self.model(**inputs, past_key_values=cache, use_cache=True, return_dict=True)
        states_VTD: Tensor = output.last_hidden_state
        return states_VTD.to(self.device)

    @contextmanager
    def float32(self) -> Iterator[None]:
        """Hold the weights in float32 within the block; afterwards they are the same to the bit."""
        parts = [self.model, *([self.head.module] if self.head else [])]
        with dequantized(self.model), _widened_rest(parts):
            yield


@contextmanager
def _widened_rest(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Hold the weights that are not quantised in float32 within the block."""
    narrow = [
        (tensor, tensor.dtype)
        for tensor in chain.from_iterable((*p.parameters(), *p.buffers()) for p in parts)
        if tensor.is_floating_point() and tensor.dtype != torch.float32
    ]
    try:
        # Inside `try`: after running out of memory half-way, widened weights are narrowed again.
        for tensor, _ in narrow:
            tensor.data = tensor.data.float()
        yield
    finally:
        # In reverse order: the memory that the last weight left when it was widened is still free.
        for tensor, dtype in reversed(narrow):
            tensor.data = tensor.data.to(dtype)


def load_backbone(recipe: Recipe, *, device: torch.device, gpus: int = 1) -> Backbone:
    """Load the recipe's model on a device, or spread over several GPUs.

    Raises:
        ModelError: the checkpoint lacks weights.
        ResourceError: the GPUs are fewer, or smaller, than the model needs.
    """
    check_quantizer(recipe)
    loaded = load_model(recipe, device=device, gpus=gpus)
    head = LanguageHead(loaded.model) if recipe.reads_logits else None
    backbone = Backbone(
        head.body if head else loaded.model,
        attention=recipe.attention,
        missing=loaded.missing,
        head=head,
    )
    if recipe.quantize != "none":
        quantize_weights(backbone.stack, recipe)
    elif device.type == "cpu" and backbone.model.dtype == torch.float32:
        optimize_for_cpu(backbone)
    return backbone


def optimize_for_cpu(backbone: Backbone) -> None:
    """Replace layers of a float32 model on a CPU by faster ones, where its blocks are known.

    A failure is logged, and the model keeps its own layers.
    """
    # Asked before anything is replaced: transformers records states by the class of a block.
    if not backbone.blocks:
        return
    try:
        # Imported here, so that a change in transformers cannot end a job on a GPU.
        from embedjob.encoder.cpu.optimize import replace_layers

        replace_layers(backbone.blocks)
    except Exception as error:
        _LOG.warning("the model's own layers are used, which are slower: %r", error)


def _first_position(model: PreTrainedModel) -> int:
    """Return the position of a view's first token: RoBERTa counts from the padding id on."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else int(module.padding_idx) + 1
    return 0


def first_device() -> str:
    """Return the device that a model is put on where none is named."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def require_one_model(one: Recipe, other: Recipe) -> None:
    """Raise ConfigError where two recipes need two models."""
    for key in _OF_ONE_MODEL:
        if getattr(one, key) != getattr(other, key):
            raise ConfigError(
                f"encoder.{key}: got {getattr(one, key)} for the role {one.role} and"
                f" {getattr(other, key)} for {other.role}; one encoder holds one model"
            )
