"""Terms: texts cut by a pattern, counted, and found in a vocabulary, as scikit-learn does it.

A term is what the pattern matches in a text, in lower case if asked (CountVectorizer).

Shapes: R texts.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from embedjob.text.lookup.word_lookup import whole_views
from embedjob.text.views import TokenViews


@dataclass(frozen=True)
class TermRules:
    """How a text is cut into terms."""

    lowercase: bool
    token_pattern: str

    def terms(self, text: str) -> list[str]:
        """Return the terms of a text, in order and with repetitions."""
        # Compiled patterns are kept by re itself.
        return re.findall(self.token_pattern, text.lower() if self.lowercase else text)


@dataclass
class TermCounts:
    """Of some texts: their number, in how many each term is, and how often in all of them."""

    texts: int
    documents: Counter[str]
    occurrences: Counter[str]


def count_terms(texts: Iterable[str], rules: TermRules, counts: TermCounts) -> None:
    """Add the terms of texts to counts; equal texts count as often as they are there."""
    for text in texts:
        terms = rules.terms(text)
        counts.documents.update(set(terms))
        counts.occurrences.update(terms)
        counts.texts += 1


class TermLookup:
    """Finds the terms of texts in a vocabulary; has what the stages ask of a tokenizer."""

    splitter = None

    def __init__(self, terms: Sequence[str], rules: TermRules, *, max_tokens: int) -> None:
        """Take the terms in the order of their numbers, and the most terms of a text that count."""
        self._terms = terms
        self._rules = rules
        self._numbers = {term: number for number, term in enumerate(terms)}
        self._most = max_tokens

    def views(self, texts: Sequence[str]) -> TokenViews:
        """Return one view per text: the numbers of its terms, in order and with repetitions."""
        find, cut = self._numbers.get, self._rules.terms
        rows = [
            [number for term in cut(text) if (number := find(term)) is not None] for text in texts
        ]
        truncated = np.array([len(row) > self._most for row in rows], np.bool_)
        return whole_views([row[: self._most] for row in rows], truncated)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the terms of these numbers, for people."""
        return [self._terms[number] for number in ids]
