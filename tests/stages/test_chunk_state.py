from typing import NoReturn

import numpy as np
import pyarrow as pa

from embedjob.errors import ChunkError
from embedjob.input.chunks import Chunk, Shard
from embedjob.stages.chunk_state import ChunkState, Failure, describe, from_block, to_block
from embedjob.text.views import assemble
from embedjob.vectors.encoded import Encoded

CHUNK = Chunk(Shard("in/a.parquet", 10, "etag"), 2, 5, (0, 1), 0, "a-name.parquet", 30, 100)


def test_a_chunk_state_comes_out_as_it_went_in() -> None:
    rows = pa.table({"row": pa.array(range(100), pa.uint32()), "text": ["x"] * 100}).slice(2, 3)
    views = assemble(
        [[1, 2, 3], [1, 2, 4, 5]],
        span=np.array([[2, 3], [3, 4]], np.int32),
        truncated=np.array([False, True]),
        prefixes=[[1, 2]],
    )
    encoded = Encoded(np.eye(2, dtype=np.float32), {1: ("model_error", "why")})
    reused = pa.table({"text_hash": pa.array([b"x" * 16] * 9, pa.binary(16))}).slice(4, 2)
    state = ChunkState(CHUNK, rows, views, encoded, stats={"rows": 3}, reused=reused)
    [back] = from_block(to_block([state]))
    assert back.chunk == CHUNK
    assert back.rows.equals(rows)
    assert back.views.full_ids(1).tolist() == [1, 2, 4, 5]
    assert back.encoded.embeddings.tolist() == encoded.embeddings.tolist()
    assert back.encoded.failed == encoded.failed
    assert back.stats == {"rows": 3}
    assert back.reused.equals(reused)


def test_several_states_are_one_row_which_cannot_be_split() -> None:
    failed = ChunkState(CHUNK, failure=Failure("fault", "no such file"))
    empty = ChunkState(CHUNK, rows=pa.table({"row": pa.array([], pa.uint32())}))
    block = to_block([failed, empty])
    first, second = from_block(block)
    assert block.num_rows == 1
    assert first.failure == failed.failure
    assert first.rows is None
    assert second.rows.num_rows == 0


def test_a_slice_does_not_carry_its_parent() -> None:
    rows = pa.table({"text": ["x" * 1000] * 1000})
    assert to_block([ChunkState(CHUNK, rows.slice(0, 1))]).nbytes < 10_000
    assert to_block([ChunkState(CHUNK, reused=rows.slice(0, 1))]).nbytes < 10_000


def test_a_state_without_memory_for_its_block_is_a_fault_and_the_others_are_not() -> None:
    class TooLarge:
        def __reduce__(self) -> NoReturn:
            raise MemoryError("no room")

    states = [ChunkState(CHUNK, stats={"rows": 3}), ChunkState(CHUNK, views=TooLarge())]
    sound, lost = from_block(to_block(states))
    assert (sound.failure, sound.stats) == (None, {"rows": 3})
    assert lost.failure == Failure("fault", "MemoryError: no room")


def test_an_error_is_told_in_one_line() -> None:
    assert describe(ChunkError("two\nlines")) == "two lines"
    assert describe(KeyError("x")) == "KeyError: 'x'"
    assert describe(ValueError()) == "ValueError: no message"
