"""Where a text may be cut: at the borders of its tokens, and never within a character."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


class Borders(NamedTuple):
    """Where a text may be cut: before these tokens, at these characters; best where `clean`.

    Elsewhere a token holds bytes of the characters on both sides. The first token is never one.
    """

    tokens: Ints
    places: Ints
    clean: Flags

    def before(self, limit: int, first: int) -> int:
        """The last border, from number `first` on, that comes at most before token `limit`.

        A clean one if there is any; the first one if none comes so early.
        """
        after = int(np.searchsorted(self.tokens, limit, side="right"))
        clean = np.flatnonzero(self.clean[first:after])
        return first + int(clean[-1]) if len(clean) else max(after - 1, first)

    def near(self, token: int, slack: int) -> int:
        """The first border that does not come before a token; a clean one if it is near."""
        first = int(np.searchsorted(self.tokens, token))
        until = int(np.searchsorted(self.tokens, token + slack, side="right"))
        clean = np.flatnonzero(self.clean[first:until])
        return first + int(clean[0]) if len(clean) else first


def borders(chars: Ints) -> Borders:
    """The borders of tokens that hold these characters [T, 2]."""
    if not len(chars):
        return Borders(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.bool_))
    starts = np.maximum.accumulate(np.maximum(chars[:, 0], 0))
    stops = np.maximum.accumulate(np.maximum(chars[:, 1], 0))
    clean = starts[1:] >= stops[:-1]
    tokens = 1 + np.flatnonzero((starts[1:] > starts[:-1]) | (clean & (starts[1:] > 0)))
    places, first = np.unique(starts[tokens], return_index=True)
    return Borders(tokens[first], places, clean[tokens[first] - 1])
