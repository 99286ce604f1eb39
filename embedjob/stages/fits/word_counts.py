"""Counts of a static table's words in a corpus, by Ray tasks that each read some chunks.

A text's words are found as its tokenizer finds them for its vector. A state has two numbers for
each word of the table; sums of whole numbers are the same in any order.

Shapes: V words of the table.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.exceptions import RayError

from embedjob.config.job import Input, Job
from embedjob.errors import FitError
from embedjob.input.chunks import Chunk
from embedjob.stages.chunk_state import raised_in_worker
from embedjob.stages.engine import Engine, recipe_engine
from embedjob.stages.fits.term_counts import UNCOUNTED, good_texts, grouped
from embedjob.stages.read import memory_of
from embedjob.text.arrays import Ints
from embedjob.text.views import TokenizesTexts, TokenViews
from embedjob.vectors.fits.fitted import Fitted

# So many groups are counted before their counts are added: these wait in Ray's store.
_GROUPS_AT_ONCE = 16


class WordTotals(NamedTuple):
    """The number of texts, in how many each word is, and how often in all of them [V]."""

    texts: int
    documents_V: Ints
    occurrences_V: Ints


def counted_words(chunks: Sequence[Chunk], config: Job, *, rows: int) -> Fitted:
    """Return the counts of the `rows` words of a job's table, over all good rows of chunks.

    Raises:
        FitError: no text has a word of the table.
        FaultError: a chunk cannot be read, or the cluster is lost.
    """
    engine = recipe_engine(config, 1)
    count = ray.remote(count_words).options(num_cpus=1, memory=memory_of(chunks))
    add: Any = ray.remote(sum_of)
    groups = [*grouped(chunks)]
    total: Any = ray.put(no_counts(rows))
    try:
        for start in range(0, len(groups), _GROUPS_AT_ONCE):
            some = groups[start : start + _GROUPS_AT_ONCE]
            total = add.remote(
                total, *(count.remote(one, config.input, engine, rows) for one in some)
            )
            ray.wait([total])
        counts: WordTotals = ray.get(total)
    except RayError as error:
        raise raised_in_worker(error, UNCOUNTED) from error
    return fitted_counts(counts)


def fitted_counts(counts: WordTotals) -> Fitted:
    """Return counts as what a fit leaves; FitError where no text has a word of the table."""
    words = int((counts.documents_V > 0).sum())
    if not words:
        raise FitError(
            f"none of {counts.texts} texts has a word of the table; are they in its language?"
        )
    tensors: dict[str, Any] = {
        "documents": counts.documents_V,
        "occurrences": counts.occurrences_V,
    }
    return Fitted("word_counts", counts.texts, len(counts.documents_V), tensors, {"words": words})


def count_words(group: Sequence[Chunk], job_input: Input, engine: Engine, rows: int) -> WordTotals:
    """Return the counts of the texts of some chunks."""
    counts = no_counts(rows)
    tokenizer = _tokenizer(engine)
    for texts in good_texts(group, job_input):
        counts = sum_of(counts, counts_of(tokenizer.views(texts), rows))
    return counts


def counts_of(views: TokenViews, rows: int) -> WordTotals:
    """Return the counts of the words in the views of texts."""
    ids = views.ids.astype(np.int64)
    text_of = np.repeat(np.arange(views.texts), np.diff(views.offsets))
    once = np.unique(text_of * rows + ids) % rows
    documents_V = np.bincount(once, minlength=rows)
    return WordTotals(views.texts, documents_V, np.bincount(ids, minlength=rows))


def sum_of(*counts: WordTotals) -> WordTotals:
    """Return the sums of counts."""
    texts, documents, occurrences = zip(*counts, strict=True)
    return WordTotals(sum(texts), np.sum(documents, axis=0), np.sum(occurrences, axis=0))


def no_counts(rows: int) -> WordTotals:
    """Return the counts of no text."""
    return WordTotals(0, np.zeros(rows, np.int64), np.zeros(rows, np.int64))


@lru_cache(maxsize=1)
def _tokenizer(engine: Engine) -> TokenizesTexts:
    return engine.load_tokenizer()
