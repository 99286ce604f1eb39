"""Hidden states of the layers that are read; the layers after them are not run.

Legend: V views, T tokens, D width.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_LOG = logging.getLogger(__name__)
_PROBE = (1, 2, 3, 4, 5)
_TOLERANCE = 1e-5


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
    return one.shape == other.shape and bool(difference <= _TOLERANCE * other.float().norm())
