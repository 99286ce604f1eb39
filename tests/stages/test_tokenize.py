import hashlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.config.recipe import Recipe
from embedjob.stages.tokenize import EXCERPT_CHARACTERS, tokenize_rows
from embedjob.text.tokenizing import ViewTokenizer
from tests.fakes import tiny_tokenizer

TEXTS = st.lists(
    st.one_of(st.none(), st.sampled_from(["a fox", "", "the river bank"]), st.text(max_size=40)),
    max_size=12,
)


def tokenizer(**recipe: object) -> ViewTokenizer:
    return ViewTokenizer(tiny_tokenizer("llama"), Recipe(model="m", max_tokens=16, **recipe))


PLAIN = tokenizer()
TWO_VIEWS = tokenizer(templates=("It says: {text}", "{text} means"))


def rows(texts: list[str | None]) -> pa.Table:
    """What READ gives: a null text has a reason, and both came with a kept column."""
    return pa.table(
        {
            "row": pa.array(range(len(texts)), pa.uint32()),
            "text": pa.array(texts, pa.large_string()),
            "reason": pa.array(
                [None if t is not None else "null_text" for t in texts], pa.string()
            ),
            "keep.n": pa.array(range(len(texts)), pa.int64()),
        }
    )


@settings(deadline=None, max_examples=60)
@given(TEXTS, st.sampled_from([PLAIN, TWO_VIEWS]))
def test_each_row_points_at_the_views_of_its_own_text(
    texts: list[str | None], tokenize: ViewTokenizer
) -> None:
    table, views = tokenize_rows(rows(texts), tokenize, "truncate")
    assert table["row"].to_pylist() == table["keep.n"].to_pylist() == list(range(len(texts)))
    assert "text" not in table.column_names
    for text, found in zip(texts, table.to_pylist(), strict=True):
        assert found["text_hash"] == hashlib.blake2b((text or "").encode(), digest_size=16).digest()
        if text is None:
            assert (found["reason"], found["unique"], found["tokens"]) == ("null_text", None, 0)
            continue
        alone = tokenize.views([text])
        assert found["excerpt"] == text[:EXCERPT_CHARACTERS]
        assert found["tokens"] == alone.lengths.sum()
        assert found["truncated"] == alone.truncated.any()
        if found["reason"] is None:
            first = found["unique"] * views.views_per_text
            for view in range(views.views_per_text):
                assert views.full_ids(first + view).tolist() == alone.full_ids(view).tolist()


@settings(deadline=None, max_examples=60)
@given(TEXTS)
def test_equal_texts_are_tokenized_once(texts: list[str | None]) -> None:
    table, views = tokenize_rows(rows(texts), PLAIN, "truncate")
    unique = table["unique"].drop_null().to_pylist()
    assert views.texts == len(set(unique)) == len({t for t in texts if t is not None})
    assert sorted(set(unique)) == list(range(views.texts))


def test_a_text_without_tokens_is_a_bad_row() -> None:
    bare = ViewTokenizer(tiny_tokenizer("gpt2"), Recipe(model="m"))
    table, views = tokenize_rows(rows(["a fox", "", "a fox"]), bare, "truncate")
    assert table["reason"].to_pylist() == [None, "empty_span", None]
    assert table["unique"].to_pylist() == [0, None, 0]
    assert views.texts == 1


@pytest.mark.parametrize(("rule", "reason"), [("truncate", None), ("bad", "too_long")])
def test_long_texts_are_cut_or_bad(rule: str, reason: str | None) -> None:
    table, views = tokenize_rows(rows(["fox " * 100, "fox"]), PLAIN, rule)
    assert table["reason"].to_pylist() == [reason, None]
    assert table["truncated"].to_pylist() == [True, False]
    assert views.texts == (2 if reason is None else 1)


def test_no_rows_give_no_views() -> None:
    table, views = tokenize_rows(rows([]), PLAIN, "truncate")
    assert (table.num_rows, views.texts) == (0, 0)
    assert table.schema.field("unique").type == pa.uint32()


def test_an_excerpt_is_short() -> None:
    table, _ = tokenize_rows(rows(["é" * 1000]), PLAIN, "truncate")
    assert table["excerpt"].to_pylist() == ["é" * EXCERPT_CHARACTERS]
    assert np.all(table["tokens"].to_numpy() == 16)


@pytest.mark.parametrize("long_text", ["chunk_mean", "late_chunk"])
def test_a_text_in_parts_is_one_row_with_the_tokens_of_all(long_text: str) -> None:
    recipe = Recipe(model="m", max_tokens=16, long_text=long_text)
    made = ViewTokenizer(tiny_tokenizer("llama"), recipe, positions=100)
    table, views = tokenize_rows(rows(["fox " * 30, None, "fox", "fox " * 30]), made, long_text)
    assert table["unique"].to_pylist() == [0, None, 1, 0]
    assert table["truncated"].to_pylist() == [False] * 4
    assert views.texts == 2
    lengths = views.per_text(views.lengths).tolist()
    assert table["tokens"].to_pylist() == [lengths[0], 0, lengths[1], lengths[0]]
    assert lengths[0] > 30
