"""Sampling: what a language model goes on with, by numbers that belong to each sequence alone.

Legend: S sequences, T tokens, W vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TopPLogitsWarper,
)

from embedjob.errors import InterruptedRunError, ModelError
from embedjob.text.conversations import uniforms


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, how many there are at most, and the ids that end a sequence.

    With a temperature of 0 the likeliest token is taken.
    """

    temperature: float
    top_p: float
    steps: int
    stops: tuple[int, ...]

    def until_stop(self, ids: Sequence[int], *, with_stop: bool = False) -> list[int]:
        """Return a sequence up to the first id that ends it, which may count itself."""
        ends = (place + with_stop for place, token in enumerate(ids) if token in self.stops)
        return list(ids[: next(ends, len(ids))])


@dataclass(frozen=True)
class StepCallbacks:
    """Called at every step: whether to stop, and that the generator got on."""

    stop: Callable[[], bool]
    moved: Callable[[], None]


class SeededSampling(LogitsProcessor):
    """Draws the next token of each sequence by a number of the sequence's own, for each step.

    The number picks a token by the sum of probabilities before it, in the order of ids. So what is
    drawn depends on the sequence alone, and on its neighbours as far as rounding does: where a
    number lies within rounding of the border between two tokens.
    """

    def __init__(
        self, numbers_ST: Tensor, sampling: Sampling, *, prompt: int, callbacks: StepCallbacks
    ) -> None:
        """Take a number for each sequence and step; padded prompts have the length `prompt`."""
        self._temperature = sampling.temperature
        self._nucleus = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None
        self._numbers_ST = numbers_ST
        self._prompt = prompt
        self._callbacks = callbacks

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return scores [S, W] that leave one token to each sequence."""
        if self._callbacks.stop():
            raise InterruptedRunError("stopped between two tokens")
        self._callbacks.moved()
        if not self._temperature:
            return scores
        warm_SW = scores.float() / self._temperature
        if self._nucleus is not None:
            warm_SW = self._nucleus(input_ids, warm_SW)
        step = input_ids.shape[1] - self._prompt
        drawn_S1 = drawn_tokens(warm_SW, self._numbers_ST[:, step : step + 1])
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn_S1, 0.0)


def drawn_tokens(scores_SW: Tensor, number_S1: Tensor) -> Tensor:
    """Return the token [S, 1] that each sequence's number in [0, 1) picks by its scores.

    The first token, in the order of ids, up to which probabilities sum up to more than the number.
    """
    sums_SW = scores_SW.softmax(dim=-1).double().cumsum(dim=-1)
    reached_S1 = number_S1.to(sums_SW.device) * sums_SW[:, -1:]
    found_S1 = torch.searchsorted(sums_SW, reached_S1, right=True)
    return found_S1.clamp(max=sums_SW.shape[1] - 1)


@torch.inference_mode()
def continued(
    model: Any,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[bytes],
    sampling: Sampling,
    callbacks: StepCallbacks,
) -> list[list[int]]:
    """Return the ids with which a model goes on after each prompt, together and padded at the end.

    `keys` give the numbers of each sequence. A sequence that ends earlier than another has padding
    after the id that ends it.

    The model is one of transformers.

    Raises:
        ModelError: an id has no embedding.
        InterruptedRunError: `callbacks.stop`, which is asked at every step, returned true.
    """
    # The model's own settings (top_k, penalties) would change what is drawn.
    model.generation_config = GenerationConfig()
    pad = sampling.stops[0] if sampling.stops else 0
    ids_ST, mask_ST = _padded(prompts, pad=pad)
    rows = model.get_input_embeddings().weight.shape[0]
    # On a GPU an id outside the table would kill the process, not the row.
    if int(ids_ST.max()) >= rows:
        raise ModelError(
            f"the tokenizer gave id {int(ids_ST.max())}, but the model embeds only {rows};"
            " tokenizer and weights do not belong together"
        )
    numbers_ST = torch.from_numpy(np.stack([uniforms(key, sampling.steps) for key in keys]))
    drawing = SeededSampling(numbers_ST, sampling, prompt=ids_ST.shape[1], callbacks=callbacks)
    whole_ST: Tensor = model.generate(
        input_ids=ids_ST.to(model.device),
        attention_mask=mask_ST.to(model.device),
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=sampling.steps,
            eos_token_id=list(sampling.stops) or None,
            pad_token_id=pad,
            use_cache=True,
        ),
        logits_processor=LogitsProcessorList([drawing]),
    )
    new_ids: list[list[int]] = whole_ST[:, ids_ST.shape[1] :].tolist()
    return new_ids


def _padded(rows: Sequence[Sequence[int]], *, pad: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask [S, T], padded on the left: the next token goes to the right of all."""
    longest = max(map(len, rows))
    ids_ST = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask_ST = torch.zeros((len(rows), longest), dtype=torch.long)
    for row, ids in enumerate(rows):
        ids_ST[row, longest - len(ids) :] = torch.tensor(ids, dtype=torch.long)
        mask_ST[row, longest - len(ids) :] = 1
    return ids_ST, mask_ST
