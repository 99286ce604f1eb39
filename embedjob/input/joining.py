"""Row texts: one column, several columns joined, or a template over columns."""

from collections.abc import Sequence
from functools import partial, reduce
from string import Formatter

import pyarrow as pa
import pyarrow.compute as pc

from embedjob.errors import ConfigError
from embedjob.input.column_types import TEXT

NULL_TEXT = "null_text"
INVALID_UTF8 = "invalid_utf8"


def text_columns(text: str | Sequence[str]) -> tuple[str, ...]:
    """Return the columns that `input.text` reads, each once, in the order of their first use."""
    if not isinstance(text, str):
        return tuple(dict.fromkeys(text))
    if "{" not in text:
        return (text,)
    return tuple(dict.fromkeys(column for _, column in _pieces(text) if column is not None))


def joined_text(table: pa.Table, text: str | Sequence[str], *, separator: str) -> pa.ChunkedArray:
    """Return one large_string per row; null where every part is null."""
    columns = {name: table.column(name).cast(TEXT) for name in text_columns(text)}
    if not isinstance(text, str):
        glue = pa.scalar(separator, TEXT)
        return reduce(partial(_joined, glue), [columns[name] for name in text])
    if "{" not in text:
        return columns[text]
    nothing = reduce(pc.and_, [column.is_null() for column in columns.values()])
    return pc.if_else(nothing, pa.scalar(None, TEXT), _filled(columns, text))


def validate_text(text: pa.ChunkedArray) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Return the text, null where it is not UTF-8, and the reason of each row without text."""
    reason = pc.if_else(text.is_null(), pa.scalar(NULL_TEXT), pa.scalar(None, pa.string()))
    try:
        text.validate(full=True)
    except pa.ArrowInvalid:
        invalid = pa.chunked_array([[_is_invalid(raw) for raw in _raw(text)]], type=pa.bool_())
        reason = pc.if_else(invalid, pa.scalar(INVALID_UTF8), reason)
        text = pc.if_else(invalid, pa.scalar(None, TEXT), text)
    return text, reason


def _joined(glue: pa.Scalar, left: pa.ChunkedArray, right: pa.ChunkedArray) -> pa.ChunkedArray:
    # Not null_handling="skip": in pyarrow 26 it drops the rows where every part is null.
    both = pc.binary_join_element_wise(left, right, glue)
    return pc.coalesce(both, left, right)


def _filled(columns: dict[str, pa.ChunkedArray], template: str) -> pa.ChunkedArray:
    empty = pa.scalar("", TEXT)
    parts: list[pa.Scalar | pa.ChunkedArray] = []
    for literal, column in _pieces(template):
        parts += [pa.scalar(literal, TEXT)] if literal else []
        parts += [pc.fill_null(columns[column], empty)] if column is not None else []
    return pc.binary_join_element_wise(*parts, empty)


def _pieces(template: str) -> list[tuple[str, str | None]]:
    """Return literals, each with the column that follows it; braces are doubled to be literal."""
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"input.text: got {template!r}, which is not a template ({error});"
            " write {column} for a column and {{ or }} for a brace"
        ) from error
    if any(column == "" or spec or conversion for _, column, spec, conversion in parsed):
        raise ConfigError(
            f"input.text: got {template!r}, with a slot that is not a plain column name;"
            " allowed is {column}, without format or conversion"
        )
    if all(column is None for _, column, _, _ in parsed):
        raise ConfigError(f"input.text: got {template!r}, which names no column; write {{column}}")
    return [(literal, column) for literal, column, _, _ in parsed]


def _raw(text: pa.ChunkedArray) -> list[bytes | None]:
    raw: list[bytes | None] = text.cast(pa.large_binary()).to_pylist()
    return raw


def _is_invalid(raw: bytes | None) -> bool:
    try:
        (raw or b"").decode("utf-8")
    except UnicodeDecodeError:
        return True
    return False
