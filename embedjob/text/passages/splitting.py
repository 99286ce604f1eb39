"""Splitting: from a text to its passages, texts of their own that have at most so many tokens.

Shapes: R texts, P passages of all texts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from embedjob.config.recipe import Split
from embedjob.text.arrays import offsets_of
from embedjob.text.passages.borders import CountTokens, passage_stops, ranked_sentences
from embedjob.text.passages.sentences import break_up, sentence_library
from embedjob.text.views import Headings, Passages

# Between a passage and what stands before it.
SEPARATOR = "\n"
# Of a passage's tokens, what stands before it takes this share at most.
_MOST_HEADING = 0.5
# Texts of more characters for each token are hardly ever one passage.
_SHORT = 6


@dataclass(frozen=True)
class _Heading:
    """What stands before the passages of a text, and the tokens that it takes."""

    text: str
    tokens: int
    cut: bool


@dataclass(frozen=True)
class _Piece:
    """A run of a text's characters that may become a passage.

    It repeats the characters from `repeats` to `start`; `room` is the tokens that it was cut for.
    """

    row: int
    repeats: int
    start: int
    stop: int
    room: int


class PassageSplitter:
    """Splits texts into passages; a text gives the same ones on any machine, in any company."""

    def __init__(self, split: Split, count: CountTokens) -> None:
        """Take the settings, and what counts the tokens of texts by themselves.

        ConfigError where the library that finds sentences is not installed.
        """
        sentence_library()
        self._split = split
        self._count = count

    def __call__(self, texts: Sequence[str], headings: Headings = None) -> Passages:
        """Return the passages of texts; `headings` stand before those of each text.

        A passage that is still too long under its heading is cut again, by itself.
        """
        own = [(one or "").strip() for one in headings or [None] * len(texts)]
        known = self._headings(own)
        heads = [known[one] for one in own]
        done = self._whole(texts, heads)
        fits = {piece.row for piece in done}
        long = [row for row in range(len(texts)) if row not in fits]
        rooms = [self._split.max_tokens - head.tokens for head in heads]
        todo = [piece for row in long for piece in self._pieces(texts[row], row, rooms[row])]
        while todo:
            shown = [_shown(texts[piece.row], piece, heads[piece.row].text) for piece in todo]
            counts = self._count(shown).tolist()
            again: list[_Piece] = []
            for piece, count in zip(todo, counts, strict=True):
                over = count - self._split.max_tokens
                smaller = self._smaller(texts[piece.row], piece, over) if over > 0 else []
                done += [] if smaller else [piece]
                again += smaller
            todo = again
        done.sort(key=lambda piece: (piece.row, piece.start))
        rows = np.array([piece.row for piece in done], np.int64)
        return Passages(
            texts=[_shown(texts[piece.row], piece, heads[piece.row].text) for piece in done],
            offsets=offsets_of(np.bincount(rows, minlength=len(texts))),
            chars=np.array([(p.repeats, p.stop) for p in done], np.int64).reshape(-1, 2),
            cut=np.array([heads[piece.row].cut for piece in done], np.bool_),
        )

    def longest(self) -> str:
        """Return a text of as many tokens as a passage may have, or of few less."""
        most = words = self._split.max_tokens
        while words > 1 and (tokens := self._tokens(" ".join(["a"] * words))) > most:
            words = words * most // tokens
        return " ".join(["a"] * max(1, words))

    def _headings(self, headings: Sequence[str]) -> Mapping[str, _Heading]:
        """Return what stands before passages, cut where it would leave them too little room."""
        most = int(self._split.max_tokens * _MOST_HEADING)
        found = {"": _Heading("", 0, cut=False)}
        for heading in dict.fromkeys(headings):
            text = heading
            while text and (tokens := self._tokens(text + SEPARATOR)) > most:
                fewer = text[: min(len(text) - 1, len(text) * most // tokens)]
                text = (fewer.rsplit(None, 1) or [""])[0]
            found[heading] = _Heading(text, tokens if text else 0, cut=text != heading)
        return found

    def _tokens(self, text: str) -> int:
        return int(self._count([text])[0])

    def _whole(self, texts: Sequence[str], heads: Sequence[_Heading]) -> list[_Piece]:
        """Return the texts that fit, each of which is its only passage."""
        most = self._split.max_tokens
        pieces = [
            _Piece(row, 0, 0, len(text), most)
            for row, text in enumerate(texts)
            if len(text) <= _SHORT * most
        ]
        shown = [_shown(texts[piece.row], piece, heads[piece.row].text) for piece in pieces]
        counts = self._count(shown).tolist()
        return [piece for piece, count in zip(pieces, counts, strict=True) if count <= most]

    def _pieces(self, text: str, row: int, room: int) -> Iterator[_Piece]:
        """Yield the pieces of a text that does not fit, with the sentences that each repeats."""
        most = room - min(self._split.overlap, room // 2)
        own = ranked_sentences(text, most, self._count)
        places, tokens = own.places, offsets_of(own.sizes)
        before = first = 0
        for stop in passage_stops(own, most):
            # Whole sentences of the passage before, and never all of it.
            fitting = int(np.searchsorted(tokens, tokens[first] - (room - most)))
            repeats = min(max(fitting, before + 1), first)
            yield _Piece(row, int(places[repeats]), int(places[first]), int(places[stop]), room)
            before, first = first, stop

    def _smaller(self, text: str, piece: _Piece, over: int) -> list[_Piece]:
        """Return smaller pieces of a piece that has so many tokens too many.

        First it repeats nothing; there are none where it cannot be smaller.
        """
        if piece.repeats < piece.start:
            return [replace(piece, repeats=piece.start)]
        shown, room = text[piece.start : piece.stop], max(1, piece.room - over)
        if room < piece.room:
            own = ranked_sentences(shown, room, self._count)
            edges = own.places[[0, *passage_stops(own, room)]].tolist()
        elif len(broken := break_up(shown)) > 1:
            # Its tokens are others behind its heading: there is no telling how many of them fit.
            edges = [0, len("".join(broken[: len(broken) // 2])), len(shown)]
        else:
            return []
        return [
            _Piece(piece.row, piece.start + a, piece.start + a, piece.start + b, room)
            for a, b in pairwise(edges)
        ]


def _shown(text: str, piece: _Piece, heading: str) -> str:
    """Return the text of a passage."""
    own = text[piece.repeats : piece.stop].strip()
    return f"{heading}{SEPARATOR}{own}" if heading else own
