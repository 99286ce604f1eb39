"""The generator: texts to what a language model makes of each of them. Needs no Ray."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from transformers import (
    PreTrainedModel,
)

from embedjob.config.recipe import Recipe
from embedjob.encoder.backbone import first_device
from embedjob.encoder.batching.scheduler import is_out_of_memory, raising_device_lost
from embedjob.encoder.loading import load_model
from embedjob.encoder.sampling import Sampling, StepCallbacks, continued
from embedjob.errors import EmbedjobError, ModelError
from embedjob.models.components import generator_recipe
from embedjob.models.questions import Question, Questioner, load_questioner
from embedjob.text.conversations import Variant, cleaned

# A step costs a GPU about the same for one sequence as for many.
_SEQUENCES, _SEQUENCES_ON_GPU = 16, 128
# Prompts of so many texts are in memory at the same time.
_TEXTS_AT_ONCE = 256
Variants = tuple[Variant, ...]


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
        made = self._generation
        self._sampling = Sampling(
            made.temperature, made.top_p, made.max_new_tokens, made.stop_ids or ()
        )
        on_gpu = model.device.type == "cuda"
        usual = _SEQUENCES_ON_GPU if on_gpu else _SEQUENCES
        self._most = usual if sequences == "auto" else sequences
        self._tell: Callable[[int, int], None] = lambda answers, tokens: None
        self._so_far = (0, 0)

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
        place = device or first_device()
        loaded = load_model(own, device=torch.device(place), gpus=gpus)
        return cls(loaded.model, load_questioner(recipe), sequences=sequences)

    @raising_device_lost()
    def generate(
        self,
        texts: Sequence[str],
        *,
        stop: Callable[[], bool] = lambda: False,
        moved: Callable[[], None] = lambda: None,
        answered: Callable[[int, int], None] = lambda answers, tokens: None,
    ) -> list[Variants]:
        """Return what the model makes of each text, in the order of kinds and numbers.

        A blank text is asked nothing about, and has no variants. `answered` is told after each
        batch how many answers there are so far, and their tokens.

        Raises:
            InterruptedRunError: `stop`, which is asked at every step, returned true.
            DeviceLostError: the device failed, and its process must end.
        """
        callbacks = StepCallbacks(stop, moved)
        self._tell, self._so_far = answered, (0, 0)
        made: list[Variants] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            made += self._block(texts[start : start + _TEXTS_AT_ONCE], callbacks)
        return made

    def _block(self, texts: Sequence[str], callbacks: StepCallbacks) -> list[Variants]:
        first = self._variants(self._questions.transformations(texts), len(texts), callbacks)
        if not self._generation.summaries:
            return first
        asked = self._questions.summaries(texts, first)
        second = self._variants(asked, len(texts), callbacks)
        return [(*one, *other) for one, other in zip(first, second, strict=True)]

    def _variants(
        self, questions: Sequence[Question], texts: int, callbacks: StepCallbacks
    ) -> list[Variants]:
        """Return the answers to the questions about each of so many texts."""
        of: list[list[Variant]] = [[] for _ in range(texts)]
        for question, ids in zip(questions, self._answers(questions, callbacks), strict=True):
            text = cleaned(self._questions.decode(ids))
            of[question.about].append(Variant(question.kind, question.number, text, len(ids)))
        return [tuple(variants) for variants in of]

    def _answers(self, questions: Sequence[Question], callbacks: StepCallbacks) -> list[list[int]]:
        """Return the ids of each answer; prompts of about the same length go together."""
        answers: list[list[int]] = [[] for _ in questions]
        order = sorted(range(len(questions)), key=lambda one: -len(questions[one].ids))
        while order:
            which, order = order[: self._most], order[self._most :]
            found = self._attempt([questions[one] for one in which], callbacks)
            for one, ids in zip(which, found, strict=True):
                answers[one] = ids
            before, tokens = self._so_far
            self._so_far = (before + len(found), tokens + sum(map(len, found)))
            self._tell(*self._so_far)
        return answers

    def _attempt(self, asked: Sequence[Question], callbacks: StepCallbacks) -> list[list[int]]:
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

    def _answered(self, asked: Sequence[Question], callbacks: StepCallbacks) -> list[list[int]]:
        keys = [one.key for one in asked]
        prompts = [one.ids for one in asked]
        found = continued(self._model, prompts, keys, self._sampling, callbacks)
        return [self._sampling.until_stop(ids) for ids in found]
