"""Damage anywhere in a shard: a named fault or the right rows, and nobody's end.

Covers: embedjob.input.footers, embedjob.input.decoders, embedjob.input.reading
"""

import io
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.input.damaged import Reader

ROWS = 100
WRITERS: tuple[dict[str, Any], ...] = (
    {},
    {"compression": "zstd", "data_page_version": "2.0"},
    {"compression": "gzip", "use_dictionary": False, "write_page_index": True},
    {"compression": "none", "data_page_size": 200},
)


def _written(writer: dict[str, Any]) -> bytes:
    texts = [None if i % 17 == 3 else f"text {i} " * (i % 5 + 1) for i in range(ROWS)]
    kept = pa.array([["a", "b", None][i % 3] for i in range(ROWS)]).dictionary_encode()
    nested = [{"a": [i] * (i % 3)} for i in range(ROWS)]
    table = pa.table({"n": range(ROWS), "t": texts, "k": kept, "nested": nested})
    sink = io.BytesIO()
    # With checksums, a page that is not what was written is known for that.
    pq.write_table(table, sink, row_group_size=30, write_page_checksum=True, **writer)
    return sink.getvalue()


SHARDS = [_written(writer) for writer in WRITERS]


class Edit(NamedTuple):
    """Bytes put in the place of as many, or of fewer, at a share of the length of an area."""

    place: float
    removed: int
    added: bytes


class Damage(NamedTuple):
    """What is done to which shard: to its pages or its footer, whose length may be set right."""

    which: int
    edits: list[Edit]
    footer: bool
    sound_length: bool

    def done(self) -> bytes:
        """The damaged shard."""
        whole = SHARDS[self.which]
        split = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
        area = bytearray(whole[split:-8] if self.footer else whole[:split])
        for edit in self.edits:
            place = int(edit.place * len(area))
            area[place : place + edit.removed] = edit.added
        if not self.footer:
            return bytes(area) + whole[split:]
        length = len(area) if self.sound_length else len(whole) - 8 - split
        return whole[:split] + bytes(area) + length.to_bytes(4, "little") + b"PAR1"


ADDED = (
    st.binary(max_size=6)
    | st.integers(0, 5).map(lambda byte: bytes([byte]))
    | st.integers(1, 12).map(lambda count: b"\xff" * count)
)
EDITS = st.builds(
    Edit, place=st.floats(0, 1, exclude_max=True), removed=st.integers(0, 12), added=ADDED
)
DAMAGE = st.builds(
    Damage,
    which=st.integers(0, len(SHARDS) - 1),
    edits=st.lists(EDITS, min_size=1, max_size=3),
    footer=st.booleans(),
    sound_length=st.booleans(),
)


def _said_to_have_no_nulls(which: int) -> Damage:
    """Damage that ends the process that looks at column `t`: its counts of nulls do not fit."""
    footer = SHARDS[which][-8 - int.from_bytes(SHARDS[which][-8:-4], "little") : -8]
    place = footer.index(b"\x25\x02\x18\x01t") + 1
    return Damage(which, [Edit((place + 0.5) / len(footer), 1, b"\x00")], True, True)


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.end()


@pytest.fixture(scope="module")
def right(reader: Reader) -> list[Any]:
    answers = [reader.read(shard) for shard in SHARDS]
    assert [kind for kind, _ in answers] == ["rows"] * len(SHARDS)
    return [rows for _, rows in answers]


def _check(reader: Reader, right: list[Any], damage: Damage) -> None:
    kind, answer = reader.read(damage.done())
    assert kind in ("rows", "fault"), answer
    if kind == "fault":
        assert answer.strip()
        return
    # No checksum covers a footer: a name or a type of a kept column may be another. The number of
    # rows, their text and their id may not.
    names = ("row", "text", "id") if damage.footer else tuple(right[damage.which][0])
    expected = [{name: row[name] for name in names} for row in right[damage.which]]
    assert [{name: row[name] for name in names} for row in answer] == expected


SHARED = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow)


@given(damage=DAMAGE)
@example(damage=_said_to_have_no_nulls(0))
@example(damage=_said_to_have_no_nulls(2))
@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=SHARED)
def test_damage_is_a_named_fault_or_changes_no_row(
    reader: Reader, right: list[Any], damage: Damage
) -> None:
    _check(reader, right, damage)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@given(damage=DAMAGE)
@settings(max_examples=30_000, deadline=None, suppress_health_check=SHARED)
def test_much_damage_is_named_faults_or_changes_no_row(
    reader: Reader, right: list[Any], damage: Damage
) -> None:
    _check(reader, right, damage)
