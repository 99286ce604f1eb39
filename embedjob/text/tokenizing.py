"""Tokenization: from texts to token views, the input of every encoder."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import numpy as np
from tokenizers import Tokenizer

from embedjob.config.interventions import slotted
from embedjob.config.recipe import Recipe
from embedjob.config.templates import span_rule
from embedjob.errors import ConfigError
from embedjob.text.arrays import Ints
from embedjob.text.encoding import TokenCounter
from embedjob.text.fitting import check_positions, template_fitter, uncounted_tokens
from embedjob.text.long_text import MOST_TOKENS, Cutter, divide_span, regroup_units, shift_parts
from embedjob.text.passages.splitting import PassageSplitter
from embedjob.text.prompts import prepare, tails
from embedjob.text.separate import special_id
from embedjob.text.slots import (
    TEMPLATE_PROBES,
    add_tokens,
    auxiliary_recipe,
    slot_position,
    stand_in_id,
)
from embedjob.text.spans import Positions, spans
from embedjob.text.truncation import FittedViews, WordCutter
from embedjob.text.views import TokenViews, assemble
from embedjob.text.words import WordIds, stops


class ViewTokenizer:
    """Renders texts under a recipe's templates and tokenizes them; one per process.

    It owns the tokenizer from then on. `eos_id` is the id that `special_tokens.eos: append` appends
    where the recipe names none; `positions` is the model's limit, None for no limit.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        recipe: Recipe,
        *,
        eos_id: int | None = None,
        positions: int | None = None,
    ) -> None:
        """Prepare the templates; ConfigError if they leave text no room or the span no token."""
        add_tokens(tokenizer, recipe)
        self._prepare = prepare(recipe.prepare)
        most = recipe.max_tokens
        self._cut_words = (
            None
            if recipe.word_cut is None
            else WordCutter(tokenizer, recipe.word_cut, max_tokens=most)
        )
        # Only then do states not depend on later tokens, so that prefixes can be shared.
        self._causal = recipe.attention == "causal"
        self._rule, self._offset = span_rule(recipe)
        # Where tokens are counted alone, a span may begin within a prefix that other views share.
        self._shares = self._causal and not tails(recipe)
        self._fitter = template_fitter(tokenizer, recipe)
        self._templates = recipe.views
        self._prompts: Ints = np.array([*map(self._fitter.prompt, range(self._templates))])
        if recipe.special_tokens.bos == "literal":
            self._require_literal_bos(tokenizer)
        self._endings = self._closing(recipe, eos_id)
        self._scores = bool(recipe.continuations)
        self._scores_ids = any(not isinstance(one, str) for one in recipe.continuations)
        if recipe.long_text == "late_chunk":
            most = max(most, min(MOST_TOKENS, positions or MOST_TOKENS))
        limits = most + uncounted_tokens(tokenizer, recipe)
        self._check_room(limits)
        decoded = recipe.decode.max_tokens - 1 if recipe.decode else 0
        check_positions(limits + decoded, positions)
        limits = limits - self._shorter(len(recipe.continuations))
        left = recipe.truncation_side == "left" and recipe.long_text == "truncate"
        self._fitter.limit(limits - self._ending_lengths, left=left)
        self._slots = self._slots_of(recipe, tokenizer)
        self._standing = stand_in_id(tokenizer, slotted(recipe.interventions))
        self.prefixes = self._shared_prefixes()
        auxiliary = auxiliary_recipe(recipe)
        self._auxiliary = ViewTokenizer(tokenizer, auxiliary, eos_id=eos_id) if auxiliary else None
        self._part_tokens = recipe.max_tokens
        self.splitter = self._splitter(tokenizer, recipe)
        self._views_of = {"chunk_mean": self._cut, "late_chunk": self._divided}.get(
            recipe.long_text, self._views
        )
        self.cutter = Cutter(tokenizer, self._fit, per_text=self._templates)
        self._words = WordIds(tokenizer) if recipe.reads_text_words else None
        self._stops = stops(tokenizer, recipe.decode.until) if recipe.decode else None

    def views(self, texts: Sequence[str]) -> TokenViews:
        """Return one view per text and template, text-major, with parts or words if requested."""
        kept, shortened = (texts, None) if self._cut_words is None else self._cut_words(texts)
        cleaned = [self._prepare(text) for text in kept]
        views = self._views_of(cleaned)
        if shortened is not None:
            cut = views.truncated | np.repeat(shortened, self._templates)
            views = replace(views, truncated=cut)
        words = None if self._words is None else self._words(cleaned)
        auxiliary = None if self._auxiliary is None else self._auxiliary.views(texts)
        views = replace(
            views, words=words, stops=self._stops, slots=self._slots, auxiliary=auxiliary
        )
        if views.parts is None:
            return views
        starts = [text.find(clean) for text, clean in zip(texts, cleaned, strict=True)]
        return replace(views, parts=shift_parts(views.parts, np.array(starts, np.int64)))

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the ids as the tokenizer spells them, for people."""
        return self._fitter.tokens(ids)

    def _splitter(self, tokenizer: Tokenizer, recipe: Recipe) -> PassageSplitter | None:
        """Return what cuts texts into passages; ConfigError if views have no room for them."""
        if recipe.long_text != "split":
            return None
        count = TokenCounter(tokenizer)
        splitter = PassageSplitter(recipe.split, count)
        words = splitter.longest().split()
        if not self._cuts(words):
            return splitter
        over = bisect_left(range(len(words)), True, key=lambda number: self._cuts(words[:number]))
        room = int(count([" ".join(words[: over - 1])])[0])
        raise ConfigError(
            f"encoder.split.max_tokens: got {recipe.split.max_tokens}, but with encoder.max_tokens:"
            f" {recipe.max_tokens} the templates leave {room} tokens to a text; set it to {room} or"
            " less, or encoder.max_tokens higher"
        )

    def _cuts(self, words: Sequence[str]) -> bool:
        """Tell whether a text of these words is cut under some template."""
        return bool(self._fit([self._prepare(" ".join(words))]).truncated.any())

    def _fit(self, texts: Sequence[str]) -> FittedViews:
        which = list(range(self._templates)) * len(texts)
        return self._fitter.fit(which, [text for text in texts for _ in range(self._templates)])

    def _views(self, texts: Sequence[str]) -> TokenViews:
        return self._assembled(self._fit(texts), self.prefixes)

    def _cut(self, texts: Sequence[str]) -> TokenViews:
        """Return the views of all parts of the texts, without parts that have no counted token."""
        cut = self.cutter.cut(texts)
        views = self._assembled(cut.fitted, self.prefixes)
        tokens = np.diff(cut.fitted.text, axis=1)[:, 0]
        return regroup_units(views, cut.offsets, tokens)

    def _divided(self, texts: Sequence[str]) -> TokenViews:
        """Return one view per text, with the spans of its parts."""
        fitted = self._fit(texts)
        views = self._assembled(fitted, self.prefixes)
        return replace(views, parts=divide_span(fitted, views.span, texts, self._part_tokens))

    def _assembled(self, fitted: FittedViews, prefixes: Sequence[Sequence[int]]) -> TokenViews:
        which = list(range(self._templates)) * (len(fitted.ids) // self._templates)
        ids = [[*row, *self._endings[view]] for row, view in zip(fitted.ids, which, strict=True)]
        if self._standing is not None:
            for row, view in zip(ids, which, strict=True):
                row[self._slots[view]] = self._standing
        return assemble(
            ids,
            span=spans(self._positions(fitted, which), rule=self._rule, offset=self._offset),
            truncated=fitted.truncated,
            prefixes=prefixes,
            # At its slot a view holds what only its own last token has seen.
            text_first=self._causal and not self._slots,
            scored=self._scores,
        )

    def _positions(self, fitted: FittedViews, which: Sequence[int]) -> Positions:
        template = np.asarray(which, np.int64)
        ending: Ints = self._ending_lengths[template]
        before = np.fromiter(map(len, fitted.ids), np.int64, len(which))
        marked = fitted.marked
        if self._scores_ids:
            marked = np.stack([before, before + ending], axis=1)
        return Positions(
            length=before + ending,
            text_start=fitted.text[:, 0],
            text_stop=fitted.text[:, 1],
            closing=ending + self._fitter.closing,
            marked_start=marked[:, 0],
            marked_stop=marked[:, 1],
            prompt=self._prompts[template],
        )

    @property
    def _ending_lengths(self) -> Ints:
        return np.array([len(ids) for ids in self._endings], np.int64)

    def _slots_of(self, recipe: Recipe, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Return the slot's position per template; empty where no intervention has one."""
        intervention = slotted(recipe.interventions)
        if intervention is None:
            return ()
        slot = special_id(tokenizer, str(intervention.slot))
        return tuple(
            slot_position(
                [self._fitter.whole(number, probe) for probe in TEMPLATE_PROBES],
                slot,
                of=intervention,
                template=self._fitter.shown(number),
            )
            for number in range(self._templates)
        )

    def _require_literal_bos(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder()
        specials = {token for token, entry in added.items() if entry.special}
        for number in range(self._templates):
            if not specials.intersection(self._fitter.whole(number, TEMPLATE_PROBES[0])[:1]):
                raise ConfigError(
                    "encoder.special_tokens.bos: got literal, but the template"
                    f" {self._fitter.shown(number)} begins with no special token of this"
                    " tokenizer; write it there, or set bos: auto"
                )

    def _closing(self, recipe: Recipe, eos_id: int | None) -> tuple[tuple[int, ...], ...]:
        """Return per template the ids to append: those of a continuation, or the EOS.

        There is no EOS where the template already ends in it.
        """
        if recipe.continuations:
            ids = [() if isinstance(one, str) else one for one in recipe.continuations]
            return tuple(ids * len(recipe.templates))
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
            () if self._fitter.whole(number, TEMPLATE_PROBES[0])[-1:] == [eos] else (eos,)
            for number in range(self._templates)
        )

    def _shorter(self, continuations: int) -> Ints:
        """Return per view by how many tokens it is shorter than with the longest continuation.

        So much room is left, or a long text would be cut elsewhere before each of them.
        """
        if not continuations:
            return np.zeros(self._templates, np.int64)
        each = range(self._templates)
        sizes = np.array(
            [len(self._fitter.whole(number, TEMPLATE_PROBES[0])) for number in each], np.int64
        )
        by_template = (sizes + self._ending_lengths).reshape(-1, continuations)
        shorter: Ints = (by_template.max(axis=1, keepdims=True) - by_template).reshape(-1)
        return shorter

    def _check_room(self, limits: Ints) -> None:
        for number, max_tokens in enumerate(limits.tolist()):
            empty = len(self._fitter.whole(number, ""))
            filled = min(len(self._fitter.whole(number, probe)) for probe in TEMPLATE_PROBES)
            needed = max(empty, filled) + len(self._endings[number])
            if needed > max_tokens:
                raise ConfigError(
                    f"encoder.max_tokens: got {max_tokens}, but the template"
                    f" {self._fitter.shown(number)} with special tokens and one token of text"
                    f" needs {needed};"
                    f" set it to {needed} or more, or shorten the template"
                )

    def _shared_prefixes(self) -> tuple[tuple[int, ...], ...]:
        """Return per template the ids that all its views begin with and no span can hold."""
        nothing: tuple[tuple[int, ...], ...] = ((),) * self._templates
        probes = self._assembled(
            self._fit([self._prepare(probe) for probe in TEMPLATE_PROBES]), nothing
        )
        self._check_span(probes)
        if not self._shares:
            return nothing
        prefixes = []
        for number in range(self._templates):
            mine = range(number, len(probes.prefix), self._templates)
            rows = [probes.full_ids(view).tolist() for view in mine]
            most = min([int(probes.span[mine, 0].min()), *(len(row) - 1 for row in rows)])
            most = min([most, *self._slots[number : number + 1]])
            columns = zip(*(row[:most] for row in rows), strict=True)
            same = takewhile(lambda column: len(set(column)) == 1, columns)
            prefixes.append(tuple(column[0] for column in same))
        return tuple(prefixes)

    def _check_span(self, probes: TokenViews) -> None:
        """Raise ConfigError if an offset past the start leaves nothing of the shortest texts."""
        empty = (probes.span[:, 0] == probes.span[:, 1]).reshape(-1, self._templates)
        hollow = empty.any(axis=0) if self._offset > 0 else empty.all(axis=0)
        for number in np.flatnonzero(hollow):
            text = TEMPLATE_PROBES[int(empty[:, number].argmax())]
            raise ConfigError(
                f"encoder.span: {self._rule!r} with offset {self._offset} holds no token for the"
                f" text {text!r} under the template {self._fitter.shown(int(number))}; choose"
                " another span or template"
            )
