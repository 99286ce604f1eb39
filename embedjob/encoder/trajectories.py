"""Distances between texts by what a language model goes on with after each of them.

Liu et al., Meaning Representations from Trajectories in Autoregressive Models (arXiv:2310.18348):
continuations are sampled from both texts of a pair, and each is scored after both.

Legend: N pairs, C continuations, S sequences, T tokens, W vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from embedjob.config.fits.fit_kinds import SampledContinuations
from embedjob.config.generation import SLOT, TrajectorySettings
from embedjob.config.heads import Decode
from embedjob.config.recipe import Recipe
from embedjob.encoder.backbone import first_device
from embedjob.encoder.batching.scheduler import raising_device_lost
from embedjob.encoder.loading import load_model
from embedjob.encoder.sampling import Sampling, StepCallbacks, continued
from embedjob.errors import InputError, ModelError, amount
from embedjob.models.architecture import config_of, info_of, is_causal
from embedjob.models.chat_template import special_tokens, stop_ids
from embedjob.models.source import materialize, source_of
from embedjob.models.tokenizer import load_tokenizer, read_tokenizer
from embedjob.text.conversations import draw_key, text_hash
from embedjob.text.fitting import WholePromptFitter
from embedjob.text.prompts import Prompt, prepare

Distances = npt.NDArray[np.float64]
_KIND = "trajectory"
# So many sequences go through a model together.
_SEQUENCES = 40
_Ids = list[int]


@dataclass(frozen=True)
class Draw:
    """How many continuations of a text are drawn, by which seed, and how their tokens are."""

    count: int
    seed: int
    sampling: Sampling


def drawn_continuations(
    model: PreTrainedModel,
    prompts: Mapping[str, _Ids],
    draw: Draw,
    *,
    most: int,
    callbacks: StepCallbacks,
) -> list[list[_Ids]]:
    """Return the continuations of each text after its prompt, as many as `draw` says.

    `most` sequences go through the model together. The token that ends a text counts.
    """
    asked = [
        (ids, draw_key(text_hash(text), seed=draw.seed, kind=_KIND, number=number))
        for text, ids in prompts.items()
        for number in range(draw.count)
    ]
    flat: list[_Ids] = []
    for start in range(0, len(asked), most):
        ids, keys = zip(*asked[start : start + most], strict=True)
        found = continued(model, ids, keys, draw.sampling, callbacks)
        flat += [draw.sampling.until_stop(one, with_stop=True) for one in found]
    return [flat[start : start + draw.count] for start in range(0, len(flat), draw.count)]


@raising_device_lost()
def sampled_after(
    recipe: Recipe,
    texts: Sequence[str],
    section: SampledContinuations,
    *,
    device: str | None = None,
    gpus: int = 1,
    threads: int | None = None,
) -> list[_Ids]:
    """Return the continuations of texts under a recipe's template, in the order of the texts.

    They are those by which `Trajectories` compares the texts, where prompt and seed are the same.

    Args:
        recipe: a resolved recipe of one template; its pooling and heads are not asked.
        texts: distinct texts that are not blank.
        section: how many there are of each text, and how long they are.
        device: where the model runs; the first GPU if there is one, if None.
        gpus: how many GPUs the model is spread over.
        threads: for a process that only samples: torch computes with that many.

    Raises:
        ModelError: the model cannot be loaded.
        InputError: a text has no token.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    room = recipe.max_tokens - section.max_new_tokens
    own = {"max_tokens": room, "span": "last_token", "decode": Decode(), "heads": ()}
    asked = recipe.model_copy(update=own)
    views = load_tokenizer(asked).views(texts)
    rows = [views.full_ids(view).tolist() for view in range(len(texts))]
    if [] in rows:
        raise InputError(f"text {texts[rows.index([])]!r} has no token; leave it out")
    directory = materialize(source_of(asked), tokenizer_only=True)
    stops = stop_ids(directory, special_tokens(directory))
    place = torch.device(device or first_device())
    model = load_model(asked, device=place, gpus=gpus).model.eval()
    draw = Draw(
        section.count, section.seed, Sampling(1.0, 1.0, section.max_new_tokens, tuple(stops))
    )
    unwatched = StepCallbacks(lambda: False, lambda: None)
    prompts = dict(zip(texts, rows, strict=True))
    found = drawn_continuations(model, prompts, draw, most=_SEQUENCES, callbacks=unwatched)
    return [ids for each in found for ids in each]


