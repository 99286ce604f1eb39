"""The plain forward of a tiny model, one view at a time, and when vectors count as its own."""

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2Model, MistralConfig, MistralModel, PreTrainedModel

from embedjob.config.recipe import Recipe
from embedjob.encoder.backbone import Backbone, optimize_for_cpu
from embedjob.encoder.cpu import optimize
from embedjob.text.views import TokenViews
from embedjob.vectors.poolers import POOLERS
from tests.encoder import tiny

WIDE: Mapping[str, Callable[[], PreTrainedModel]] = {
    "mistral, window 20": lambda: MistralModel(MistralConfig(**tiny.GROUPED, sliding_window=20)),
    "gemma2, window 20": lambda: Gemma2Model(Gemma2Config(**tiny.GROUPED, sliding_window=20)),
}


@cache
def inner(name: str) -> PreTrainedModel:
    if name in WIDE:
        torch.manual_seed(7)
        return WIDE[name]().eval()
    model = tiny.model(name)
    return model.base_model if name in tiny.DECODERS else model


@cache
def backbone(name: str) -> Backbone:
    return Backbone(inner(name), attention="bidirectional" if name in tiny.ENCODERS else "causal")


@cache
def quick(name: str) -> Backbone:
    """The same, its layers in the forms that a CPU with AVX-512 is given."""
    model = copy.deepcopy(inner(name))
    made = Backbone(model, attention="bidirectional" if name in tiny.ENCODERS else "causal")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimize, "has_avx512", lambda: True)
        optimize_for_cpu(made)
    return made


def recipe(**knobs: Any) -> Recipe:
    """One vector after the other, as they come out of the pooling."""
    return Recipe(model="none", max_tokens=64, finish=(), aggregation="concat", **knobs)


def reference(name: str, views: TokenViews, made: Recipe) -> np.ndarray:
    """The vectors [V, D] by one plain forward each, with every layer run."""
    vectors = []
    for view in range(len(views.prefix)):
        ids = torch.from_numpy(views.full_ids(view).astype(np.int64))[None]
        with torch.inference_mode():
            states = inner(name)(input_ids=ids, output_hidden_states=True).hidden_states
        layers = (made.layer,) if isinstance(made.layer, int) else made.layer
        hidden = torch.stack([states[layer] for layer in layers]).mean(dim=0)
        start, stop = views.span[view]
        span = (torch.arange(ids.shape[1]) >= start) & (torch.arange(ids.shape[1]) < stop)
        vectors.append(POOLERS[made.pooling](hidden, span[None])[0].numpy())
    return np.stack(vectors)


def same(one: np.ndarray, other: np.ndarray) -> bool:
    norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    cosine = (one * other).sum(axis=-1) / norms
    error = np.abs(one - other).max(axis=-1) / np.abs(other).max(axis=-1)
    return bool((cosine >= 0.99999).all() and (error <= 1e-4).all())
