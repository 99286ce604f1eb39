import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.text.microbatches import microbatches


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 60), max_size=80), st.integers(1, 200))
def test_every_view_goes_once_within_the_budget(lengths: list[int], budget: int) -> None:
    sizes = np.array(lengths, np.int64)
    batches = microbatches(sizes, budget=budget)
    order = [int(view) for batch in batches for view in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[view] for view in order] == sorted(lengths, reverse=True)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * sizes[batch].max() <= budget


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(60, 400))
def test_no_batch_could_have_taken_one_more(lengths: list[int], budget: int) -> None:
    sizes = np.array(lengths, np.int64)
    for batch in microbatches(sizes, budget=budget)[:-1]:
        assert (len(batch) + 1) * sizes[batch].max() > budget


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(60, 400), st.integers(0, 90)
)
def test_a_batch_ends_before_its_padding_costs_more_than_another(
    lengths: list[int], budget: int, bearable: int
) -> None:
    sizes = np.array(lengths, np.int64)
    batches = microbatches(sizes, budget=budget, bearable_padding=bearable)
    order = np.concatenate(batches)
    assert sorted(order) == list(range(len(lengths)))
    stops = np.cumsum([len(batch) for batch in batches])
    for batch, stop in zip(batches, stops, strict=True):
        padding = (sizes[batch].max() - sizes[batch]).sum()
        assert padding <= bearable
        assert len(batch) == 1 or len(batch) * sizes[batch].max() <= budget
        if stop < len(order):
            more = padding + sizes[batch].max() - sizes[order[stop]]
            assert more > bearable or (len(batch) + 1) * sizes[batch].max() > budget


def test_equal_lengths_keep_their_order_and_unsigned_lengths_sort() -> None:
    batches = microbatches(np.array([3, 7, 3, 7], np.uint32), budget=14)
    assert [batch.tolist() for batch in batches] == [[1, 3], [0, 2]]


def test_no_more_go_together_than_a_kernel_takes() -> None:
    batches = microbatches(np.ones(70_000, np.int64), budget=1 << 18)
    assert [len(batch) for batch in batches] == [32_768, 32_768, 4_464]
    assert np.array_equal(np.concatenate(batches), np.arange(70_000))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(-1, 2)), max_size=80), st.integers(1, 200)
)
def test_views_of_different_groups_never_go_together(
    views: list[tuple[int, int]], budget: int
) -> None:
    sizes, groups = (np.array(column, np.int64) for column in zip(*[(0, 0), *views], strict=True))
    batches = microbatches(sizes, budget=budget, groups=groups)
    assert sorted(int(view) for batch in batches for view in batch) == list(range(len(sizes)))
    for batch in batches:
        assert len(set(groups[batch].tolist())) == 1
        assert len(batch) == 1 or len(batch) * sizes[batch].max() <= budget
    for group in set(groups.tolist()):
        order = [sizes[view] for batch in batches for view in batch if groups[view] == group]
        assert order == sorted(order, reverse=True)
