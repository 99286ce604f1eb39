"""Static tables as config: what a recipe may ask of vectors that are looked up, or of terms."""

from collections.abc import Mapping
from typing import Any

from embedjob.config.pooling import WordWeights

# What a value begins with that names a fit of the job, as `encoder.model` does.
FIT_NAME = "fit:"
# What is left of a text that is longer than `max_tokens`; other ways embed its parts.
WHOLE = ("truncate", "bad")
# What is embedded is one text with one vector: the row's own, or each of its passages.
OF_ONE_TEXT = (*WHOLE, "split")
# A table leaves these keys nothing to decide.
_LOOKED_UP: Mapping[str, Any] = {
    "attention": "bidirectional",
    "layer": -1,
    "templates": ("{text}",),
    "prepare": "none",
    "span": "all",
    "aggregation": "mean",
    "dtype": "float32",
    "quantize": "none",
    "interventions": (),
    "decode": None,
    "adapters": (),
    "word_cut": None,
    "truncation_side": "right",
    "generate": None,
}
_COUNTED: Mapping[str, Any] = {"finish": (), "vector_dtype": "float32"}


def looked_up(recipe: Any, *, counts_terms: bool) -> dict[str, Any]:
    """Return the keys that a static table leaves nothing to decide, with the values that they have.

    A vocabulary, which `counts_terms`, gives sparse rows that are finished as they are.
    """
    weighted = isinstance(recipe.pooling, WordWeights) and not counts_terms
    allowed = WHOLE if counts_terms else OF_ONE_TEXT
    whole = recipe.long_text if recipe.long_text in allowed else WHOLE[0]
    bare = {
        "long_text": whole,
        "special_tokens": type(recipe.special_tokens)(),
        "pooling": recipe.pooling if weighted else "mean",
    }
    return {**_LOOKED_UP, **bare, **(_COUNTED if counts_terms else {"heads": ()})}
