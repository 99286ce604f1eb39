"""Borders of passages, chosen by content: an edit moves those around it and no others.

Each sentence has a rank, a hash of itself. A border is a landmark where its rank is the lowest of
all that are near it, whatever stands further away (Bjoerner, Blass and Gurevich, Content-dependent
chunking for differential compression, the local maximum approach, 2010). An edit of a sentence has
one landmark near it on each side at most, so that at most three stretches between landmarks are
new. A stretch that fits is a passage. A longer one has no candidate within the bound, and there
alone the bound asks for borders: at the lowest rank some way from both ends, again and again.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from embedjob.text.arrays import Ints, offsets_of
from embedjob.text.passages.sentences import break_up, ends_paragraph, find_sentences

Ranks = npt.NDArray[np.float64]
CountTokens = Callable[[Sequence[str]], Ints]
# By so much lower is the rank at the end of a paragraph.
_PARAGRAPH = 0.5
# Shares of a passage's bound: how far a landmark looks, and how short what is cut off may be. Other
# numbers would move the passages of every text.
_NEAR = 0.45
_LEAST = 0.36


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


def landmarks(own: Sentences, most: int) -> list[int]:
    """Return the numbers of the sentences before which a landmark stands.

    Nothing lower stands within `_NEAR` of `most` tokens on both sides, where the ends of a text are
    lower than everything, and of equal ranks the first is.
    """
    places, ranks = offsets_of(own.sizes).tolist(), [*own.ranks.tolist()[:-1], -1.0]
    near = _NEAR * most
    found: list[int] = []
    # Borders behind which nothing lower stands so far: their ranks ascend.
    waiting = [0]
    for border, rank_here in enumerate(ranks, start=1):
        while len(waiting) > 1 and ranks[waiting[-1] - 1] > rank_here:
            one = waiting.pop()
            if min(places[one] - places[waiting[-1]], places[border] - places[one]) >= near:
                found.append(one)
        waiting.append(border)
    return sorted(found)


def passage_stops(own: Sentences, most: int) -> list[int]:
    """Return the numbers of the sentences before which passages stop, and that of all.

    A passage has at most `most` tokens, the blanks at its end aside, unless one sentence has more.
    """
    before = offsets_of(own.sizes)
    ends = before[1:] - own.blanks
    number = len(ends)

    def fits(first: int, stop: int) -> bool:
        return stop - first <= 1 or bool(ends[stop - 1] - before[first] <= most)

    if fits(0, number):
        return [number] * min(number, 1)
    stops: list[int] = []
    todo = [*pairwise([0, *landmarks(own, most), number])][::-1]
    while todo:
        first, stop = todo.pop()
        if fits(first, stop):
            stops.append(stop)
        else:
            cuts = _cuts(own.ranks, before, (first, stop), most)
            todo += [*pairwise([first, *cuts, stop])][::-1]
    return stops


def _cuts(ranks: Ranks, before: Ints, stretch: tuple[int, int], most: int) -> list[int]:
    """Return where a stretch that does not fit is cut: once, or full between repetitions."""
    first, stop = stretch
    borders = np.arange(first + 1, stop)
    places, least = before[borders], _LEAST * most
    inner = (places - before[first] >= least) & (before[stop] - places >= least)
    rank_here = ranks[(borders[inner] if inner.any() else borders) - 1].min()
    lowest = borders[ranks[borders - 1] == rank_here]
    cuts: list[int] = []
    while not cuts or (before[stop] - before[first] > most and lowest[-1] > first):
        fitting = np.searchsorted(before[lowest], before[first] + most, side="right") - 1
        first = int(lowest[max(fitting, np.searchsorted(lowest, first, side="right"))])
        cuts.append(first)
    return cuts
