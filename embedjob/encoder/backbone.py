"""A transformer without a head: padded token ids in, hidden states out.

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
from embedjob.encoder.loading import dequantized, load_model, quantize
from embedjob.encoder.outputs.language_model import LanguageHead
from embedjob.errors import ModelError
from embedjob.models.architecture import ModelInfo, check_quantizer, info_of, windows_of

_LOG = logging.getLogger(__name__)
_PROBE = (1, 2, 3, 4, 5)
_ROUNDING = 1e-5


class _Enough(Exception):
    """All that is read is there."""


class LayerReader:
    """Reads hidden states 0 (the embeddings) to `layers` (after the final norm) of a model."""

    def __init__(self, model: PreTrainedModel, *, layers: int, vocabulary: int) -> None:
        """Finds the model's blocks, and runs nothing yet."""
        self._model = model
        self._layers = layers
        self._vocabulary = vocabulary
        stacks = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers)
        self.stack = next(stacks, None)
        self._stops: bool | None = None

    def read(self, inputs: Mapping[str, Tensor], layers: frozenset[int]) -> dict[int, Tensor]:
        """The hidden states [V, T, D] of these layers."""
        if layers == {self._layers}:
            return {self._layers: self._model(**inputs, return_dict=True).last_hidden_state}
        known = self.blocks is not None
        return self._stopping(inputs, layers) if known else self._running(inputs, layers)

    @property
    def blocks(self) -> nn.ModuleList | None:
        """The model's blocks, if what goes into block i is seen to be hidden state i."""
        self.prepare()
        return self.stack if self._stops else None

    def prepare(self) -> None:
        """Finds out how layers are read, if that is not known: with attention as it is."""
        if self._stops is None:
            self._stops = self._proven()

    def _running(self, inputs: Mapping[str, Tensor], layers: frozenset[int]) -> dict[int, Tensor]:
        output = self._model(**inputs, output_hidden_states=True, return_dict=True)
        states = (*output.hidden_states[: self._layers], output.last_hidden_state)
        return {layer: states[layer] for layer in layers}

    def _stopping(self, inputs: Mapping[str, Tensor], layers: frozenset[int]) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        with self._watched(found, layers):
            try:
                output = self._model(**inputs, return_dict=True)
            except _Enough:
                return found
        return {**found, self._layers: output.last_hidden_state}

    @contextmanager
    def _watched(self, found: dict[int, Tensor], layers: frozenset[int]) -> Iterator[None]:
        """Within it the blocks put their states into `found`, and the last that is read ends it."""
        with ExitStack() as hooks:
            for layer in layers - {self._layers}:

                def keep(_: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
                    found[layer] = args[0] if args else kwargs["hidden_states"]
                    if layer == max(layers):
                        raise _Enough

                # What goes into block i is hidden state i.
                block: nn.Module = self.stack[layer]  # type: ignore[index]
                handle = block.register_forward_pre_hook(keep, with_kwargs=True)
                hooks.callback(handle.remove)
            yield

    @torch.inference_mode()
    def _proven(self) -> bool:
        """Whether the blocks' inputs are the hidden states that the model itself would report."""
        if self.stack is not None:
            place: torch.device = next(self._model.parameters()).device
            ids_VT = torch.tensor([_PROBE], device=place).remainder(self._vocabulary)
            inputs = {"input_ids": ids_VT, "attention_mask": torch.ones_like(ids_VT)}
            every = frozenset(range(self._layers + 1))
            expected = self._running(inputs, every)
            try:
                found = self._stopping(inputs, every)
            except (KeyError, TypeError, AttributeError) as error:
                found = {}
                _LOG.debug("blocks cannot be read: %s", error)
            if set(found) == every and all(_alike(found[i], expected[i]) for i in every):
                return True
        _LOG.warning("All layers are run: what %s reads is not known", type(self._model).__name__)
        return False


def _alike(one: Tensor, other: Tensor) -> bool:
    # A spread model reports all states where its ids came in, and its blocks have them elsewhere.
    one = one.to(other.device)
    difference = (one.float() - other.float()).norm()
    return one.shape == other.shape and bool(difference <= _ROUNDING * other.float().norm())


ReadLayer = int | tuple[int, ...]
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}


