import hashlib
import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedjob.config.job_file import recipe_from
from embedjob.config.recipe import Recipe, Split
from embedjob.errors import ConfigError
from embedjob.input.chunks import Chunk, Shard
from embedjob.stages.chunk_state import ChunkState
from embedjob.stages.engine import EncodesViews, Generates
from embedjob.stages.tokenize import (
    EXCERPT_CHARACTERS,
    distinct_texts,
    tokenize_rows,
    tokenize_state,
)
from embedjob.text.conversations import text_hash
from embedjob.text.tokenizing import ViewTokenizer
from tests.fakes import tiny_tokenizer

TEXTS = st.lists(
    st.one_of(st.none(), st.sampled_from(["a fox", "", "the river bank"]), st.text(max_size=40)),
    max_size=12,
)


def tokenizer(**recipe: object) -> ViewTokenizer:
    return ViewTokenizer(tiny_tokenizer("llama"), Recipe(model="m", max_tokens=16, **recipe))


PLAIN = tokenizer()
CHUNK = Chunk(Shard("in/a.parquet", 10, "e"), 0, 12, (0, 1), 0, "a.parquet", 30, 100)
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


def split_tokenizer(most: int = 20) -> ViewTokenizer:
    split = Split(max_tokens=most)
    recipe = Recipe(model="m", max_tokens=64, long_text="split", split=split)
    return ViewTokenizer(tiny_tokenizer("llama"), recipe)


def test_each_passage_is_a_line_and_a_text_of_its_own() -> None:
    """Equal passages of different rows share a view; each line tells its place and its own hash."""
    first, second = "The quick brown fox jumps over. ", "The lazy dog is near the river bank.\n"
    texts: list[str | None] = [first + second, None, second, "", first + second]
    lines, views = tokenize_rows(rows(texts), split_tokenizer(), "split")
    assert lines["row"].to_pylist() == [0, 0, 1, 2, 3, 4, 4]
    assert lines["keep.n"].to_pylist() == lines["row"].to_pylist()
    assert lines["part"].to_pylist() == [0, 1, 0, 0, 0, 0, 1]
    assert lines["unique"].to_pylist() == [0, 1, None, 1, 2, 0, 1]
    assert lines["reason"].to_pylist() == [None, None, "null_text", None, None, None, None]
    border, whole = len(first), len(first + second)
    assert lines["char_start"].to_pylist() == [0, border, None, 0, 0, 0, border]
    assert lines["char_stop"].to_pylist() == [border, whole, None, len(second), 0, border, whole]
    hashes = [
        hashlib.blake2b(passage.strip().encode(), digest_size=16).digest()
        for passage in (first, second, "", second, "", first, second)
    ]
    assert lines["text_hash"].to_pylist() == hashes
    assert lines["excerpt"].to_pylist()[1] == second.strip()
    assert views.texts == 3
    alone = ViewTokenizer(tiny_tokenizer("llama"), Recipe(model="m", max_tokens=64))
    plain = alone.views([first.strip(), second.strip(), ""])
    assert [views.full_ids(v).tolist() for v in range(3)] == [
        plain.full_ids(v).tolist() for v in range(3)
    ]
    assert lines["tokens"].to_pylist()[0] == plain.lengths[0]


def test_what_stands_before_passages_belongs_to_their_texts_and_hashes() -> None:
    text = "The quick brown fox jumps over. The lazy dog is near the river bank."
    headings = ["A fox", None, "a b c " * 30]
    table = rows([text] * 3).append_column("heading", pa.array(headings, pa.large_string()))
    lines, _ = tokenize_rows(table, split_tokenizer(24), "split")
    assert "heading" not in lines.column_names
    found = lines.to_pylist()
    shown = {row: [one["excerpt"] for one in found if one["row"] == row] for row in range(3)}
    assert all(one.startswith("A fox\n") for one in shown[0])
    assert "".join(one.removeprefix("A fox\n") + " " for one in shown[0]) == text + " "
    assert [one["truncated"] for one in found] == [one["row"] == 2 for one in found]
    for one in found:
        assert one["text_hash"] == hashlib.blake2b(one["excerpt"].encode(), digest_size=16).digest()


def test_a_chunk_without_a_text_has_no_passage() -> None:
    for texts in ([], [None, None]):
        lines, views = tokenize_rows(rows(texts), split_tokenizer(), "split")
        assert (lines["row"].to_pylist(), views.texts) == ([*range(len(texts))], 0)
        assert lines["part"].to_pylist() == [0] * len(texts)


@dataclass(frozen=True)
class SplitEngine:
    """Only what texts are tokenized by."""

    long_text: str = "split"

    def load_tokenizer(self) -> ViewTokenizer:
        return split_tokenizer()

    def load_encoder(self) -> EncodesViews:
        raise NotImplementedError

    def load_generator(self, *, threads: int) -> Generates:
        raise NotImplementedError


def test_passages_with_old_lines_are_not_tokenized_and_their_rows_are_counted() -> None:
    first, second = "The quick brown fox jumps over. ", "The lazy dog is near the river bank.\n"
    table = rows([first + second, None, second, second])
    texts = [first.strip(), second.strip()]
    assert distinct_texts(table, SplitEngine()) == texts
    assert distinct_texts(table, SplitEngine("truncate")) == [first + second, second]
    hashes = pa.array([text_hash(texts[1])], pa.binary(16))
    for cut in (False, True):
        old = pa.table({"text_hash": hashes, "truncated": [cut]})
        ended = tokenize_state(ChunkState(CHUNK, table, reused=old), SplitEngine())
        assert ended.rows is not None
        assert ended.views is not None
        assert (ended.stats["reused"], ended.stats["passages_reused"]) == (2, 3)
        assert ended.rows["taken"].to_pylist() == [None, 0, None, 0, 0]
        assert ended.rows["truncated"].to_pylist() == [False] * 5
        assert ended.views.texts == 1


def test_passages_that_no_view_can_hold_are_refused() -> None:
    """Before a model is loaded; what would fit is named, and it does."""
    made = {"model": "m", "max_tokens": 40, "long_text": "split", "templates": ["It says: {text}."]}
    with pytest.raises(ConfigError, match=r"the templates leave (\d+) tokens to a text") as error:
        ViewTokenizer(
            tiny_tokenizer("llama"), recipe_from({**made, "split": {"max_tokens": 40}}, {})
        )
    room = int(re.findall(r"leave (\d+) tokens", str(error.value))[0])
    assert 20 < room < 40
    fits = recipe_from({**made, "split": {"max_tokens": room}}, {})
    found = ViewTokenizer(tiny_tokenizer("llama"), fits)
    passages = found.splitter(["The quick brown fox. " * 30]) if found.splitter else None
    assert passages is not None
    assert not found.views(passages.texts).truncated.any()


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
