"""Anchors of `method: trajectories`, sampled after texts at hand, and the recipe with them."""

from collections.abc import Sequence

import numpy as np

from embedjob.config.fits.fit_kinds import SampledContinuations
from embedjob.config.recipe import Recipe
from embedjob.encoder.trajectories import sampled_after
from embedjob.input.samples import row_keys
from embedjob.job.resolve import resolve_encoder
from embedjob.methods.catalogue import read_method

METHOD = "trajectories"


def trajectories_recipe(texts: Sequence[str], *, model: str) -> Recipe:
    """The method with anchors after some of the texts, which are drawn as its fit draws rows."""
    method = read_method(METHOD)
    [section] = method.fit
    assert isinstance(section, SampledContinuations)
    texts = [*dict.fromkeys(text for text in texts if text.strip())]
    order = np.argsort(row_keys(METHOD, range(len(texts)), seed=section.seed))
    drawn = [texts[number] for number in order[: section.sample]]
    shared = {"method": METHOD, "model": model, "dtype": "float32"}
    plain = {"heads": [], "aggregation": "mean"}
    before = resolve_encoder({**shared, **plain}, on_gpu=False).recipe
    anchors = sampled_after(before, drawn, section, device="cpu")
    return resolve_encoder({**shared, "heads": [{"continuations": anchors}]}, on_gpu=False).recipe
