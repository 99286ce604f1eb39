"""Views of causal models, as token ids: with prefixes, or with texts that several tails follow."""

from dataclasses import replace

import numpy as np

from embedjob.text.views import TokenViews, assemble


def views_of(rows: list[list[int]], prefixes: list[list[int]], spans: list[int]) -> TokenViews:
    """Views of a causal model whose span begins where it is told to and goes on to the end."""
    span = np.array([[start, len(row)] for start, row in zip(spans, rows, strict=True)], np.int32)
    return assemble(
        rows,
        span=span,
        truncated=np.zeros(len(rows), np.bool_),
        prefixes=prefixes,
        text_first=True,
    )


def last_tokens(views: TokenViews) -> TokenViews:
    """The same views, of each of which the last token alone is pooled."""
    return replace(views, span=np.stack([views.span[:, 1] - 1, views.span[:, 1]], axis=1))


def shared_views(count: int = 6, *, own: int = 5) -> TokenViews:
    """Two templates of nine shared tokens, and texts of some."""
    random = np.random.default_rng(3)
    prefixes = random.integers(3, 590, (2, 9)).tolist()
    rows = [
        [*prefixes[view % 2], *random.integers(3, 590, own).tolist()] for view in range(2 * count)
    ]
    return views_of(rows, prefixes, [len(row) - 1 for row in rows])


def text_first_views(count: int = 6, *, prefix: int = 0) -> TokenViews:
    """Texts of ten tokens, and three tails of two that no two texts share."""
    random = np.random.default_rng(4)
    begin = random.integers(3, 590, prefix).tolist()
    texts = [[*begin, *random.integers(3, 590, 10).tolist()] for _ in range(count)]
    tails = [[600 - 3 * number, 5] for number in (1, 2, 3)]
    rows = [[*text, *tail] for text in texts for tail in tails]
    return views_of(rows, [begin] * 3, [len(row) - 1 for row in rows])
