"""Which vector is whose, where views are pooled part by part.

Legend: R texts, V views, F different views.
"""

import numpy as np

from embedjob.encoder.batches import Indices
from embedjob.text.runs import gather, offsets_of
from embedjob.text.views import TokenViews


def vector_offsets(views: TokenViews, firsts: Indices) -> Indices:
    """Where the vectors of each of these views begin among those of all, and the end [F + 1].

    A view has one, or one of each of its parts.
    """
    if views.parts is None:
        return np.arange(len(firsts) + 1)
    return offsets_of(np.diff(views.parts.offsets)[firsts])


def vectors_of(views: TokenViews, which: Indices, offsets: Indices) -> Indices:
    """The vectors of every unit [U, V], of which view i is different view number which[i].

    Of views in parts, the vector of every part [P, 1].
    """
    if views.parts is None:
        return which.reshape(-1, views.views_per_text)
    return gather(offsets, which)[0][:, None]


def alike(offsets: Indices, chosen: Indices) -> list[Indices]:
    """The chosen ones of different views in runs of as many vectors each, most first."""
    counts = np.diff(offsets)[chosen]
    return [chosen[counts == count] for count in np.unique(counts)[::-1]]
