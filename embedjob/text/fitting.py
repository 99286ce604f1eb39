"""Template fitting: put texts into a recipe's templates, and limit the length of views."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from tokenizers import Tokenizer

from embedjob.config.recipe import Recipe
from embedjob.config.templates import span_rule, templates
from embedjob.errors import ConfigError
from embedjob.text.arrays import Ints
from embedjob.text.encoding import PromptEncoder
from embedjob.text.prompts import Prompt, prompts, tails
from embedjob.text.separate import SegmentFitter, special_id
from embedjob.text.spans import NEED_TEXT
from embedjob.text.truncation import FittedViews, Limits, TemplateFitter, TruncatingEncoder


class WholePromptFitter:
    """Encodes each prompt as one string, within limits once they are set."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        *,
        special_tokens: bool,
        needs_text: bool,
        tails: Sequence[Prompt] = (),
        chars_over: int | None = None,
    ) -> None:
        """Take the templates; `needs_text` says whether the span depends on the text's position.

        With `tails`, the marked tokens are as many last tokens as the tails have when tokenized
        alone. The characters of text tokens are kept for views with more than `chars_over` of them.
        """
        self._prompts = tuple(prompts)
        self._encoder = PromptEncoder(tokenizer, self._prompts, special_tokens=special_tokens)
        framed = any(p.before or p.after or p.between or p.marked for p in self._prompts)
        self._needs_text = needs_text and framed
        self._chars_over = chars_over
        self.closing = self._encoder.frame.after
        self._fitter: TruncatingEncoder | None = None
        self._tails_encoder = (
            PromptEncoder(tokenizer, tails, special_tokens=False) if tails else None
        )

    def limit(self, tokens: Ints, *, left: bool = False) -> None:
        """Cut texts from now on so that no view has more tokens than its template may."""
        beyond = [prompt.before if left else prompt.after for prompt in self._prompts]
        pairs = zip(beyond, self._prompts, strict=True)
        limits = Limits(
            tokens=tokens,
            more=np.array([bool(piece or prompt.between) for piece, prompt in pairs]),
            copies=np.array([prompt.copies for prompt in self._prompts], np.int64),
            left=left,
        )
        self._fitter = TruncatingEncoder(
            self._encoder, limits, needs_text=self._needs_text, chars_over=self._chars_over
        )

    def whole(self, template: int, text: str) -> list[int]:
        """Return all ids of a text under a template."""
        return list(self._encoder.encode([template], [text], offsets=False)[0].ids)

    def prompt(self, template: int) -> int:
        """Count the tokens before the text, tokenized alone, with the tokenizer's opening ones."""
        return self._encoder.count_alone(self._prompts[template].before)

    def shown(self, template: int) -> str:
        """Return the template for people."""
        return self._prompts[template].shown

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the ids as the tokenizer spells them."""
        return self._encoder.tokens(ids)

    def fit(self, which: Sequence[int], texts: Sequence[str]) -> FittedViews:
        """Put each text into template number `which`, cut where necessary."""
        assert self._fitter is not None, "limits are not set"
        fitted = self._fitter.fit(which, texts)
        return fitted if self._tails_encoder is None else self._counted(fitted, which, texts)

    def _counted(
        self, fitted: FittedViews, which: Sequence[int], texts: Sequence[str]
    ) -> FittedViews:
        """Mark as many last tokens as the tail has alone; views with cut ids keep their marks."""
        assert self._tails_encoder is not None, "there are no tails"
        assert self._fitter is not None, "limits are not set"
        rows: list[int] = np.flatnonzero(fitted.characters >= 0).tolist()
        shown = [self._fitter.shown(texts[row], int(fitted.characters[row])) for row in rows]
        tails = self._tails_encoder.encode([which[row] for row in rows], shown, offsets=False)
        count = np.fromiter(map(len, tails), np.int64, len(tails))
        marked = fitted.marked.copy()
        marked[rows, 0] = np.maximum(marked[rows, 1] - count, 0)
        return replace(fitted, marked=marked)


def template_fitter(tokenizer: Tokenizer, recipe: Recipe) -> TemplateFitter:
    """Return the fitter of the recipe's templates: as one string, or segment by segment."""
    adds = recipe.special_tokens.bos == "auto"
    rendered = templates(recipe)
    for segment in (
        segment for template in rendered for segment in template.segments if segment.special
    ):
        special_id(tokenizer, str(segment.content))
    if not rendered[0].as_one_string:
        return SegmentFitter(tokenizer, rendered, special_tokens=adds)
    return WholePromptFitter(
        tokenizer,
        prompts(recipe),
        special_tokens=adds,
        needs_text=span_rule(recipe)[0] in NEED_TEXT
        or recipe.long_text == "chunk_mean"
        or bool(recipe.continuations),
        tails=tails(recipe),
        chars_over=recipe.max_tokens if recipe.long_text == "late_chunk" else None,
    )


def uncounted_tokens(tokenizer: Tokenizer, recipe: Recipe) -> Ints:
    """Return per template the tokens that `max_tokens` does not count: those of demonstrations."""
    each = range(recipe.views)
    if recipe.demonstrations_count or not recipe.demonstrations:
        return np.zeros(len(each), np.int64)
    shown = template_fitter(tokenizer, recipe)
    without = template_fitter(tokenizer, recipe.model_copy(update={"demonstrations": ()}))
    return np.array([len(shown.whole(n, "a")) - len(without.whole(n, "a")) for n in each])


def check_positions(limits: Ints, positions: int | None) -> None:
    """Raise ConfigError if views can be longer than the model, which demonstrations may cause."""
    if positions is not None and limits.max() > positions:
        raise ConfigError(
            "encoder.demonstrations: with max_tokens and demonstrations_count: false, views have up"
            f" to {limits.max()} tokens, but the model has {positions} positions; give fewer"
            " demonstrations, or lower max_tokens"
        )
