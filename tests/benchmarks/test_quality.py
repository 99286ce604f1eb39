"""The figures that the docs show: of the methods as they are now, and in the published order."""

import pytest

from benchmarks.quality import ORDER, kept, of_method, out_of_order, unlike_minilm
from embedjob.output.fingerprint import fingerprint

ORDERED = sorted({name for better, worse, _ in ORDER for name in (better, worse)})


@pytest.mark.parametrize("name", ORDERED)
def test_a_figure_is_of_the_method_as_it_is(name: str) -> None:
    assert kept()[name]["recipe"] == fingerprint(of_method(name), {})[:12]


def test_the_figures_hold_the_published_order() -> None:
    figures = kept()
    assert list(out_of_order(figures)) == []
    assert list(unlike_minilm(figures)) == []
    assert "metaeol" in figures
    worse = {**figures, "token_prepending": {"spearman": 0.0}}
    assert [line.split()[0] for line in out_of_order(worse)] == ["token_prepending"]
