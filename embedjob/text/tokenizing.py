"""Texts to token views: what every encoder of this house is fed."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from embedjob.beside import sparse_in
from embedjob.errors import ConfigError
from embedjob.recipe import Recipe
from embedjob.text.cutting import Fitted
from embedjob.text.joint import JointFitter
from embedjob.text.pieces import span_rule, templates
from embedjob.text.prompts import prepare, prompts
from embedjob.text.separate import PieceFitter, special_id
from embedjob.text.spans import NEED_TEXT, Ints, Layout, spans
from embedjob.text.views import Ids, TokenViews, assemble
from embedjob.text.words import WordIds, stops

# Texts that have no token in common, so that what their views share is the template's.
_PROBES = ("a", "The", "zebra", "Oh", "7", "Éa", "日本", "не")


class Fits(Protocol):
    """Puts texts into templates; `closing` counts the tokenizer's own tokens at the end."""

    closing: int

    def limit(self, tokens: Ints) -> None:
        """Cut texts from now on."""
        ...

    def whole(self, template: int, text: str) -> list[int]:
        """All ids of a text under a template."""
        ...

    def prompt(self, template: int) -> int:
        """Tokens of what stands before the text, alone, with the tokenizer's opening ones."""
        ...

    def shown(self, template: int) -> str:
        """The template for people."""
        ...

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The ids as the tokenizer spells them."""
        ...

    def fit(self, which: Sequence[int], texts: Sequence[str]) -> Fitted:
        """Each text under a template."""
        ...


class ViewTokenizer:
    """Renders texts under a recipe's templates and tokenizes them; one per process.

    It takes the tokenizer over. `eos_id` is what `special_tokens.eos: append` appends where the
    recipe itself names no id.
    """

    def __init__(self, tokenizer: Tokenizer, recipe: Recipe, *, eos_id: int | None = None) -> None:
        """Refuses a recipe whose templates leave the text no room, or its span no token."""
        tokenizer.add_special_tokens(list(recipe.special_tokens.add))
        self._prepare = prepare(recipe.prepare)
        # Else what comes later changes the states of what comes first.
        self._causal = recipe.attention == "causal"
        self._rule, self._offset = span_rule(recipe)
        self._fitter = _fitter(tokenizer, recipe, needs_text=self._rule in NEED_TEXT)
        self._templates = len(recipe.templates)
        self._prompts: Ints = np.array([*map(self._fitter.prompt, range(self._templates))])
        if recipe.special_tokens.bos == "literal":
            self._require_literal_bos(tokenizer)
        self._eos = self._closing(recipe, eos_id)
        self._check_room(recipe.max_tokens)
        self._fitter.limit(recipe.max_tokens - np.array([len(eos) for eos in self._eos], np.int64))
        self.prefixes = self._shared_prefixes()
        asked = sparse_in(recipe.heads)
        self._words = WordIds(tokenizer) if asked and asked.words == "text" else None
        self._stops = _stops(tokenizer, recipe)

    def views(self, texts: Sequence[str]) -> TokenViews:
        """One view per text and template, text-major, and what else is asked of the texts."""
        views = self._views(texts, self.prefixes)
        cleaned = [self._prepare(text) for text in texts]
        words = None if self._words is None else self._words(cleaned)
        return replace(views, words=words, stops=self._stops)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The ids as the tokenizer spells them, for people."""
        return self._fitter.tokens(ids)

    def _views(self, texts: Sequence[str], prefixes: Sequence[Sequence[int]]) -> TokenViews:
        per_text = self._templates
        which = list(range(per_text)) * len(texts)
        cleaned = [self._prepare(text) for text in texts]
        fitted = self._fitter.fit(which, [text for text in cleaned for _ in range(per_text)])
        ids = [[*row, *self._eos[view]] for row, view in zip(fitted.ids, which, strict=True)]
        return assemble(
            ids,
            span=spans(self._layout(fitted, which), rule=self._rule, offset=self._offset),
            truncated=fitted.truncated,
            prefixes=prefixes,
            text_first=self._causal,
        )

    def _layout(self, fitted: Fitted, which: Sequence[int]) -> Layout:
        template = np.asarray(which, np.int64)
        eos: Ints = np.array([len(eos) for eos in self._eos], np.int64)[template]
        return Layout(
            length=np.fromiter(map(len, fitted.ids), np.int64, len(which)) + eos,
            text_start=fitted.text[:, 0],
            text_stop=fitted.text[:, 1],
            closing=eos + self._fitter.closing,
            marked_start=fitted.marked[:, 0],
            marked_stop=fitted.marked[:, 1],
            prompt=self._prompts[template],
        )

    def _require_literal_bos(self, tokenizer: Tokenizer) -> None:
        specials = {i for i, one in tokenizer.get_added_tokens_decoder().items() if one.special}
        for number in range(self._templates):
            if not specials.intersection(self._fitter.whole(number, _PROBES[0])[:1]):
                raise ConfigError(
                    "encoder.special_tokens.bos: got literal, but the template"
                    f" {self._fitter.shown(number)} begins with no special token of this"
                    " tokenizer; write it there, or set bos: auto"
                )

    def _closing(self, recipe: Recipe, eos_id: int | None) -> tuple[tuple[int, ...], ...]:
        """Per template, the EOS that is appended: none where one is last already."""
        specials = recipe.special_tokens
        if specials.eos == "none":
            return ((),) * self._templates
        eos = eos_id if specials.eos_id is None else specials.eos_id
        if eos is None:
            raise ConfigError(
                "encoder.special_tokens.eos: got 'append', but the model names no EOS token;"
                " set encoder.special_tokens.eos_id, or eos: none"
            )
        return tuple(
            () if self._fitter.whole(number, _PROBES[0])[-1:] == [eos] else (eos,)
            for number in range(self._templates)
        )

    def _check_room(self, max_tokens: int) -> None:
        for number in range(self._templates):
            empty = len(self._fitter.whole(number, ""))
            filled = min(len(self._fitter.whole(number, probe)) for probe in _PROBES)
            needed = max(empty, filled) + len(self._eos[number])
            if needed > max_tokens:
                raise ConfigError(
                    f"encoder.max_tokens: got {max_tokens}, but the template"
                    f" {self._fitter.shown(number)} with special tokens and one token of text"
                    f" needs {needed};"
                    f" set it to {needed} or more, or shorten the template"
                )

    def _shared_prefixes(self) -> tuple[tuple[int, ...], ...]:
        """Per template, the ids that all its views begin with and no span can hold."""
        nothing: tuple[tuple[int, ...], ...] = ((),) * self._templates
        probes = self._views(_PROBES, nothing)
        self._check_span(probes)
        if not self._causal:
            return nothing
        found = []
        for number in range(self._templates):
            mine = range(number, len(probes.prefix), self._templates)
            rows = [probes.full_ids(view).tolist() for view in mine]
            most = min([int(probes.span[mine, 0].min()), *(len(row) - 1 for row in rows)])
            columns = zip(*(row[:most] for row in rows), strict=True)
            same = takewhile(lambda column: len(set(column)) == 1, columns)
            found.append(tuple(column[0] for column in same))
        return tuple(found)

    def _check_span(self, probes: TokenViews) -> None:
        empty = (probes.span[:, 0] == probes.span[:, 1]).reshape(-1, self._templates)
        for number in range(self._templates):
            if empty[:, number].all():
                raise ConfigError(
                    f"encoder.span: {self._rule!r} with offset {self._offset} holds no token"
                    f" under the template {self._fitter.shown(number)}; choose another span or"
                    " template"
                )


def _stops(tokenizer: Tokenizer, recipe: Recipe) -> Ids | None:
    """The ids that end the recipe's decoding; ConfigError if no token of the tokenizer does."""
    if recipe.decode is None:
        return None
    found = stops(tokenizer, recipe.decode.until)
    if not found:
        raise ConfigError(
            f"encoder.decode.until: got {recipe.decode.until!r}, which no token of this tokenizer"
            " contains; choose shorter text"
        )
    return np.array(found, np.uint32)


def _fitter(tokenizer: Tokenizer, recipe: Recipe, *, needs_text: bool) -> Fits:
    """What puts texts into the recipe's templates: as one string, or piece by piece."""
    adds = recipe.special_tokens.bos == "auto"
    found = templates(recipe)
    for piece in (piece for one in found for piece in one.pieces if piece.special):
        special_id(tokenizer, str(piece.content))
    if found[0].joint:
        return JointFitter(tokenizer, prompts(recipe), special_tokens=adds, needs_text=needs_text)
    return PieceFitter(tokenizer, found, special_tokens=adds)
