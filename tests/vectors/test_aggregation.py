import pytest
import torch

from embedjob.config.recipe import Recipe
from embedjob.vectors.aggregation import AGGREGATIONS, joined_parts

VECTORS_RVD = torch.tensor([[[3.0, 4.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 0.0]]])
WEIGHTS_V = torch.tensor([3.0, 1.0])


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("mean", [[1.5, 3.0], [0.5, 0.0]]),
        ("mean_of_normalized", [[0.3, 0.9], [0.5, 0.0]]),
        ("weighted", [[2.25, 3.5], [0.75, 0.0]]),
        ("max", [[3.0, 4.0], [1.0, 0.0]]),
        ("concat", [[3.0, 4.0, 0.0, 2.0], [1.0, 0.0, 0.0, 0.0]]),
        ("keep", [[3.0, 4.0], [0.0, 2.0], [1.0, 0.0], [0.0, 0.0]]),
    ],
)
def test_views_join_as_their_name_says(aggregation: str, expected: list[list[float]]) -> None:
    joined = AGGREGATIONS[aggregation](VECTORS_RVD, WEIGHTS_V)
    torch.testing.assert_close(joined, torch.tensor(expected))


@pytest.mark.parametrize("aggregation", sorted(set(AGGREGATIONS) - {"mean_of_normalized"}))
def test_one_view_is_left_as_it_is(aggregation: str) -> None:
    vectors_RVD = torch.randn(5, 1, 7, generator=torch.Generator().manual_seed(0))
    joined = AGGREGATIONS[aggregation](vectors_RVD, torch.tensor([2.0]))
    torch.testing.assert_close(joined, vectors_RVD[:, 0])


@pytest.mark.parametrize("aggregation", sorted(AGGREGATIONS))
def test_rows_do_not_touch_each_other(aggregation: str) -> None:
    vectors_RVD = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(1))
    weights_V = torch.tensor([1.0, 2.0, 0.5])
    together = AGGREGATIONS[aggregation](vectors_RVD, weights_V)
    alone = [AGGREGATIONS[aggregation](row[None], weights_V) for row in vectors_RVD]
    torch.testing.assert_close(together, torch.cat(alone))


def test_every_aggregation_here_may_be_named_by_a_recipe() -> None:
    for aggregation in AGGREGATIONS:
        assert Recipe(model="m", aggregation=aggregation).aggregation == aggregation


def test_parts_join_by_their_tokens_view_by_view() -> None:
    vectors_UVD = torch.tensor([[[1.0], [8.0]], [[4.0], [2.0]], [[5.0], [6.0]]])
    tokens_UV = torch.tensor([[2, 1], [1, 2], [7, 7]])
    joined = joined_parts(vectors_UVD, tokens_UV, torch.tensor([2, 1]))
    torch.testing.assert_close(joined, torch.tensor([[[2.0], [4.0]], [[5.0], [6.0]]]))


def test_a_row_of_one_part_is_that_part_to_the_bit() -> None:
    vectors_UVD = torch.randn(40, 2, 7, generator=torch.Generator().manual_seed(2))
    tokens_UV = torch.arange(80).reshape(40, 2) + 1
    counts_R = torch.ones(40, dtype=torch.int64)
    assert torch.equal(joined_parts(vectors_UVD, tokens_UV, counts_R), vectors_UVD)
