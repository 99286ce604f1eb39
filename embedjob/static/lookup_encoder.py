"""The encoder of static tables: rows of a table, averaged. Needs neither torch nor transformers.

Legend: R texts, T tokens, V rows of the table, D width.
"""

import time
from collections.abc import Callable, Mapping

import numpy as np

from embedjob.config.pooling import FitStep, WordWeights
from embedjob.config.recipe import Recipe
from embedjob.errors import InterruptedRunError, ModelError
from embedjob.models.source import materialize, source_of
from embedjob.models.tables.static_tables import row_vectors, static_table
from embedjob.text.arrays import Ids, Ints
from embedjob.text.views import TokenViews
from embedjob.vectors.encoded import Encoded, Vectors
from embedjob.vectors.finishing import NO_FITS, finished, width
from embedjob.vectors.fits.fit_arithmetic import width_after
from embedjob.vectors.fits.fitted import Fitted
from embedjob.vectors.fits.rare_words import word_weights

# So many numbers of the table are gathered at a time: they stay in a core's cache.
_NUMBERS_AT_ONCE = 1 << 20
_UNIT_TOLERANCE = 1e-3


class LookupEncoder:
    """A static table, opened once and used for many texts."""

    def __init__(self, recipe: Recipe, *, fitted: Mapping[str, Fitted] = NO_FITS) -> None:
        """Open the table that a resolved recipe names; ModelError where it is none.

        `fitted` is what the fits of finishing steps left, by the sha256 that a step names.
        """
        table = static_table(materialize(source_of(recipe)))
        if table is None:
            raise ModelError(f"encoder.model: {recipe.model} is no table of vectors")
        self.recipe = recipe
        self._vectors_VD = row_vectors(table)
        self._fitted = fitted
        self._weights_V = None
        if isinstance(recipe.pooling, WordWeights):
            self._weights_V = word_weights(fitted[recipe.pooling.name], recipe.pooling)

    def encode_views(
        self,
        views: TokenViews,
        *,
        stop: Callable[[], bool] = lambda: False,
        on_progress: Callable[[int, int], None] = lambda texts, tokens: None,
    ) -> Encoded:
        """Return the embeddings of the views' texts, and why some of them have none.

        `stop` is asked between blocks of texts, and answers with InterruptedRunError; `on_progress`
        is told the texts and tokens done so far.
        """
        started = time.monotonic()
        ids, offsets = views.ids, views.offsets
        wide = self._vectors_VD.shape[1]
        means_RD = np.full((views.texts, wide), np.nan, np.float32)
        for first, last in _blocks(offsets, max(1, _NUMBERS_AT_ONCE // wide)):
            if stop():
                raise InterruptedRunError("stopped between two blocks of texts")
            self._mean(ids, offsets, slice(first, last), means_RD)
            on_progress(last, int(offsets[last]))
        made_RD = finished(means_RD, self.recipe.finish, self._fitted)
        named = {step.name for step in self.recipe.finish if isinstance(step, FitStep)}
        after = {name: width_after(self._fitted[name]) for name in named}
        assert made_RD.shape[1] == width(wide, views=1, recipe=self.recipe, fitted=after)
        failed = self._failed(made_RD, np.diff(offsets))
        made_RD[[*failed]] = np.nan
        return Encoded(made_RD, failed, {"compute_seconds": time.monotonic() - started})

    def _mean(self, ids: Ids, offsets: Ints, texts: slice, means_RD: Vectors) -> None:
        """Write the mean of each text's rows, weighted if asked; other texts are left as they are.

        The weighted sum is divided by the number of rows, as SIF does it: cosines are the same as
        of a sum that is divided by the sum of weights.
        """
        starts, stops = offsets[texts], offsets[texts.start + 1 : texts.stop + 1]
        full = np.flatnonzero(stops > starts) + texts.start
        if not len(full):
            return
        rows = ids[offsets[texts.start] : offsets[texts.stop]]
        gathered_TD = np.asarray(self._vectors_VD[rows], np.float32)
        if self._weights_V is not None:
            gathered_TD = gathered_TD * self._weights_V[rows][:, None]
        sums_RD = np.add.reduceat(gathered_TD, offsets[full] - offsets[texts.start], axis=0)
        counts_R = (offsets[full + 1] - offsets[full]).astype(np.float32)
        means_RD[full] = sums_RD / counts_R[:, None]

    def _failed(self, made_RD: Vectors, counts_R: Ints) -> dict[int, tuple[str, str]]:
        norms_R = np.linalg.norm(made_RD, axis=1)
        bad_R = ~np.isfinite(norms_R)
        if self.recipe.normalized:
            bad_R |= np.abs(norms_R - 1) > _UNIT_TOLERANCE
        nothing = ("empty_span", "no token of the text has a vector in the table")
        other = ("non_finite", "the finished embedding is not finite, or is zero")
        return {int(r): other if counts_R[r] else nothing for r in np.flatnonzero(bad_R)}


def _blocks(offsets: Ints, tokens: int) -> list[tuple[int, int]]:
    """Return runs of texts that have so many tokens together, or a single text that has more."""
    blocks, first = [], 0
    texts = len(offsets) - 1
    while first < texts:
        last = int(np.searchsorted(offsets, offsets[first] + tokens, side="right")) - 1
        last = min(texts, max(last, first + 1))
        blocks.append((first, last))
        first = last
    return blocks
