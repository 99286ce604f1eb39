"""The vocabulary of some texts, as the fit of tfidf makes it, in a file that a recipe can name."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from embedjob.methods.catalogue import read_method
from embedjob.models import cache
from embedjob.text.lookup.terms import TermCounts, TermRules, count_terms
from embedjob.vectors.vocabulary import Vocabulary


def vocabulary_of_texts(texts: Iterable[str]) -> Path:
    """Count the terms of texts, each text as it is, and return the file of their vocabulary."""
    counts = TermCounts(0, Counter(), Counter())
    [section] = read_method("tfidf").fit
    rules = TermRules(section.lowercase, section.token_pattern)
    count_terms(texts, rules, counts)
    terms = sorted(counts.documents)
    documents = np.array([counts.documents[term] for term in terms], np.int64)
    made = Vocabulary(terms, documents, counts.texts, rules.lowercase, rules.token_pattern)
    data = save({**made.fitted().tensors})
    name = f"vocabulary-{hashlib.sha256(data).hexdigest()[:12]}.safetensors"
    folder = cache.build_once(name, [name], lambda to: _write(to / name, data))
    return folder / name


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
