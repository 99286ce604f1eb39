"""Vocabularies: the terms of a corpus, and in how many of its texts each is.

Terms are numbered in the order of their code points. The formulas are scikit-learn's
(CountVectorizer, TfidfTransformer).

Shapes: V terms.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedjob.errors import FitError
from embedjob.vectors.fits.fitted import Fitted

# The numbers of a sparse row's sketch, which stands in `embedding`.
SKETCH = 256


@dataclass(frozen=True)
class Vocabulary:
    """Terms in order, in how many of `texts` each is [V], and how texts were cut into them."""

    terms: Sequence[str]
    documents_V: npt.NDArray[np.int64]
    texts: int
    lowercase: bool
    token_pattern: str

    def idf(self, *, smooth: bool) -> npt.NDArray[np.float64]:
        """Return the logarithm of texts over documents, plus 1, of each term [V].

        With `smooth` as if one more text had every term.
        """
        more = float(smooth)
        idf: npt.NDArray[np.float64] = np.log((self.texts + more) / (self.documents_V + more))
        return idf + 1.0

    def fitted(self) -> Fitted:
        """Return the vocabulary as what a fit left."""
        text = json.dumps([self.lowercase, self.token_pattern, *self.terms])
        tensors: dict[str, npt.NDArray[Any]] = {
            "documents": self.documents_V.astype(np.int64),
            "terms": np.frombuffer(text.encode(), np.uint8),
            "texts": np.array([self.texts], np.int64),
        }
        return Fitted("vocabulary", self.texts, SKETCH, tensors, {"terms": len(self.terms)})


def vocabulary_of(tensors: Mapping[str, npt.NDArray[Any]]) -> Vocabulary:
    """Return the vocabulary in the tensors of a fit; ValueError where they are none."""
    if problem := tensors_problem(tensors):
        raise ValueError(problem)
    lowercase, token_pattern, *terms = json.loads(tensors["terms"].tobytes())
    texts = int(tensors["texts"][0])
    return Vocabulary(terms, np.asarray(tensors["documents"]), texts, lowercase, token_pattern)


def tensors_problem(tensors: Mapping[str, npt.NDArray[Any]]) -> str | None:
    """Return why tensors are no vocabulary; None where they are one."""
    if set(tensors) != {"documents", "terms", "texts"}:
        return f"it holds {', '.join(sorted(tensors)) or 'nothing'}"
    try:
        lowercase, token_pattern, *terms = json.loads(tensors["terms"].tobytes())
        re.compile(token_pattern)
        in_order = all(isinstance(term, str) for term in terms) and terms == sorted({*terms})
    except (ValueError, TypeError, re.error) as error:
        return f"its terms cannot be read ({error})"
    if not isinstance(lowercase, bool) or not in_order:
        return "its terms are not in order, each once"
    documents_V, texts = tensors["documents"], tensors["texts"]
    whole = documents_V.dtype == texts.dtype == np.int64 and texts.shape == (1,)
    if not whole or documents_V.shape != (len(terms),) or not terms:
        return f"it has {len(terms)} terms, and no count for each"
    if documents_V.min() < 1 or documents_V.max() > texts[0]:
        return f"a term is in none of its {texts[0]} texts, or in more"
    return None


def vocabulary_problem(fitted: Fitted) -> str | None:
    """Return why what a fit left is no vocabulary; None where it is one."""
    return tensors_problem(fitted.tensors)


def bounds(section: Any, texts: int) -> tuple[int, int]:
    """Return the fewest and the most texts that a term may be in, by `min_df` and `max_df`.

    A whole number counts texts, a share is one of all texts. FitError where no term can be kept.
    """
    low, high = (
        limit if isinstance(limit, int) else limit * texts
        for limit in (section.min_df, section.max_df)
    )
    fewest, most = int(np.ceil(low)), int(np.floor(high))
    if fewest > most:
        raise FitError(
            f"got min_df: {section.min_df} and max_df: {section.max_df} over {texts} texts, which"
            " leave no term; set a smaller min_df, or a larger max_df"
        )
    return fewest, most
