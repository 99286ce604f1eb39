"""The generator: texts to what a language model makes of each of them. Needs no Ray.

Legend: S sequences, T tokens, W vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TopPLogitsWarper,
)

from embedjob.config.recipe import Recipe
from embedjob.encoder.batching.scheduler import is_out_of_memory, raising_device_lost
from embedjob.encoder.loading import load_model
from embedjob.errors import EmbedjobError, InterruptedRunError, ModelError
from embedjob.models.components import generator_recipe
from embedjob.models.questions import Question, Questioner, load_questioner
from embedjob.text.conversations import Variant, cleaned, uniforms

# A step costs a GPU about the same for one sequence as for many.
_SEQUENCES, _SEQUENCES_ON_GPU = 16, 128
# Prompts of so many texts are in memory at the same time.
_TEXTS_AT_ONCE = 256
Variants = tuple[Variant, ...]


@dataclass(frozen=True)
class Callbacks:
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
        self,
        numbers_ST: Tensor,
        *,
        prompt: int,
        temperature: float,
        top_p: float,
        callbacks: Callbacks,
    ) -> None:
        """Take a number for each sequence and step; `prompt` is the length of the padded prompts.

        With a temperature of 0 the likeliest token is left to each.
        """
        self._temperature = temperature
        self._nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None
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
        sums_SW = warm_SW.softmax(dim=-1).double().cumsum(dim=-1)
        step = input_ids.shape[1] - self._prompt
        number_S1 = self._numbers_ST[:, step : step + 1].to(sums_SW.device) * sums_SW[:, -1:]
        drawn_S1 = torch.searchsorted(sums_SW, number_S1, right=True)
        drawn_S1 = drawn_S1.clamp(max=sums_SW.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn_S1, 0.0)


class Generator:
    """A language model that makes texts of texts, loaded once and used for many."""

    def __init__(
        self,
        model: PreTrainedModel,
        questioner: Questioner,
        *,
        sequences: Literal["auto"] | int = "auto",
    ) -> None:
        """Take a loaded model; `from_recipe` loads one. `sequences` are written together."""
        self._model = model.eval()
        self._questions = questioner
        self._generation = questioner.generation
        # The model's own settings (top_k, penalties) would change what is drawn.
        self._model.generation_config = GenerationConfig()
        stops = self._generation.stop_ids or ()
        self._settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=self._generation.max_new_tokens,
            eos_token_id=list(stops) or None,
            pad_token_id=stops[0] if stops else 0,
            use_cache=True,
        )
        self._stops = frozenset(stops)
        on_gpu = model.device.type == "cuda"
        usual = _SEQUENCES_ON_GPU if on_gpu else _SEQUENCES
        self._most = usual if sequences == "auto" else sequences

    @classmethod
    def from_recipe(
        cls,
        recipe: Recipe,
        *,
        device: str | None = None,
        gpus: int = 1,
        threads: int | None = None,
        sequences: Literal["auto"] | int = "auto",
    ) -> "Generator":
        """Load the generator of a resolved recipe.

        Args:
            recipe: the recipe, whose `generate` is resolved.
            device: where it runs; the first GPU if there is one, if None.
            gpus: how many GPUs the model is spread over.
            threads: for a process that only generates: torch computes with that many.
            sequences: how many answers are written together.

        Raises:
            ModelError: the recipe has no generator, or its model cannot be loaded.
        """
        own = generator_recipe(recipe)
        if own is None:
            raise ModelError("generate: the recipe has no generator; use a method that has one")
        if threads is not None:
            torch.set_num_threads(threads)
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded = load_model(own, device=torch.device(place), gpus=gpus)
        return cls(loaded.model, load_questioner(recipe), sequences=sequences)

    @raising_device_lost()
    def generate(
        self,
        texts: Sequence[str],
        *,
        stop: Callable[[], bool] = lambda: False,
        moved: Callable[[], None] = lambda: None,
    ) -> list[Variants]:
        """Return what the model makes of each text, in the order of kinds and numbers.

        A blank text is asked nothing about, and has no variants.

        Raises:
            InterruptedRunError: `stop`, which is asked at every step, returned true.
            DeviceLostError: the device failed, and its process must end.
        """
        callbacks = Callbacks(stop, moved)
        made: list[Variants] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            made += self._block(texts[start : start + _TEXTS_AT_ONCE], callbacks)
        return made

    def _block(self, texts: Sequence[str], callbacks: Callbacks) -> list[Variants]:
        first = self._variants(self._questions.transformations(texts), len(texts), callbacks)
        if not self._generation.summaries:
            return first
        asked = self._questions.summaries(texts, first)
        second = self._variants(asked, len(texts), callbacks)
        return [(*one, *other) for one, other in zip(first, second, strict=True)]

    def _variants(
        self, questions: Sequence[Question], texts: int, callbacks: Callbacks
    ) -> list[Variants]:
        """Return the answers to the questions about each of so many texts."""
        of: list[list[Variant]] = [[] for _ in range(texts)]
        for question, ids in zip(questions, self._answers(questions, callbacks), strict=True):
            text = cleaned(self._questions.decode(ids))
            of[question.about].append(Variant(question.kind, question.number, text, len(ids)))
        return [tuple(variants) for variants in of]

    def _answers(self, questions: Sequence[Question], callbacks: Callbacks) -> list[list[int]]:
        """Return the ids of each answer; prompts of about the same length go together."""
        answers: list[list[int]] = [[] for _ in questions]
        order = sorted(range(len(questions)), key=lambda one: -len(questions[one].ids))
        while order:
            which, order = order[: self._most], order[self._most :]
            found = self._attempt([questions[one] for one in which], callbacks)
            for one, ids in zip(which, found, strict=True):
                answers[one] = ids
        return answers

    def _attempt(self, asked: Sequence[Question], callbacks: Callbacks) -> list[list[int]]:
        """Return the answers of one batch, in halves where it fails; none to what fails alone."""
        try:
            with raising_device_lost():
                return self._answered(asked, callbacks)
        except EmbedjobError:
            raise
        except Exception as error:  # of one sequence must not be the end of the others
            out_of_memory = is_out_of_memory(error)
        if out_of_memory:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._most = max(1, min(self._most, len(asked) // 2))
        if len(asked) == 1:
            return [[]]
        middle = len(asked) // 2
        return [
            ids
            for half in (asked[:middle], asked[middle:])
            for ids in self._attempt(half, callbacks)
        ]

    @torch.inference_mode()
    def _answered(self, asked: Sequence[Question], callbacks: Callbacks) -> list[list[int]]:
        ids_ST, mask_ST = padded([one.ids for one in asked], pad=self._settings.pad_token_id)
        steps, prompt = self._generation.max_new_tokens, ids_ST.shape[1]
        numbers_ST = torch.from_numpy(np.stack([uniforms(one.key, steps) for one in asked]))
        sampling = SeededSampling(
            numbers_ST,
            prompt=prompt,
            temperature=self._generation.temperature,
            top_p=self._generation.top_p,
            callbacks=callbacks,
        )
        place, rows = self._model.device, self._model.get_input_embeddings().weight.shape[0]
        # On a GPU an id outside the table would kill the process, not the row.
        if int(ids_ST.max()) >= rows:
            raise ModelError(
                f"generate.model: the tokenizer gave id {int(ids_ST.max())}, but the model embeds"
                f" only {rows}; tokenizer and weights do not belong together"
            )
        whole_ST: Tensor = self._model.generate(
            input_ids=ids_ST.to(place),
            attention_mask=mask_ST.to(place),
            generation_config=self._settings,
            logits_processor=LogitsProcessorList([sampling]),
        )
        return [self._until_stop(row) for row in whole_ST[:, prompt:].tolist()]

    def _until_stop(self, ids: list[int]) -> list[int]:
        ends = (place for place, token in enumerate(ids) if token in self._stops)
        return ids[: next(ends, len(ids))]


def padded(rows: Sequence[Sequence[int]], *, pad: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask [S, T], padded on the left: the next token goes to the right of all."""
    longest = max(map(len, rows))
    ids_ST = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask_ST = torch.zeros((len(rows), longest), dtype=torch.long)
    for row, ids in enumerate(rows):
        ids_ST[row, longest - len(ids) :] = torch.tensor(ids, dtype=torch.long)
        mask_ST[row, longest - len(ids) :] = 1
    return ids_ST, mask_ST
