from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.config.job import Sample
from embedjob.input.samples import (
    SamplePlace,
    chunk_key,
    has_chunk,
    row_keys,
    sample_of,
    sampled_rows,
)

CHUNK = 11765059617652949654
ROWS = [16211959942521569297, 18099530173063040896, 2527744445583904361]
PLACES = [
    SamplePlace(f"s3://in/{n}.parquet", start, start + 50) for n in range(8) for start in (0, 50)
]


def chosen(sample: Sample, places: list[SamplePlace]) -> set[tuple[str, int]]:
    """The rows of a sample, by shard and number."""
    found = set()
    for place in places:
        if has_chunk(sample, place.shard, place.start):
            rows = np.arange(place.start, place.stop)
            kept = rows[sampled_rows(sample, place.shard, rows)]
            found |= {(place.shard, int(row)) for row in kept}
    return found


@settings(max_examples=30)
@given(rows=st.integers(1, 799), seed=st.integers(0, 2**63 - 1), order=st.permutations(PLACES))
def test_a_sample_has_so_many_rows_whatever_the_order(
    rows: int, seed: int, order: list[SamplePlace]
) -> None:
    sample = sample_of(order, rows=rows, seed=seed)
    assert sample is not None
    assert sample == sample_of(PLACES, rows=rows, seed=seed)
    assert len(chosen(sample, PLACES)) == rows


def test_no_more_rows_than_there_are_is_no_sample() -> None:
    assert sample_of(PLACES, rows=800, seed=1) is None
    assert sample_of([], rows=1, seed=1) is None
    assert sample_of(PLACES, rows=799, seed=1) is not None


def test_another_seed_is_another_sample() -> None:
    samples = [sample_of(PLACES, rows=100, seed=seed) for seed in (1, 2)]
    one, other = (chosen(sample, PLACES) for sample in samples if sample)
    assert len(one & other) < 60


def test_few_chunks_are_read_for_few_rows() -> None:
    sample = sample_of(PLACES, rows=25, seed=1)
    assert sample is not None
    read = [place for place in PLACES if has_chunk(sample, place.shard, place.start)]
    assert len(read) == 2
    # And both give rows: neighbours are often alike.
    assert {shard for shard, _ in chosen(sample, PLACES)} == {place.shard for place in read}


def test_a_corpus_that_grows_keeps_most_of_its_sample() -> None:
    more = [*PLACES, SamplePlace("s3://in/new.parquet", 0, 50)]
    before, after = (sample_of(places, rows=100, seed=3) for places in (PLACES, more))
    assert before is not None
    assert after is not None
    assert len(chosen(before, PLACES) & chosen(after, more)) >= 80


def test_keys_stay_as_they_are_for_ever() -> None:
    """A sample is drawn again when it is resumed, perhaps in another release."""
    assert chunk_key("s3://in/0.parquet", 0, seed=17) == CHUNK
    assert row_keys("s3://in/0.parquet", [0, 1, 2**32 - 1], seed=17).tolist() == ROWS


def test_keys_are_spread_evenly() -> None:
    keys = row_keys("a", np.arange(100_000), seed=0).astype(np.float64) / 2**64
    counts, _ = np.histogram(keys, bins=20, range=(0, 1))
    assert counts.min() > 4700
    assert counts.max() < 5300
    assert len(np.unique(keys)) == 100_000


def test_splitmix64_is_that_of_its_authors() -> None:
    """The first outputs of the reference implementation from the state 1234567."""
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert _splitmix(1234567, 3) == wanted


def _splitmix(state: int, count: int) -> list[int]:
    from embedjob.input import samples

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "_digest", lambda text: state)
        return [int(key) for key in row_keys("any", range(count), seed=0)]


def test_only_rows_that_count_are_in_a_sample_and_few_places_are_asked() -> None:
    asked: list[SamplePlace] = []

    def even(places: Sequence[SamplePlace]) -> Iterator[np.ndarray]:
        for place in places:
            asked.append(place)
            yield np.arange(place.start, place.stop, 2)

    whole = sample_of(PLACES, rows=400, seed=1, counted=even)
    assert whole is None
    assert len(asked) == len(PLACES)
    asked.clear()
    sample = sample_of(PLACES, rows=20, seed=1, counted=even)
    assert sample is not None
    found = {(shard, row) for shard, row in chosen(sample, PLACES) if row % 2 == 0}
    assert len(found) == 20
    # 80 rows that count are in four places.
    assert len(asked) == 4
