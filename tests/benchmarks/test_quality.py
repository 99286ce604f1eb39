"""The figures that the docs show: of the methods as they are now, and in the published order."""

import pytest

from benchmarks.quality import (
    ORDER,
    as_published,
    kept,
    of_method,
    out_of_order,
    tokens_per_text,
    unlike_minilm,
)
from embedjob.methods.catalogue import read_method
from embedjob.output.fingerprint import fingerprint
from tests.methods.making import Setting
from tests.methods.settings import CONTRASTED

ORDERED = sorted({name for better, worse, _ in ORDER for name in (better, worse)})


@pytest.mark.parametrize("name", ORDERED)
def test_a_figure_is_of_the_method_as_it_is(name: str) -> None:
    assert kept()["stsb.dev"][name]["recipe"] == fingerprint(of_method(name), {})[:12]


def test_the_paper_s_own_setting_is_that_of_a_model_that_the_method_does_not_know() -> None:
    published = as_published("token_prepending")
    assert published is not None
    assert published.model_dump()["interventions"][0]["prepend"]["exit"] == 7
    assert published.layer == read_method("token_prepending").encoder["layer"]
    assert as_published("prompteol") is None
    assert as_published("contrastive_prompting") is None


def test_an_auxiliary_view_counts_by_its_share_of_the_blocks() -> None:
    setting = Setting("contrastive_prompting", "document", "qwen3", "qwen", knobs=CONTRASTED)
    texts = ["a fox", "the lazy dog of the fox"]
    views = setting.views().views(texts)
    assert views.auxiliary is not None
    own, auxiliary = (
        sum(len(some.full_ids(text)) for text in range(2)) for some in (views, views.auxiliary)
    )
    found = tokens_per_text(views, setting.recipe(), layers=3)
    assert found == pytest.approx((own + auxiliary * 2 / 3) / 2)


def test_the_figures_hold_the_published_order() -> None:
    figures = kept()["stsb.dev"]
    assert list(out_of_order(figures)) == []
    assert list(unlike_minilm(figures)) == []
    assert "metaeol" in figures
    worse = {**figures, "token_prepending": {"spearman": 0.0}}
    assert [line.split()[0] for line in out_of_order(worse)] == ["token_prepending"]
