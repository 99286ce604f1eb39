"""Truncation: texts are cut so that the whole view fits; the template and EOS stay whole.

A text loses its end, or its beginning where limits are `left`: all that is said here of its end
and of what follows it then holds for its beginning and for what stands before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from tokenizers import Encoding, Tokenizer

from embedjob.text.arrays import Flags, Ints
from embedjob.text.encoding import PromptEncoder
from embedjob.text.prompts import Prompt

# A text is first read as far as its tokens could possibly reach, then further where blanks or
# long words left it short, and never further than this many characters per token: what is beyond
# cannot matter, and a string of 10 MB must not cost more than a page.
_CHARS_PER_TOKEN, _GROWTH, _MOST_CHARS_PER_TOKEN = 6, 4, 512
# Tokens before a cut may differ from the tokens of the uncut text: WordPiece turns a whole word of
# over 100 characters into one unknown token, so more than 100 are not trusted.
_DOUBTFUL = 128


@dataclass(frozen=True)
class FittedViews:
    """Ids of N views without EOS, positions [N, 2] of text and marked segments, and what was cut.

    `characters` of each text, from its kept side, gave its ids; -1 where some of those ids were cut
    off. `chars` are the characters [T, 2] of every text token, for the views where they were
    requested.
    """

    ids: list[list[int]]
    text: Ints
    marked: Ints
    truncated: Flags
    characters: Ints
    chars: dict[int, Ints] = field(default_factory=dict)


class TemplateFitter(Protocol):
    """Puts texts into templates; `closing` counts the tokenizer's own tokens at the end."""

    closing: int

    def limit(self, tokens: Ints, *, left: bool = False) -> None:
        """Cut texts from now on so that no view has more tokens than its template may.

        With `left` a text loses its beginning, without it its end.
        """
        ...

    def whole(self, template: int, text: str) -> list[int]:
        """Return all ids of a text under a template."""
        ...

    def prompt(self, template: int) -> int:
        """Count the tokens before the text, tokenized alone, with the tokenizer's opening ones."""
        ...

    def shown(self, template: int) -> str:
        """Return the template for people."""
        ...

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the ids as the tokenizer spells them."""
        ...

    def fit(self, which: Sequence[int], texts: Sequence[str]) -> FittedViews:
        """Put each text into template number `which`, cut where necessary."""
        ...


@dataclass(frozen=True)
class Limits:
    """Per template: the most tokens before EOS, whether more follows the text, and its copies."""

    tokens: Ints
    more: Flags
    copies: Ints
    left: bool = False


@dataclass(frozen=True)
class _Job:
    """The N rows of one call of `fit`; `reach` and `shrunk` change with each round."""

    which: Sequence[int]
    texts: Sequence[str]
    limit: Ints
    more: Flags
    size: Ints
    most: Ints
    reach: Ints
    shrunk: Flags


@dataclass(frozen=True)
class _Round:
    """The rows encoded together, up to their reach in characters."""

    rows: Ints
    which: list[int]
    pieces: list[str]
    encodings: list[Encoding]
    length: Ints
    text: Ints
    marked: Ints
    has_offsets: bool


class TruncatingEncoder:
    """Encodes texts under templates within their limits."""

    def __init__(
        self,
        encoder: PromptEncoder,
        limits: Limits,
        *,
        needs_text: bool,
        chars_over: int | None = None,
    ) -> None:
        """Take an encoder; `needs_text` says whether callers use the text's positions.

        The characters of text tokens are kept for views with more than `chars_over` of them, and
        for views that were cut.
        """
        self._encoder = encoder
        self._limits = limits
        self._chars_over = chars_over
        self._needs_text = needs_text or chars_over is not None

    def shown(self, text: str, characters: int) -> str:
        """Return so many characters of a text, from the side that is kept."""
        return text[len(text) - characters :] if self._limits.left else text[:characters]

    def fit(self, which: Sequence[int], texts: Sequence[str]) -> FittedViews:
        """Put each text into template number `which`, cut where necessary.

        In rounds, a batch each: every row is encoded up to its `reach` in characters, which grows
        until there are tokens enough, and then shrinks until text and suffix fit together.
        """
        job = self._job(which, texts)
        count = len(texts)
        nowhere = np.zeros((count, 2), np.int64)
        uncut = np.zeros(count, np.bool_)
        done = FittedViews([[]] * count, nowhere, nowhere.copy(), uncut, np.zeros(count, np.int64))
        todo = np.arange(count)
        # Offsets say where to cut a text with a suffix; the first round needs them only if a cut is
        # likely.
        likely = bool((job.more & (job.size > job.limit)).any())
        while todo.size:
            batch = self._encode(job, todo, offsets=self._needs_text or likely)
            again = self._reconsider(job, batch, done)
            self._settle(job, batch, done, ~again)
            todo, likely = todo[again], bool(job.more.any())
        return done

    def _job(self, which: Sequence[int], texts: Sequence[str]) -> _Job:
        templates = np.asarray(which, np.int64)
        limit = self._limits.tokens[templates]
        size = np.fromiter(map(len, texts), np.int64, len(texts))
        return _Job(
            which=which,
            texts=texts,
            limit=limit,
            more=self._limits.more[templates],
            size=size,
            most=np.minimum(size, _MOST_CHARS_PER_TOKEN * (limit + _DOUBTFUL)),
            reach=np.minimum(size, _CHARS_PER_TOKEN * (limit + _DOUBTFUL)),
            shrunk=np.zeros(len(texts), np.bool_),
        )

    def _encode(self, job: _Job, rows: Ints, *, offsets: bool) -> _Round:
        which = [job.which[row] for row in rows]
        pieces = [self.shown(job.texts[row], int(job.reach[row])) for row in rows]
        encodings = self._encoder.encode(which, pieces, offsets=offsets)
        length = np.fromiter(map(len, encodings), np.int64, len(rows))
        framed = self._encoder.framed(length)
        return _Round(
            rows=rows,
            which=which,
            pieces=pieces,
            encodings=encodings,
            length=length,
            text=self._encoder.text_tokens(encodings, which, pieces) if offsets else framed,
            marked=self._encoder.marked_tokens(encodings, which, pieces) if offsets else framed,
            has_offsets=offsets,
        )

    def _reconsider(self, job: _Job, batch: _Round, done: FittedViews) -> Flags:
        """Return which rows of the round need another round, and set their reach for it."""
        rows = batch.rows
        reach, most, limit = job.reach[rows], job.most[rows], job.limit[rows]
        over = batch.length > limit
        done.truncated[rows] = over | (reach < job.size[rows])
        grow = (reach < most) & ~job.shrunk[rows] & (batch.length < limit + _DOUBTFUL)
        shrink = over & ~grow & job.more[rows]
        job.reach[rows[grow]] = np.minimum(most, reach * _GROWTH)[grow]
        if batch.has_offsets:
            job.shrunk[rows[shrink]] = True
            for place in np.flatnonzero(shrink):
                job.reach[rows[place]] = self._shorter(batch, int(place), int(limit[place]))
        return grow | shrink

    def _shorter(self, batch: _Round, place: int, limit: int) -> int:
        """Return the characters of a text up to the end of its last token that fits."""
        piece = batch.pieces[place]
        ranges = batch.encodings[place].offsets
        first, stop = map(int, batch.text[place])
        # Every copy of the text is cut by as much.
        copies = int(self._limits.copies[batch.which[place]])
        dropped = -(-(len(ranges) - limit) // copies)
        if stop - dropped <= first:
            return 0
        before = self._encoder.text_start(batch.which[place], piece)
        if self._limits.left:
            end = len(piece) - (ranges[first + dropped][0] - before)
        else:
            end = ranges[stop - dropped - 1][1] - before
        # Always shorter than it was: a character that is several tokens ends where it ended.
        return int(min(max(end, 0), len(piece) - 1))

    def _settle(self, job: _Job, batch: _Round, done: FittedViews, ready: Flags) -> None:
        """Store the finished rows, the last text tokens cut off where a row is too long."""
        limit = job.limit[batch.rows]
        excess = np.maximum(batch.length - limit, 0)
        over = excess > 0
        for place in np.flatnonzero(ready):
            ids = batch.encodings[place].ids
            if over[place]:
                first = self._cut_at(len(ids), int(excess[place]))
                ids = ids[:first] + ids[first + int(excess[place]) :]
            done.ids[batch.rows[place]] = ids
        done.characters[batch.rows] = np.where(over, -1, job.reach[batch.rows])
        done.text[batch.rows[ready]] = self._moved(batch.text, batch.length, excess)[ready]
        done.marked[batch.rows[ready]] = self._moved(batch.marked, batch.length, excess)[ready]
        if self._chars_over is not None:
            sizes = np.diff(done.text[batch.rows], axis=1)[:, 0]
            wanted = done.truncated[batch.rows] | (sizes > self._chars_over)
            for place in np.flatnonzero(ready & wanted):
                done.chars[int(batch.rows[place])] = self._characters(batch, int(place), done)

    def _cut_at(self, length: int, excess: int) -> int:
        """Return the first of the tokens that are cut off."""
        frame = self._encoder.frame
        return frame.before if self._limits.left else length - frame.after - excess

    def _moved(self, positions: Ints, length: Ints, excess: Ints) -> Ints:
        """Return where positions [N, 2] are once so many tokens of each row are cut off."""
        frame = self._encoder.frame
        if self._limits.left:
            moved: Ints = np.maximum(positions - excess[:, None], frame.before)
            return np.where(excess[:, None] > 0, moved, positions)
        stop = np.where(excess > 0, length - frame.after - excess, length)
        kept: Ints = np.minimum(positions, stop[:, None])
        return kept

    def _characters(self, batch: _Round, place: int, done: FittedViews) -> Ints:
        first, stop = done.text[batch.rows[place]]
        ranges = np.array(batch.encodings[place].offsets, np.int64).reshape(-1, 2)[first:stop]
        return ranges - self._encoder.text_start(batch.which[place], batch.pieces[place])


class WordCutter:
    """Drops the last words of texts that have more than `tokens` tokens by themselves."""

    def __init__(self, tokenizer: Tokenizer, tokens: int, *, max_tokens: int) -> None:
        """Take the tokenizer; a text's tokens are counted up to `max_tokens`."""
        encoder = PromptEncoder(tokenizer, (Prompt("", ""),), special_tokens=False)
        limits = Limits(np.array([max_tokens]), more=np.array([False]), copies=np.array([1]))
        self._fitter = TruncatingEncoder(encoder, limits, needs_text=False)
        self._tokens = tokens
        self._most = _MOST_CHARS_PER_TOKEN * max_tokens

    def __call__(self, texts: Sequence[str]) -> tuple[list[str], Flags]:
        """Return the texts, and which of them were cut [R].

        Repeatedly keeps the share tokens / count of a text's words, joined by single blanks. A text
        of which no word would be left keeps its words: the authors keep nothing then, and all such
        texts have one vector.
        """
        shortened, cut = list(texts), np.zeros(len(texts), np.bool_)
        words: dict[int, list[str]] = {}
        todo = np.arange(len(texts))
        while todo.size:
            counts = self._count([shortened[row] for row in todo])
            over = counts > self._tokens
            again = []
            for row, count in zip(todo[over].tolist(), counts[over].tolist(), strict=True):
                cut[row] = True
                own = words.get(row) or shortened[row][: self._most].split()
                kept = int(len(own) * (self._tokens / count))
                if kept:
                    words[row] = own[:kept]
                    shortened[row] = " ".join(words[row])
                    again.append(row)
            todo = np.array(again, np.int64)
        return shortened, cut

    def _count(self, texts: Sequence[str]) -> Ints:
        ids = self._fitter.fit([0] * len(texts), texts).ids
        return np.fromiter(map(len, ids), np.int64, len(texts))
