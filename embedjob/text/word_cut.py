"""Long texts cut by whole words before anything is put around them, as LLM2Vec's authors do."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from embedjob.text.cutting import Fitter, Limits
from embedjob.text.encoding import PromptEncoder
from embedjob.text.prompts import Prompt

# Of a longer text the rest is filling: a string of 10 MB must not cost more than a page.
_MOST_CHARS_PER_TOKEN = 512


class WordCutter:
    """Drops the last words of texts that have more than `tokens` tokens by themselves."""

    def __init__(self, tokenizer: Tokenizer, tokens: int, *, max_tokens: int) -> None:
        """Tokens are counted up to `max_tokens`, and the share of words to keep goes by that."""
        encoder = PromptEncoder(tokenizer, (Prompt("", ""),), special_tokens=False)
        limits = Limits(np.array([max_tokens]), suffix=np.array([False]), copies=np.array([1]))
        self._fitter = Fitter(encoder, limits, needs_text=False)
        self._tokens = tokens
        self._most = _MOST_CHARS_PER_TOKEN * max_tokens

    def __call__(self, texts: Sequence[str]) -> tuple[list[str], npt.NDArray[np.bool_]]:
        """The texts, and which of them were cut [R].

        Again and again the share of words is kept that a text's tokens are too many by, and one
        blank between words. A text of whose words none would be left keeps those it has: the
        authors keep nothing then, and all such texts have one vector.
        """
        found, cut = list(texts), np.zeros(len(texts), np.bool_)
        words: dict[int, list[str]] = {}
        todo = np.arange(len(texts))
        while todo.size:
            counts = self._count([found[row] for row in todo])
            over = counts > self._tokens
            again = []
            for row, count in zip(todo[over].tolist(), counts[over].tolist(), strict=True):
                cut[row] = True
                own = words.get(row) or found[row][: self._most].split()
                kept = int(len(own) * (self._tokens / count))
                if kept:
                    words[row] = own[:kept]
                    found[row] = " ".join(words[row])
                    again.append(row)
            todo = np.array(again, np.int64)
        return found, cut

    def _count(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        ids = self._fitter.fit([0] * len(texts), texts).ids
        return np.fromiter(map(len, ids), np.int64, len(texts))