class Trajectories:
    """A language model that compares texts by their continuations, loaded once for many pairs."""

    def __init__(
        self,
        model: PreTrainedModel,
        fitter: WholePromptFitter,
        settings: TrajectorySettings,
        *,
        stops: Sequence[int],
        sequences: int = _SEQUENCES,
    ) -> None:
        """Take a loaded model; `load` loads one. `sequences` go through it together."""
        self._model = model.eval()
        self._fitter = fitter
        self._settings = settings
        self._sampling = Sampling(settings.temperature, 1.0, settings.max_new_tokens, tuple(stops))
        self._pad = stops[0] if stops else 0
        self._most = sequences

    @classmethod
    def load(
        cls,
        model: str,
        settings: TrajectorySettings,
        *,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        device: str | None = None,
        threads: int | None = None,
    ) -> "Trajectories":
        """Load a language model by its name, as in `encoder.model`.

        Without a device, the first GPU is taken if there is one; without a dtype, bfloat16 there
        and float32 on a CPU.

        Raises:
            ModelError: there is no such model, or it predicts no next token.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        place = torch.device(device or first_device())
        kind = dtype or ("float32" if place.type == "cpu" else "bfloat16")
        recipe = Recipe(model=model, dtype=kind, span="last_token", decode=Decode())
        directory = materialize(source_of(recipe), tokenizer_only=True)
        if not is_causal(config_of(directory)):
            raise ModelError(
                f"model: {model} is an encoder, which predicts no next token; allowed is a"
                " language model"
            )
        positions = info_of(config_of(directory)).max_positions
        most, answer = settings.max_tokens, settings.max_new_tokens
        if positions is not None and positions <= answer:
            raise ModelError(
                f"max_new_tokens: got {answer}, but {model} has {positions} positions; lower it"
            )
        most = most if positions is None else min(most, positions - answer)
        before, _, after = settings.prompt.partition(SLOT)
        fitter = WholePromptFitter(
            read_tokenizer(directory),
            [Prompt(before, after)],
            special_tokens=True,
            needs_text=False,
        )
        fitter.limit(np.array([most], np.int64))
        stops = stop_ids(directory, special_tokens(directory))
        loaded = load_model(recipe, device=place)
        return cls(loaded.model, fitter, settings, stops=stops)

    @raising_device_lost()
    def distances(
        self,
        left: Sequence[str],
        right: Sequence[str],
        *,
        stop: Callable[[], bool] = lambda: False,
        moved: Callable[[], None] = lambda: None,
    ) -> Distances:
        """Return the distance of each pair [N]: the sum of absolute differences (L1).

        They are the differences of the mean log-probabilities of the continuations of both texts,
        after the one text and after the other. A text's continuations are the same in all pairs.

        Raises:
            InputError: the sides have different lengths, or a text has no token.
            InterruptedRunError: `stop`, which is asked at every step, returned true.
        """
        if len(left) != len(right):
            raise InputError(
                f"got {amount(len(left), 'text')} on the left and {len(right):,} on the right;"
                " pairs need equally many on both sides"
            )
        callbacks = StepCallbacks(stop, moved)
        texts = list(dict.fromkeys([*left, *right]))
        prompts = dict(zip(texts, self._prompts(texts), strict=True))
        sampled = dict(zip(texts, self._sampled(prompts, callbacks), strict=True))
        found = np.empty(len(left))
        for pair, (one, other) in enumerate(zip(left, right, strict=True)):
            continuations = [*sampled[one], *sampled[other]]
            first, second = (
                self._scores(prompts[text], continuations, callbacks) for text in (one, other)
            )
            found[pair] = np.abs(first - second).sum()
        return found

    def _prompts(self, texts: Sequence[str]) -> list[_Ids]:
        clean = prepare(self._settings.prepare)
        cleaned = [clean(text) for text in texts]
        rows = self._fitter.fit([0] * len(cleaned), cleaned).ids
        for number, ids in enumerate(rows):
            if not ids:
                raise InputError(
                    f"text {texts[number]!r} has no token, after which nothing can be sampled;"
                    " leave it out, or set a prompt"
                )
        return rows

    def _sampled(self, prompts: Mapping[str, _Ids], callbacks: StepCallbacks) -> list[list[_Ids]]:
        """Return the continuations of each text."""
        settings = self._settings
        draw = Draw(settings.count, settings.seed, self._sampling)
        return drawn_continuations(self._model, prompts, draw, most=self._most, callbacks=callbacks)

    @torch.inference_mode()
    def _scores(
        self, prompt: _Ids, continuations: Sequence[_Ids], callbacks: StepCallbacks
    ) -> Distances:
        """Return the mean log-probability of the tokens of each continuation [C]."""
        scores: list[float] = []
        for start in range(0, len(continuations), self._most):
            callbacks.moved()
            some = continuations[start : start + self._most]
            found_ST = self._log_probabilities(prompt, some)
            for row, one in zip(found_ST.double().cpu(), some, strict=True):
                scores.append(float(row[: len(one)].mean()))
        return np.array(scores)

    def _log_probabilities(self, prompt: _Ids, some: Sequence[_Ids]) -> Tensor:
        """Return log-probabilities [S, T] of continuations; the prompt before them runs once.

        Padding is on the right, where no token attends to it; what stands there is no score.
        """
        model, tau = self._model, self._settings.temperature
        longest = max(map(len, some))
        ids_ST = torch.tensor([[*one, *[self._pad] * (longest - len(one))] for one in some])
        ids_ST = ids_ST.to(model.device)
        prompt_1T = torch.tensor([prompt]).to(model.device)
        read = model(input_ids=prompt_1T, use_cache=True, logits_to_keep=1)
        found = [_picked(read.logits.expand(len(some), -1, -1), ids_ST[:, :1], tau)]
        if longest > 1:
            read.past_key_values.batch_repeat_interleave(len(some))
            after = model(
                input_ids=ids_ST[:, :-1], past_key_values=read.past_key_values, use_cache=True
            )
            found.append(_picked(after.logits, ids_ST[:, 1:], tau))
        return torch.cat(found, dim=1)


def _picked(logits_STW: Tensor, ids_ST: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities [S, T] of the given ids alone."""
    scores_STW = (logits_STW.float() / temperature).log_softmax(dim=-1)
    return scores_STW.gather(2, ids_ST[:, :, None])[:, :, 0]
