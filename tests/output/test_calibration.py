import json
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from embedjob.input.chunks import Chunk, Shard
from embedjob.output.calibration import (
    SAMPLE_ROWS,
    Calibration,
    beginning,
    rows_each,
    sampled_chunks,
)


def corpus(shards: int, chunks: int, *, rows: int = 1000) -> list[Chunk]:
    return [
        Chunk(
            shard=Shard(f"in/{shard}.parquet", 10, "etag"),
            start=rows * number,
            stop=rows * (number + 1),
            groups=(0, 1),
            first_row=0,
            name=f"{shard}-{number}.parquet",
            text_bytes=10,
            footer_bytes=10,
        )
        for shard in range(shards)
        for number in range(chunks)
    ]


@given(arrays(np.float32, (2, 5), elements=st.floats(width=32, allow_nan=False)))
def test_ranges_come_back_from_json_to_the_bit(ranges_2D: np.ndarray) -> None:
    made = Calibration.of(ranges_2D, vectors=3)
    back = Calibration(**json.loads(json.dumps(made.as_dict())))
    assert np.array_equal(back.array, ranges_2D)
    assert (back.array.dtype, back.vectors) == (np.float32, 3)


def test_a_range_is_said_in_as_few_digits_as_name_it() -> None:
    ranges_2D = np.array([[0.1], [0.2]], np.float32)
    assert json.dumps(Calibration.of(ranges_2D, vectors=2).as_dict()["ranges"]) == "[[0.1], [0.2]]"


def test_the_sample_is_the_same_whatever_is_left_and_however_it_is_listed() -> None:
    chunks = corpus(5, 40)
    chosen = sampled_chunks(chunks)
    assert chosen == sampled_chunks(chunks[::-1]) == sampled_chunks(list(chosen))
    # A shard that was copied has another etag, and so its chunks have other names.
    renamed = [replace(chunk, name=f"copy-{chunk.name}") for chunk in chunks]
    assert [(c.shard.url, c.start) for c in sampled_chunks(renamed)] == [
        (c.shard.url, c.start) for c in chosen
    ]


def test_it_is_spread_over_shards_and_over_their_rows() -> None:
    chosen = sampled_chunks(corpus(5, 40))
    assert len({chunk.shard.url for chunk in chosen}) == 5
    tenths = {chunk.start // 4000 for chunk in chosen}
    assert len(tenths) >= 8


@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 20_000))
def test_no_more_is_read_than_one_usual_chunk(shards: int, chunks: int, rows: int) -> None:
    chosen = sampled_chunks(corpus(shards, chunks, rows=rows))
    each = rows_each(chosen)
    parts = [beginning(chunk, rows=each) for chunk in chosen]
    assert sum(part.rows for part in parts) <= 16 * (SAMPLE_ROWS + len(chosen))
    assert all(part.stop <= whole.stop for part, whole in zip(parts, chosen, strict=True))
    # And enough: as many rows as are wanted, where there are so many.
    enough = sum(min(part.rows, each) for part in parts)
    assert enough >= min(SAMPLE_ROWS, sum(chunk.rows for chunk in chosen))
    assert {part.start for part in parts} == {whole.start for whole in chosen}
