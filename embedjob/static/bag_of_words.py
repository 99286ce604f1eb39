"""The encoder of vocabularies: sparse rows of weighted counts, and a sketch of each; no torch.

Weights are scikit-learn's (TfidfTransformer): the count of a term, or 1 + ln(count), times its idf,
and the row scaled to unit length. A sketch adds every weight with a random sign at one of a few
hundred places that a hash of the term gives: the dot product of two sketches is on average that of
the rows (Charikar, Chen and Farach-Colton, ICALP 2002; Weinberger et al., arXiv:0902.2206).

Legend: R texts, N entries of all rows, V terms, D places of a sketch.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from embedjob.config.heads import BagOfWords
from embedjob.config.recipe import Recipe
from embedjob.errors import InterruptedRunError
from embedjob.input.samples import mixed
from embedjob.models.source import materialize, source_of
from embedjob.models.tables.static_tables import read_vocabulary
from embedjob.static.lookup_encoder import LookupEncoder
from embedjob.text.arrays import Ints, offsets_of
from embedjob.text.views import TokenViews
from embedjob.vectors.encoded import Encoded, Vectors
from embedjob.vectors.finishing import NO_FITS
from embedjob.vectors.fits.fitted import Fitted
from embedjob.vectors.sparse import Sparse
from embedjob.vectors.vocabulary import SKETCH, Vocabulary

_TEXTS_AT_ONCE = 4096
_NOTHING = ("empty_span", "no term of the text is in the vocabulary")


def static_encoder(
    recipe: Recipe, *, fitted: Mapping[str, Fitted] = NO_FITS
) -> "LookupEncoder | BagOfWordsEncoder":
    """Open what a resolved recipe names: a table of vectors, or a vocabulary."""
    vocabulary = read_vocabulary(materialize(source_of(recipe)))
    if vocabulary is None:
        return LookupEncoder(recipe, fitted=fitted)
    return BagOfWordsEncoder(recipe, vocabulary)


class BagOfWordsEncoder:
    """A vocabulary and its weights, opened once and used for many texts."""

    def __init__(self, recipe: Recipe, vocabulary: Vocabulary) -> None:
        """Take a vocabulary, and a recipe whose head is `bag_of_words`."""
        self.recipe = recipe
        [head] = recipe.heads
        assert isinstance(head, BagOfWords)
        self._head = head.bag_of_words
        self._idf_V = (
            vocabulary.idf(smooth=self._head.smooth_idf)
            if self._head.weights == "tfidf"
            else np.ones(len(vocabulary.terms))
        )

    def encode_views(
        self,
        views: TokenViews,
        *,
        stop: Callable[[], bool] = lambda: False,
        on_progress: Callable[[int, int], None] = lambda texts, tokens: None,
    ) -> Encoded:
        """Return the sparse rows of the views' texts, their sketches, and which texts have none.

        `stop` is asked between blocks of texts, and answers with InterruptedRunError; `on_progress`
        is told the texts and tokens done so far.
        """
        started = time.monotonic()
        sketches_RD = np.full((views.texts, SKETCH), np.nan, np.float32)
        parts: list[tuple[Ints, npt.NDArray[np.uint32], npt.NDArray[np.float32]]] = []
        for first in range(0, views.texts, _TEXTS_AT_ONCE):
            if stop():
                raise InterruptedRunError("stopped between two blocks of texts")
            last = min(views.texts, first + _TEXTS_AT_ONCE)
            rows = self._rows(views, first, last)
            parts.append((np.diff(rows.offsets), rows.indices, rows.values))
            full = np.flatnonzero(np.diff(rows.offsets))
            sketches_RD[first + full] = sketches(rows)[full]
            on_progress(last, int(views.offsets[last]))
        sizes = [np.empty(0, np.int64), *(part[0] for part in parts)]
        sparse = Sparse(
            offsets_of(np.concatenate(sizes)),
            np.concatenate([np.empty(0, np.uint32), *(part[1] for part in parts)]),
            np.concatenate([np.empty(0, np.float32), *(part[2] for part in parts)]),
        )
        failed = {int(text): _NOTHING for text in np.flatnonzero(np.diff(sparse.offsets) == 0)}
        stats = {"compute_seconds": time.monotonic() - started}
        return Encoded(sketches_RD, failed, stats, sparse=sparse)

    def _rows(self, views: TokenViews, first: int, last: int) -> Sparse:
        """Return the weighted rows of some texts."""
        offsets = views.offsets[first : last + 1]
        ids = views.ids[offsets[0] : offsets[-1]].astype(np.int64)
        texts = np.repeat(np.arange(last - first), np.diff(offsets))
        terms = len(self._idf_V)
        entries, counts = np.unique(texts * terms + ids, return_counts=True)
        row_N, term_N = entries // terms, entries % terms
        count_N = counts.astype(np.float64)
        if self._head.weights == "binary":
            count_N = np.ones_like(count_N)
        if self._head.sublinear_tf:
            count_N = np.log(count_N) + 1.0
        weight_N = count_N * self._idf_V[term_N]
        if self._head.norm == "l2":
            squares_R = np.bincount(row_N, weight_N**2, minlength=last - first)
            weight_N = weight_N / np.sqrt(squares_R)[row_N]
        sizes = np.bincount(row_N, minlength=last - first)
        return Sparse(offsets_of(sizes), term_N.astype(np.uint32), weight_N.astype(np.float32))


def sketches(rows: Sparse) -> Vectors:
    """Return the sketch of each sparse row [R, D]; the sketch of an empty row is 0."""
    hashed_N = mixed(rows.indices.astype(np.uint64))
    place_N = (hashed_N % np.uint64(SKETCH)).astype(np.int64)
    sign_N = np.where(hashed_N >> np.uint64(63), -1.0, 1.0)
    row_N = np.repeat(np.arange(len(rows)), np.diff(rows.offsets))
    flat: Any = np.bincount(
        row_N * SKETCH + place_N, sign_N * rows.values, minlength=len(rows) * SKETCH
    )
    sketched: Vectors = flat.reshape(len(rows), SKETCH).astype(np.float32)
    return sketched
