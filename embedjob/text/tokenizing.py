"""Texts to token views: what every encoder of this house is fed."""

from collections.abc import Sequence
from itertools import takewhile

import numpy as np
from tokenizers import Tokenizer

from embedjob.config import Recipe, SpanOffset
from embedjob.errors import ConfigError
from embedjob.text.cutting import Fitted, Fitter, Limits
from embedjob.text.encoding import PromptEncoder
from embedjob.text.prompts import Prompt, prepare, prompts
from embedjob.text.spans import NEED_TEXT, Ints, Layout, spans
from embedjob.text.views import TokenViews, assemble

# Texts that have no token in common, so that what their views share is the template's.
_PROBES = ("a", "The", "zebra", "Oh", "7", "Éa", "日本", "не")


class ViewTokenizer:
    """Renders texts under a recipe's templates and tokenizes them; one per process.

    It takes the tokenizer over. `eos_id` is what `special_tokens.eos: append` appends where the
    recipe itself names no id.
    """

    def __init__(self, tokenizer: Tokenizer, recipe: Recipe, *, eos_id: int | None = None) -> None:
        """Refuses a recipe whose templates leave the text no room, or its span no token."""
        tokenizer.add_special_tokens(list(recipe.special_tokens.add))
        self._prompts = prompts(recipe)
        self._prepare = prepare(recipe.prepare)
        # Else what comes later changes the states of what comes first.
        self._causal = recipe.attention == "causal"
        self._rule, self._offset = _span_rule(recipe)
        self._encoder = PromptEncoder(
            tokenizer, self._prompts, special_tokens=recipe.special_tokens.bos == "auto"
        )
        self._eos = self._closing(recipe, eos_id)
        self._check_room(recipe.max_tokens)
        limits = Limits(
            tokens=recipe.max_tokens - np.array([len(eos) for eos in self._eos], np.int64),
            suffix=np.array([bool(prompt.after) for prompt in self._prompts]),
        )
        framed = any(prompt.before or prompt.after for prompt in self._prompts)
        self._fitter = Fitter(self._encoder, limits, needs_text=framed and self._rule in NEED_TEXT)
        self.prefixes = self._shared_prefixes()

    def views(self, texts: Sequence[str]) -> TokenViews:
        """One view per text and template, text-major."""
        return self._views(texts, self.prefixes)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The ids as the tokenizer spells them, for people."""
        return self._encoder.tokens(ids)

    def _views(self, texts: Sequence[str], prefixes: Sequence[Sequence[int]]) -> TokenViews:
        per_text = len(self._prompts)
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
        eos: Ints = np.array([len(eos) for eos in self._eos], np.int64)[np.asarray(which, np.int64)]
        return Layout(
            length=np.fromiter(map(len, fitted.ids), np.int64, len(which)) + eos,
            text_start=fitted.text[:, 0],
            text_stop=fitted.text[:, 1],
            closing=eos + self._encoder.frame.after,
        )

    def _template_ids(self, prompt: int, text: str) -> list[int]:
        return self._encoder.encode([prompt], [text], offsets=False)[0].ids

    def _closing(self, recipe: Recipe, eos_id: int | None) -> tuple[tuple[int, ...], ...]:
        """Per template, the EOS that is appended: none where one is last already."""
        specials = recipe.special_tokens
        if specials.eos == "none":
            return ((),) * len(self._prompts)
        eos = eos_id if specials.eos_id is None else specials.eos_id
        if eos is None:
            raise ConfigError(
                "encoder.special_tokens.eos: got 'append', but the model names no EOS token;"
                " set encoder.special_tokens.eos_id, or eos: none"
            )
        return tuple(
            () if self._template_ids(prompt, _PROBES[0])[-1:] == [eos] else (eos,)
            for prompt in range(len(self._prompts))
        )

    def _check_room(self, max_tokens: int) -> None:
        for number, prompt in enumerate(self._prompts):
            empty = len(self._template_ids(number, ""))
            filled = min(len(self._template_ids(number, probe)) for probe in _PROBES)
            needed = max(empty, filled) + len(self._eos[number])
            if needed > max_tokens:
                raise ConfigError(
                    f"encoder.max_tokens: got {max_tokens}, but the template {_shown(prompt)}"
                    f" with special tokens and one token of text needs {needed};"
                    f" set it to {needed} or more, or shorten the template"
                )

    def _shared_prefixes(self) -> tuple[tuple[int, ...], ...]:
        """Per template, the ids that all its views begin with and no span can hold."""
        nothing: tuple[tuple[int, ...], ...] = ((),) * len(self._prompts)
        probes = self._views(_PROBES, nothing)
        self._check_span(probes)
        if not self._causal:
            return nothing
        found = []
        for number in range(len(self._prompts)):
            mine = range(number, len(probes.prefix), len(self._prompts))
            rows = [probes.full_ids(view).tolist() for view in mine]
            most = min([int(probes.span[mine, 0].min()), *(len(row) - 1 for row in rows)])
            columns = zip(*(row[:most] for row in rows), strict=True)
            same = takewhile(lambda column: len(set(column)) == 1, columns)
            found.append(tuple(column[0] for column in same))
        return tuple(found)

    def _check_span(self, probes: TokenViews) -> None:
        empty = (probes.span[:, 0] == probes.span[:, 1]).reshape(-1, len(self._prompts))
        for number, prompt in enumerate(self._prompts):
            if empty[:, number].all():
                raise ConfigError(
                    f"encoder.span: {self._rule!r} with offset {self._offset} holds no token"
                    f" under the template {_shown(prompt)}; choose another span or template"
                )


def _span_rule(recipe: Recipe) -> tuple[str, int]:
    span = recipe.span
    return (span.rule, span.offset) if isinstance(span, SpanOffset) else (span, 0)


def _shown(prompt: Prompt) -> str:
    whole = prompt.before + "{text}" + prompt.after
    return repr(whole if len(whole) <= 200 else f"{whole[:100]} ... {whole[-100:]}")
