"""Segments tokenized separately: their ids are joined, never their strings."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from tokenizers import Tokenizer

from embedjob.config.templates import FilledSegment, FilledTemplate
from embedjob.errors import ConfigError
from embedjob.text.arrays import Ints
from embedjob.text.encoding import PromptEncoder
from embedjob.text.prompts import Prompt
from embedjob.text.truncation import FittedViews, Limits, TruncatingEncoder

_BARE = Prompt("", "")
_NO_BUDGET = 2**31


@dataclass(frozen=True)
class _SeparateTemplate:
    """A template's ids in order, None where the text goes, and how many tokens each slot takes."""

    ids: tuple[tuple[int, ...] | None, ...]
    budgets: tuple[int, ...]
    marked: tuple[int, int]
    shown: str

    @property
    def fixed(self) -> int:
        return sum(len(ids) for ids in self.ids if ids is not None)


class SegmentFitter:
    """Encodes texts once, and puts their ids between those of each template."""

    def __init__(
        self, tokenizer: Tokenizer, templates: Sequence[FilledTemplate], *, special_tokens: bool
    ) -> None:
        """Tokenize the templates; `special_tokens` puts the tokenizer's own around the ids."""
        self._encoder = PromptEncoder(tokenizer, (_BARE,), special_tokens=False)
        framed = PromptEncoder(tokenizer, (_BARE,), special_tokens=special_tokens)
        whole = framed.encode([0], ["a"], offsets=False)[0].ids
        self.closing = framed.frame.after
        opening = framed.frame.before
        self._before, self._after = whole[:opening], whole[len(whole) - self.closing :]
        self._templates = [_read(tokenizer, template) for template in templates]
        self._limits: Ints = np.full(len(templates), _NO_BUDGET, np.int64)
        self._left = False

    def limit(self, tokens: Ints, *, left: bool = False) -> None:
        """Cut texts from now on so that no view has more tokens than its template may."""
        self._limits, self._left = tokens, left

    def whole(self, template: int, text: str) -> list[int]:
        """Return all ids of a text under a template."""
        ids = self._encoder.encode([0], [text], offsets=False)[0].ids
        tokenized = self._templates[template]
        return self._joined(tokenized, ids, [len(ids)] * len(tokenized.budgets))[0]

    def prompt(self, template: int) -> int:
        """Count the tokens before the text, with the tokenizer's opening ones."""
        segments = self._templates[template].ids
        first = takewhile(lambda ids: ids is not None, segments)
        return len(self._before) + sum(len(ids) for ids in first if ids)

    def shown(self, template: int) -> str:
        """Return the template for people."""
        return self._templates[template].shown

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the ids as the tokenizer spells them."""
        return self._encoder.tokens(ids)

    def fit(self, which: Sequence[int], texts: Sequence[str]) -> FittedViews:
        """Put each text into template number `which`; every copy of a text is cut alike."""
        distinct = list(dict.fromkeys(texts))
        place = {text: number for number, text in enumerate(distinct)}
        encoded = self._texts(distinct)
        positions: Ints = np.zeros((len(texts), 4), np.int64)
        truncated = np.zeros(len(texts), np.bool_)
        rows = []
        for row, (number, text) in enumerate(zip(which, texts, strict=True)):
            tokenized, ids = self._templates[number], encoded.ids[place[text]]
            takes = self._takes(tokenized, len(ids), int(self._limits[number]))
            joined, positions[row] = self._joined(tokenized, ids, takes)
            rows.append(joined)
            truncated[row] = encoded.truncated[place[text]] or min(takes) < len(ids)
        characters = encoded.characters[[place[text] for text in texts]]
        return FittedViews(rows, positions[:, :2], positions[:, 2:], truncated, characters)

    def _texts(self, texts: Sequence[str]) -> FittedViews:
        most = max(
            max(self._takes(tokenized, _NO_BUDGET, int(limit)))
            for tokenized, limit in zip(self._templates, self._limits, strict=True)
        )
        limits = Limits(
            np.array([most]), more=np.array([False]), copies=np.array([1]), left=self._left
        )
        return TruncatingEncoder(self._encoder, limits, needs_text=False).fit(
            [0] * len(texts), texts
        )

    def _takes(self, tokenized: _SeparateTemplate, length: int, limit: int) -> list[int]:
        """Return how many tokens of a text each slot takes: an even share of the room."""
        room = limit - tokenized.fixed - len(self._before) - len(self._after)
        wanted = [min(length, budget) for budget in tokenized.budgets]
        level = length
        for done, want in enumerate(sorted(wanted)):
            share = max(0, room // (len(wanted) - done))
            level = min(level, share) if want > share else level
            room -= min(want, share)
        return [min(want, level) for want in wanted]

    def _joined(
        self, tokenized: _SeparateTemplate, ids: Sequence[int], takes: Sequence[int]
    ) -> tuple[list[int], tuple[int, int, int, int]]:
        """Return the view's ids, and the positions of its last text and of its marked segments."""
        joined = list(self._before)
        edges, text = [len(joined)], (0, 0)
        slots = iter(takes)
        for segment in tokenized.ids:
            joined += self._kept(ids, next(slots)) if segment is None else segment
            edges.append(len(joined))
            text = (edges[-2], edges[-1]) if segment is None else text
        first, stop = tokenized.marked
        return [*joined, *self._after], (*text, edges[first], edges[stop])

    def _kept(self, ids: Sequence[int], take: int) -> Sequence[int]:
        """Return the tokens of a text that one of its slots takes."""
        return ids[len(ids) - take :] if self._left else ids[:take]


def _read(tokenizer: Tokenizer, template: FilledTemplate) -> _SeparateTemplate:
    marked = [number for number, segment in enumerate(template.segments) if segment.marked]
    texts = [segment for segment in template.segments if segment.content is None]
    whole = "|".join("{text}" if p.content is None else p.content for p in template.segments)
    return _SeparateTemplate(
        ids=tuple(_ids(tokenizer, segment) for segment in template.segments),
        budgets=tuple(segment.max_tokens or _NO_BUDGET for segment in texts),
        marked=(marked[0], marked[-1] + 1) if marked else (0, 0),
        shown=repr(whole if len(whole) <= 200 else f"{whole[:100]} ... {whole[-100:]}"),
    )


def _ids(tokenizer: Tokenizer, segment: FilledSegment) -> tuple[int, ...] | None:
    if segment.content is None:
        return None
    if segment.special:
        return (special_id(tokenizer, segment.content),)
    return tuple(tokenizer.encode(segment.content, add_special_tokens=False).ids)


def special_id(tokenizer: Tokenizer, name: str) -> int:
    """Return the id of a special token; ConfigError if the tokenizer has no token of that name."""
    added = tokenizer.get_added_tokens_decoder()
    token_id = next((token for token, entry in added.items() if entry.content == name), None)
    if token_id is None:
        raise ConfigError(
            f"encoder.templates: got special: {name!r}, which this tokenizer does not have; use"
            " the model that was trained with it, or name it in encoder.special_tokens.add"
        )
    return token_id
