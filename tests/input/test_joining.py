import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedjob.errors import ConfigError
from embedjob.input.joining import joined_text, text_columns, validate_text
from tests.shards import strings

PARTS = st.lists(st.tuples(*[st.none() | st.text(max_size=5)] * 2), min_size=1, max_size=8)


def _table(rows: list[tuple[str | None, str | None]]) -> pa.Table:
    return pa.table(
        {
            "a": pa.array([row[0] for row in rows], pa.string()),
            "b": pa.array([row[1] for row in rows], pa.large_string()).dictionary_encode(),
        }
    )


@given(PARTS, st.text(max_size=3))
def test_columns_are_joined_without_their_nulls(
    rows: list[tuple[str | None, str | None]], separator: str
) -> None:
    expected = [
        separator.join(part for part in row if part is not None) if any_text(row) else None
        for row in rows
    ]
    assert joined_text(_table(rows), ("a", "b"), separator=separator).to_pylist() == expected


@given(PARTS)
def test_a_template_is_filled_and_a_null_part_is_empty(
    rows: list[tuple[str | None, str | None]],
) -> None:
    expected = [
        f"{{{row[0] or ''}}} {row[1] or ''}, {row[0] or ''}" if any_text(row) else None
        for row in rows
    ]
    joined = joined_text(_table(rows), "{{{a}}} {b}, {a}", separator="unused")
    assert joined.to_pylist() == expected


def any_text(row: tuple[str | None, str | None]) -> bool:
    return row != (None, None)


@given(PARTS)
def test_one_column_is_itself(rows: list[tuple[str | None, str | None]]) -> None:
    joined = joined_text(_table(rows), "b", separator="unused")
    assert joined.type == pa.large_string()
    assert joined.to_pylist() == [row[1] for row in rows]


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("body", ("body",)),
        (("title", "body", "title"), ("title", "body")),
        ("{title}\n{body} {title}", ("title", "body")),
        ("a {strange name.with-signs} b", ("strange name.with-signs",)),
    ],
)
def test_columns_of_a_text(text: str | tuple[str, ...], columns: tuple[str, ...]) -> None:
    assert text_columns(text) == columns


@pytest.mark.parametrize("text", ["{title", "{}", "{title:>3}", "{title!r}", "{{title}}"])
def test_what_is_no_template_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"input\.text"):
        text_columns(text)


def test_text_that_is_not_utf8_makes_a_bad_row_and_only_that() -> None:
    given = pa.chunked_array([strings(b"ok", b"\xff", None), strings(b"", "é".encode(), b"a\x80")])
    text, reason = validate_text(given)
    assert text.to_pylist() == ["ok", None, None, "", "é", None]
    assert reason.to_pylist() == [None, "invalid_utf8", "null_text", None, None, "invalid_utf8"]