class Backbone:
    """A loaded model whose attention looks the way that was asked for."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        attention: Attention,
        missing: Collection[str] = (),
        head: LanguageHead | None = None,
    ) -> None:
        """Sets the model's attention, and refuses one that then does not look that way.

        `missing` are the weights of its pooler that the checkpoint did not have, `head`
        its own language-model head where a recipe reads logits.
        """
        self.model = model.eval()
        self.head = head
        self.missing = frozenset(missing)
        # By how much of their norm states may differ that went another way through the model.
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
        """Where ids go in and states come out; of a model that is spread, its embeddings' place."""
        place: torch.device = self.model.get_input_embeddings().weight.device
        return place

    @property
    def width(self) -> int:
        """The length of one hidden state."""
        return self.info.hidden_size

    @property
    def vocabulary(self) -> int:
        """How many token ids have an embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def stack(self) -> nn.ModuleList | None:
        """As many modules as the model has layers, whatever goes into them."""
        return self._reader.stack

    @property
    def blocks(self) -> nn.ModuleList | None:
        """The model's blocks, if what goes into block i is hidden state i."""
        return self._reader.blocks

    @property
    def windows(self) -> tuple[int, ...]:
        """Over how many tokens parts of its attention reach, where that is limited."""
        # As it runs: what a config would write to a file is another number in Gemma 3.
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
        ids_VT, mask_VT = to_device(ids_VT, self.device), to_device(mask_VT, self.device)
        inputs = {"input_ids": ids_VT, "attention_mask": mask_VT.long()}
        if self.takes_positions:
            if isinstance(position, int):
                position = (mask_VT.long().cumsum(dim=1) - 1).clamp(min=0) + position
            inputs["position_ids"] = to_device(position, self.device) + self._first_position
        chosen = self._numbers(layer)
        found = self._reader.read(inputs, frozenset(chosen))
        if len(chosen) == 1:
            return found[chosen[0]].to(self.device)
        return torch.stack([found[one].to(self.device) for one in chosen]).mean(dim=0)

    def _numbers(self, layer: ReadLayer) -> list[int]:
        """Of hidden states, one more than there are blocks: 0 is the embeddings."""
        return [one % (self.info.layers + 1) for one in np.atleast_1d(layer).tolist()]

    def prepare(self, layer: ReadLayer) -> None:
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
        states_VTD: Tensor = output.last_hidden_state
        return states_VTD.to(self.device)

    @contextmanager
    def float32(self) -> Iterator[None]:
        """Within it the weights are float32; afterwards they are, to the bit, what they were."""
        parts = [self.model, *([self.head.module] if self.head else [])]
        with dequantized(self.model), _widened_rest(parts):
            yield


@contextmanager
def _widened_rest(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Within it the weights that are not quantised are float32."""
    narrow = [
        (tensor, tensor.dtype)
        for tensor in chain.from_iterable((*p.parameters(), *p.buffers()) for p in parts)
        if tensor.is_floating_point() and tensor.dtype != torch.float32
    ]
    try:
        # Within: out of memory half-way, those before it must be narrowed again.
        for tensor, _ in narrow:
            tensor.data = tensor.data.float()
        yield
    finally:
        # The last one first: the room that it left when it was widened is still free.
        for tensor, dtype in reversed(narrow):
            tensor.data = tensor.data.to(dtype)


def load_backbone(recipe: Recipe, *, device: torch.device, gpus: int = 1) -> Backbone:
    """The recipe's model on a device, or spread over several GPUs; ModelError if it is not whole.

    Raises:
        ResourceError: the GPUs are fewer, or smaller, than the model needs.
    """
    check_quantizer(recipe)
    found = load_model(recipe, device=device, gpus=gpus)
    head = LanguageHead(found.model) if recipe.reads_logits else None
    backbone = Backbone(
        head.body if head else found.model,
        attention=recipe.attention,
        missing=found.missing,
        head=head,
    )
    if recipe.quantize != "none":
        quantize(backbone.stack, recipe)
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
    """The position of a view's first token: RoBERTa and its kin count from the padding id on."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else int(module.padding_idx) + 1
    return 0
