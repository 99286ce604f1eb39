"""What puts texts into a recipe's templates, and how long views may be."""

import numpy as np
from tokenizers import Tokenizer

from embedjob.beside import anchors_in
from embedjob.errors import ConfigError
from embedjob.pieces import span_rule, templates
from embedjob.recipe import Recipe
from embedjob.text.cutting import Fits, Ints
from embedjob.text.joint import JointFitter
from embedjob.text.prompts import prompts, tails
from embedjob.text.separate import PieceFitter, special_id
from embedjob.text.spans import NEED_TEXT


def fitter(tokenizer: Tokenizer, recipe: Recipe) -> Fits:
    """What puts texts into the recipe's templates: as one string, or piece by piece."""
    adds = recipe.special_tokens.bos == "auto"
    found = templates(recipe)
    for piece in (piece for one in found for piece in one.pieces if piece.special):
        special_id(tokenizer, str(piece.content))
    if not found[0].joint:
        return PieceFitter(tokenizer, found, special_tokens=adds)
    return JointFitter(
        tokenizer,
        prompts(recipe),
        special_tokens=adds,
        needs_text=span_rule(recipe)[0] in NEED_TEXT
        or recipe.long_text == "chunk_mean"
        or bool(anchors_in(recipe.heads)),
        tails=tails(recipe),
        chars_over=recipe.max_tokens if recipe.long_text == "late_chunk" else None,
    )


def uncounted(tokenizer: Tokenizer, recipe: Recipe) -> Ints:
    """Per template, the tokens that `max_tokens` does not count: those of demonstrations."""
    each = range(recipe.views)
    if recipe.demonstrations_count or not recipe.demonstrations:
        return np.zeros(len(each), np.int64)
    shown = fitter(tokenizer, recipe)
    without = fitter(tokenizer, recipe.model_copy(update={"demonstrations": ()}))
    return np.array([len(shown.whole(n, "a")) - len(without.whole(n, "a")) for n in each])


def require_positions(limits: Ints, positions: int | None) -> None:
    """ConfigError if views are longer than the model can be: by demonstrations, if at all."""
    if positions is not None and limits.max() > positions:
        raise ConfigError(
            "encoder.demonstrations: with max_tokens and demonstrations_count: false views have up"
            f" to {limits.max()} tokens, but the model has {positions} positions; give fewer, or"
            " lower max_tokens"
        )
