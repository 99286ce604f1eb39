"""Lookup in a vocabulary: texts cut at blanks, or by a tokenizer without anything around them.

A word is looked up as it is, then without punctuation at its ends, then in lower case, as the
WhitespaceTokenizer of sentence-transformers does; a word that is not found is left out.

Shapes: R texts, N words found in all texts together.
"""

import string
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from tokenizers import Tokenizer

from embedjob.config.recipe import Split
from embedjob.text.arrays import Flags, Ints, flatten
from embedjob.text.passages.splitting import PassageSplitter
from embedjob.text.views import TokenViews

_NOT_THERE = -1
# Spellings that are no word of the vocabulary are remembered up to so many.
_MOST_KNOWN = 1_000_000


class WordLookup:
    """Finds the words of texts in a vocabulary; has what the stages ask of a tokenizer."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        max_tokens: int,
        places: Mapping[str, int] | None = None,
        left_out: Collection[str] = (),
        lower_case: bool = False,
        split: Split | None = None,
    ) -> None:
        """Take a vocabulary, and the most words of a text that count.

        `places` gives the row of each word, its place among `words` by default; `left_out` are
        stop words; with `lower_case` a text is lower-cased first. Passages are made by `split`, if
        given, of whose tokens each word is one.
        """
        self.splitter = None if split is None else PassageSplitter(split, _count_words)
        self._words = words
        found = places or {word: place for place, word in enumerate(words)}
        self._rows = _Rows(found, frozenset(left_out))
        self._most = max_tokens
        self._lower_case = lower_case

    def views(self, texts: Sequence[str]) -> TokenViews:
        """Return one view per text: the rows of its words that are found, in order."""
        rows = [self._found(text) for text in texts]
        truncated = np.array([len(row) > self._most for row in rows], np.bool_)
        return whole_views([row[: self._most] for row in rows], truncated)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the words of these rows, for people."""
        return [self._words[row] for row in ids]

    def _found(self, text: str) -> list[int]:
        rows = self._rows
        words = (text.lower() if self._lower_case else text).split()
        return [row for word in words if (row := rows[word]) >= 0]


class TokenLookup:
    """Takes the ids that a tokenizer gives a text alone; has what the stages ask of a tokenizer."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        left_out: int | None,
        split: Split | None = None,
    ) -> None:
        """Take a tokenizer and own it, the most ids of a text, and an id that is left out.

        Passages are made by `split`, if given.
        """
        self.splitter = None if split is None else PassageSplitter(split, self._count)
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_tokens)
        self._tokenizer = tokenizer
        self._most = max_tokens
        self._left_out = left_out

    def views(self, texts: Sequence[str]) -> TokenViews:
        """Return one view per text: its ids, in order."""
        # Without offsets, which nothing here reads.
        made = self._tokenizer.encode_batch_fast([*texts], add_special_tokens=False)
        rows = [one.ids for one in made]
        # To ask for what was cut off takes time: only where it may be there.
        full = zip(rows, made, strict=True)
        truncated = [len(row) == self._most and bool(one.overflowing) for row, one in full]
        if self._left_out is not None:
            rows = [[one for one in row if one != self._left_out] for row in rows]
        return whole_views(rows, np.array(truncated, np.bool_))

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the tokens of these ids, for people."""
        return [self._tokenizer.id_to_token(one) or "" for one in ids]

    def _count(self, texts: Sequence[str]) -> Ints:
        """Return the ids of each text [R], also of those that are cut."""
        made = self._tokenizer.encode_batch_fast([*texts], add_special_tokens=False)
        sizes = (sum(len(part.ids) for part in (one, *one.overflowing)) for one in made)
        return np.fromiter(sizes, np.int64, len(made))


def _count_words(texts: Sequence[str]) -> Ints:
    """Return the words of each text [R], found or not."""
    return np.fromiter((len(text.split()) for text in texts), np.int64, len(texts))


def whole_views(rows: Sequence[Sequence[int]], truncated: Flags) -> TokenViews:
    """Return one view of each row, all of which counts."""
    ids, offsets = flatten(rows)
    span = np.zeros((len(rows), 2), np.int32)
    span[:, 1] = np.diff(offsets)
    return TokenViews(
        views_per_text=1,
        prefixes=(),
        prefix=np.full(len(rows), -1, np.int32),
        ids=ids,
        offsets=offsets,
        common=np.zeros(len(rows), np.int32),
        span=span,
        truncated=truncated,
    )


class _Rows(dict[str, int]):
    """The row of each word, _NOT_THERE where it has none; other spellings are added when met."""

    def __init__(self, places: Mapping[str, int], left_out: frozenset[str]) -> None:
        super().__init__(places)
        self._left_out = left_out
        for word in left_out:
            self[word] = _NOT_THERE
        self._room = _MOST_KNOWN

    def __missing__(self, word: str) -> int:
        bare = word.strip(string.punctuation)
        row = _NOT_THERE
        for spelling in (bare, bare.lower()):
            if spelling in self._left_out:
                break
            row = self.get(spelling, _NOT_THERE) if spelling else _NOT_THERE
            if row != _NOT_THERE:
                break
        if self._room:
            self._room -= 1
            self[word] = row
        return row
