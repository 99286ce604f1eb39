from itertools import product

import numpy as np
import pytest

from embedjob.config.pooling import SpanOffset
from embedjob.config.recipe import Recipe
from embedjob.text.spans import NEED_TEXT, SPANS, Positions, spans

# Every view of up to four tokens per part: specials before, template, text, template, closing.
PARTS = list(product(range(2), range(3), range(4), range(3), range(3)))


def _positions() -> Positions:
    parts = np.array(PARTS, np.int64)
    start = parts[:, :2].sum(axis=1)
    return Positions(
        length=parts.sum(axis=1),
        text_start=start,
        text_stop=start + parts[:, 2],
        closing=parts[:, 4],
        marked_start=start - parts[:, 1],
        marked_stop=start + parts[:, 2],
        prompt=start + 1,
    )


def _expected(rule: str, parts: tuple[int, ...]) -> list[str]:
    bos, before, text, after, closing = parts
    view = ["bos"] * bos + ["before"] * before
    view += [f"text{i}" for i in range(text)] + ["after"] * after + ["closing"] * closing
    return {
        "all": view,
        "text": view[bos + before : bos + before + text],
        "last_text": view[bos + before : bos + before + text][-1:],
        "from_text": view[bos + before :],
        "after_prompt": view[bos + before + 1 :],
        "pooled": view[bos : bos + before + text],
        "last_token": view[-1:],
        "first_token": view[:1],
        "tail": ["after"] * after or ["closing"] * closing,
    }[rule]


@pytest.mark.parametrize("rule", sorted(SPANS))
def test_every_rule_on_every_small_view(rule: str) -> None:
    found = spans(_positions(), rule=rule)
    assert found.dtype == np.int32
    for parts, (start, stop) in zip(PARTS, found.tolist(), strict=True):
        bos, before, text, after, closing = parts
        view = ["bos"] * bos + ["before"] * before
        view += [f"text{i}" for i in range(text)] + ["after"] * after + ["closing"] * closing
        assert 0 <= start <= stop <= len(view)
        assert view[start:stop] == _expected(rule, parts), (rule, parts)


@pytest.mark.parametrize("rule", sorted(SPANS))
@pytest.mark.parametrize("offset", [-9, -1, 0, 1, 9])
def test_an_offset_moves_the_start_within_the_view(rule: str, offset: int) -> None:
    plain = spans(_positions(), rule=rule)
    moved = spans(_positions(), rule=rule, offset=offset)
    for (start, stop), (new_start, new_stop) in zip(plain.tolist(), moved.tolist(), strict=True):
        assert new_stop == stop
        assert new_start == min(max(start + offset, 0), stop)


def test_every_rule_may_be_named_by_a_recipe() -> None:
    assert set(SPANS) >= NEED_TEXT
    for rule in SPANS:
        assert Recipe.model_validate({"model": "m", "span": {"rule": rule, "offset": 1}}) == Recipe(
            model="m", span=SpanOffset.model_validate({"rule": rule, "offset": 1})
        )
