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
    state = ChunkState(CHUNK, rows, views, encoded, stats={"rows": 3})
    [back] = from_block(to_block(state))
    assert back.chunk == CHUNK
    assert back.rows.equals(rows)
    assert back.views.full_ids(1).tolist() == [1, 2, 4, 5]
    assert back.encoded.embeddings.tolist() == encoded.embeddings.tolist()
    assert back.encoded.failed == encoded.failed
    assert back.stats == {"rows": 3}


def test_a_failure_is_a_chunk_state_too_and_blocks_may_be_joined() -> None:
    failed = ChunkState(CHUNK, failure=Failure("fault", "no such file"))
    empty = ChunkState(CHUNK, rows=pa.table({"row": pa.array([], pa.uint32())}))
    first, second = from_block(pa.concat_tables([to_block(failed), to_block(empty)]))
    assert first.failure == failed.failure
    assert first.rows is None
    assert second.rows.num_rows == 0


def test_a_slice_does_not_carry_its_parent() -> None:
    rows = pa.table({"text": ["x" * 1000] * 1000})
    assert to_block(ChunkState(CHUNK, rows.slice(0, 1))).nbytes < 10_000


def test_an_error_is_told_in_one_line() -> None:
    assert describe(ChunkError("two\nlines")) == "two lines"
    assert describe(KeyError("x")) == "KeyError: 'x'"
    assert describe(ValueError()) == "ValueError: no message"
