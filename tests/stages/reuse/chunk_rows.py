"""Rows of one chunk, and an encoder's answer that depends on the token ids alone."""

import numpy as np
import pyarrow as pa

from embedjob.config.recipe import Recipe
from embedjob.input.chunks import Chunk, Shard
from embedjob.text.tokenizing import ViewTokenizer
from embedjob.text.views import TokenViews
from embedjob.vectors.encoded import Encoded, Lines
from embedjob.vectors.sparse import sparse
from tests.fakes import tiny_tokenizer
from tests.shards import WIDTH

PLAIN = ViewTokenizer(tiny_tokenizer("llama"), Recipe(model="m", max_tokens=16))
ROWS = 12
CHUNK = Chunk(Shard("in/a.parquet", 10, "e"), 0, ROWS, (0, 1), 0, "a.parquet", 30, 100)
KINDS = ("plain", "lines", "heads")


def rows(texts: list[str | None]) -> pa.Table:
    return pa.table(
        {
            "row": pa.array(range(len(texts)), pa.uint32()),
            "text": pa.array(texts, pa.large_string()),
            "reason": pa.array(
                [None if one is not None else "null_text" for one in texts], pa.string()
            ),
        }
    )


def vector(ids: np.ndarray) -> np.ndarray:
    """A unit vector that says which ids it is of."""
    made = np.random.default_rng([*ids.tolist(), len(ids)]).normal(size=WIDTH)
    return (made / np.linalg.norm(made)).astype(np.float32)


def encoded(views: TokenViews, kind: str) -> Encoded:
    """Return what an encoder would: the vectors of each text depend on its token ids alone."""
    ids = [views.full_ids(number) for number in range(views.texts)]
    if kind == "lines":
        counts = [1 + len(one) % 3 for one in ids]
        every = [
            vector(one[part:])
            for one, count in zip(ids, counts, strict=True)
            for part in range(count)
        ]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        chars = np.stack([np.arange(offsets[-1])] * 2, axis=1)
        for start, count in zip(offsets, counts, strict=False):
            chars[start : start + count] -= start
        return Encoded(
            np.array(every, np.float32).reshape(-1, WIDTH), {}, lines=Lines(offsets, chars)
        )
    matrix = np.array([vector(one) for one in ids], np.float32).reshape(-1, WIDTH)
    if kind == "plain":
        return Encoded(matrix, {})
    entries = [(one[: len(one) % 4].astype(np.uint32), None) for one in ids]
    weighed = [
        (np.unique(one), np.full(len(np.unique(one)), 0.5, np.float32)) for one, _ in entries
    ]
    return Encoded(matrix, {}, sparse=sparse(weighed), routers=2 * matrix[:, :2])
