"""Borders of passages, chosen by content: an edit moves those around it and no others.

Each sentence has a rank, a hash of itself. At first every sentence is a passage; then the borders
are looked at from the highest rank to the lowest, and a border goes if what it parts fits into one
passage. So it depends on what stands near it: not on how far it is from the beginning, as where
passages are filled one after the other, and not on the border before it, as in content-defined
chunking (FastCDC, USENIX ATC 2016), from which comes the idea that content says where to cut.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedjob.text.arrays import Ints, offsets_of
from embedjob.text.passages.sentences import break_up, ends_paragraph, find_sentences

Ranks = npt.NDArray[np.float64]
CountTokens = Callable[[Sequence[str]], Ints]
# By so much lower is the rank at the end of a paragraph.
_PARAGRAPH = 0.5


@dataclass(frozen=True)
class Sentences:
    """The sentences of a text, in order: their characters, tokens and ranks [S].

    `sizes` are tokens with the blanks after a sentence, `blanks` those of the blanks alone. The
    lower its rank, the likelier a sentence ends a passage. What a sentence was broken up into
    counts as sentences.
    """

    texts: Sequence[str]
    sizes: Ints
    blanks: Ints
    ranks: Ranks

    @property
    def places(self) -> Ints:
        """Return the character at which each begins, and where the last ends [S + 1]."""
        return offsets_of(np.fromiter(map(len, self.texts), np.int64, len(self.texts)))


def rank(sentence: str, *, within: bool) -> float:
    """Return the rank of a sentence from 0 to 1 by a hash of it; above 1 `within` a longer one.

    The end of a paragraph is preferred, and no passage ends within a sentence without need.
    """
    digest = hashlib.blake2b(sentence.strip().encode(), digest_size=8).digest()
    share = int.from_bytes(digest, "big") / 2**64
    return 1.0 + share if within else share * (_PARAGRAPH if ends_paragraph(sentence) else 1.0)


def ranked_sentences(text: str, most: int, count: CountTokens) -> Sentences:
    """Return the sentences of a text with their tokens; one of more tokens is broken up."""
    found = find_sentences(text)
    sizes = _sizes(found, count)
    texts: list[str] = []
    within: list[bool] = []
    todo = [(one, False) for one in reversed(found)]
    while todo:
        one, inner = todo.pop()
        size, blanks = sizes[one]
        broken = break_up(one) if size - blanks > most else [one]
        if len(broken) > 1:
            sizes |= _sizes([run for run in broken if run not in sizes], count)
            inside = [(run, True) for run in broken[:-1]]
            todo += reversed([*inside, (broken[-1], inner)])
        else:
            texts.append(one)
            within.append(inner)
    pairs = np.array([sizes[one] for one in texts], np.int64).reshape(-1, 2)
    ranks = [rank(one, within=inner) for one, inner in zip(texts, within, strict=True)]
    return Sentences(texts, pairs[:, 0], pairs[:, 1], np.array(ranks, np.float64))


def _sizes(sentences: Sequence[str], count: CountTokens) -> dict[str, tuple[int, int]]:
    """Return the tokens of each sentence with the blanks after it, and of these alone."""
    distinct = list(dict.fromkeys(sentences))
    # A single blank is part of the word that follows.
    split = [(one.strip(), one[len(one.rstrip()) :].removeprefix(" ")) for one in distinct]
    known = list(dict.fromkeys(one for pair in split for one in pair))
    counts = dict(zip(known, count(known).tolist(), strict=True))
    return {
        one: (counts[body] + counts[after], counts[after])
        for one, (body, after) in zip(distinct, split, strict=True)
    }


def passage_stops(own: Sentences, most: int) -> list[int]:
    """Return the numbers of the sentences before which passages stop, and that of all.

    A passage has at most `most` tokens, the blanks at its end aside, unless one sentence has more.
    """
    before = offsets_of(own.sizes)
    ends = before[1:] - own.blanks
    number = len(ends)
    # Of each passage, by its first sentence where it stops, and the other way round.
    stop_of, first_of = list(range(1, number + 1)), list(range(-1, number))
    # Of equal ranks the first: repetitions of a sentence go in their order.
    for border in (1 + np.argsort(-own.ranks[:-1], kind="stable")).tolist():
        first, stop = first_of[border], stop_of[border]
        if ends[stop - 1] - before[first] <= most:
            stop_of[first], first_of[stop] = stop, first
    stops, first = [], 0
    while first < number:
        first = stop_of[first]
        stops.append(first)
    return stops
