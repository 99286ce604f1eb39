"""Variants: texts that a generator made of a text, embedded beside it and averaged with it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from embedjob.text.arrays import offsets_of
from embedjob.text.long_text import regroup_units
from embedjob.text.views import TextUnits, TokenViews


class MakesViews(Protocol):
    """A tokenizer of texts under templates."""

    def views(self, texts: Sequence[str]) -> TokenViews:
        """Return one view per text and template, text-major."""
        ...


def views_with_variants(
    tokenizer: MakesViews, texts: Sequence[str], variants: Sequence[Sequence[str]]
) -> TokenViews:
    """Return the views of texts whose units are each text and its variants, which count alike.

    `truncated` is of the texts themselves. A variant without a token that counts is left out.
    """
    every = [one for text, own in zip(texts, variants, strict=True) for one in (text, *own)]
    offsets = offsets_of(np.array([1 + len(own) for own in variants], np.int64))
    views = tokenizer.views(every)
    original = np.zeros(len(every), np.bool_)
    original[offsets[:-1]] = True
    own = np.repeat(original, views.views_per_text)
    views = replace(views, truncated=views.truncated & own)
    grouped = regroup_units(views, offsets, np.ones(len(views.prefix), np.int64))
    if grouped.auxiliary is None or grouped.cuts is None:
        return grouped
    # Of each unit one more view, which goes where its unit goes.
    weights = np.ones(grouped.auxiliary.units, np.int64)
    auxiliary = replace(grouped.auxiliary, cuts=TextUnits(grouped.cuts.offsets, weights))
    return replace(grouped, auxiliary=auxiliary)
