"""Decoders that are steered: their recipes, and texts beside the auxiliary ones."""

from functools import cache
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from embedjob.config.interventions import Contrast, Contrasting, Prepend, Prepending
from embedjob.config.recipe import Recipe
from embedjob.encoder.backbone import Backbone
from embedjob.encoder.batching.padding import Side
from embedjob.text.views import TokenViews, assemble
from tests.encoder import tiny

SLOT, ROW_SEED, AT = 9999, 5, 7
PREFIX, BESIDE = list(range(20, 30)), list(range(40, 47))
BOTH = (
    Prepending(prepend=Prepend(slot="<PST>", start=1, exit=2, seed=ROW_SEED)),
    Contrasting(contrast=Contrast(template="Not {text}", layer=0, alpha=1.5)),
)
WAYS: list[tuple[Side, int]] = [("right", 1000), ("right", 1), ("left", 1000)]


def inner(name: str) -> PreTrainedModel:
    return tiny.model(name).base_model


@cache
def backbone(name: str) -> Backbone:
    return Backbone(inner(name), attention="causal")


def recipe(*interventions: Any, **knobs: Any) -> Recipe:
    return Recipe(model="none", max_tokens=64, finish=(), interventions=interventions, **knobs)


@cache
def texts() -> list[list[int]]:
    random = np.random.default_rng(3)
    return [random.integers(3, 590, size).tolist() for size in (1, 4, 9, 9, 17)]


def views(*, contrasted: bool = True) -> TokenViews:
    """Texts after ten shared tokens, the one at AT the slot; their auxiliary views beside them."""
    begin = [*PREFIX[:AT], SLOT, *PREFIX[AT + 1 :]]
    main = _views([[*begin, *text, 5] for text in texts()], begin[:AT])
    beside = _views([[*BESIDE, *text, 6, 7] for text in texts()], BESIDE)
    found = {"slots": (AT,), **({"auxiliary": beside} if contrasted else {})}
    return TokenViews(**{**vars(main), **found})


def _views(rows: list[list[int]], prefix: list[int]) -> TokenViews:
    span = np.array([[len(row) - 1, len(row)] for row in rows], np.int32)
    whole = np.zeros(len(rows), np.bool_)
    return assemble(rows, span=span, truncated=whole, prefixes=[prefix])
