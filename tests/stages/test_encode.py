"""The encode actor, as far as it can be tested without an actor pool.

Covers: embedjob.stages.actors
"""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray

from embedjob.input.chunks import Chunk, Shard
from embedjob.stages.actors import logged_warnings
from embedjob.stages.chunk_state import ChunkState, from_block, to_block
from embedjob.stages.encode import EncodeActor
from embedjob.stages.ledger import MAX_ATTEMPTS, new_ledger
from embedjob.text.views import TokenViews, assemble
from embedjob.vectors.encoded import Encoded


def test_the_warnings_of_a_load_are_collected_and_nothing_after_it() -> None:
    logger = logging.getLogger("embedjob.encoder.backbone")
    with logged_warnings() as notes:
        logger.info("loaded")
        logger.warning("the model's own %s is used", "BertLayer")
        logging.getLogger("transformers").warning("another library")
    logger.warning("later")
    assert notes == ["the model's own BertLayer is used"]


class ProcessDied(BaseException):
    """Stands for the end of a process, after which Ray Data gives the same block to another."""


class DyingEngine:
    """Its encoder dies of four texts, and cannot bear two."""

    def load_encoder(self) -> "DyingEngine":
        return self

    def encode_views(self, views: TokenViews, **_: Any) -> Encoded:
        if views.texts == 4:
            raise ProcessDied
        if views.texts == 2:
            raise RuntimeError("two texts")
        return Encoded(np.zeros((views.texts, 1), np.float32), {}, {})


def _state(texts: int) -> ChunkState:
    shard = Shard("in/a.parquet", 10, "etag")
    chunk = Chunk(shard, 0, texts, (0, 1), 0, f"{texts}.parquet", 30, 100)
    spans = np.tile(np.array([[0, 1]], np.int32), (texts, 1))
    views = assemble([[1]] * texts, span=spans, truncated=np.zeros(texts, np.bool_), prefixes=[[]])
    return ChunkState(chunk, views=views)


@pytest.fixture
def ledger() -> Any:
    return new_ledger()


@pytest.fixture
def actor(ledger: Any) -> Iterator[EncodeActor]:
    made = EncodeActor(DyingEngine(), lambda *_: None, ledger)
    yield made
    made._stopping.set()


@pytest.mark.ray
@pytest.mark.usefixtures("joined")
def test_of_chunks_that_travel_together_only_the_one_that_kills_is_given_up(
    actor: EncodeActor, ledger: Any
) -> None:
    block = to_block(map(_state, range(1, 7)))
    for _ in range(MAX_ATTEMPTS):
        with pytest.raises(ProcessDied):
            actor(block)
    states = list(from_block(actor(block)))
    assert [len(s.encoded.embeddings) for s in states if s.encoded] == [1, 3, 5, 6]
    failed = [s.failure.detail for s in states if s.failure]
    assert failed[0] == "RuntimeError: two texts"
    assert failed[1].startswith(f"its encode process died {MAX_ATTEMPTS} times;")
    # Of all deaths, the others bear the first alone, when nobody knew which it was.
    begins = [ledger.begin.remote("encode", f"{texts}.parquet", "node") for texts in (1, 3, 5)]
    assert [attempt.number for attempt in ray.get(begins)] == [2, 2, 2]
