"""Footers of whole and of broken shards.

Covers: embedjob.input.listing
"""

from pathlib import Path

import pyarrow as pa
import pytest

from embedjob.input.listing import FIRST_READ, Footer, read_footer, read_footers
from embedjob.storage.objects import Stored, stat
from tests.shards import write_shard


def _stored(path: Path) -> Stored:
    found = stat(str(path))
    assert found is not None
    return found


def test_row_groups_text_bytes_and_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"{i:0100}" for i in range(300)]
    write_shard(path, {"t": texts, "u": ["q" * 5000] * 300}, group_rows=200)
    footer = read_footer(_stored(path), text=["t"])
    assert isinstance(footer, Footer)
    assert (footer.group_rows, footer.rows) == ((200, 100), 300)
    assert 20_000 < footer.group_text_bytes[0] < 23_000
    assert 10_000 < footer.group_text_bytes[1] < 12_000
    assert footer.schema == pa.schema({"t": pa.string(), "u": pa.string()})


def test_a_footer_longer_than_the_first_read(tmp_path: Path) -> None:
    path = tmp_path / "wide.parquet"
    write_shard(path, {f"column-{i}": [i] for i in range(2000)})
    footer = read_footer(_stored(path), text=[])
    assert isinstance(footer, Footer)
    assert footer.length > FIRST_READ
    assert len(footer.schema) == 2000


def _cut(whole: bytes) -> bytes:
    return whole[: len(whole) // 2]


def _holed(whole: bytes) -> bytes:
    return whole[:-200] + b"\xff" * 150 + whole[-50:]


def _lying(whole: bytes) -> bytes:
    return whole[:-8] + (2**31).to_bytes(4, "little") + b"PAR1"


@pytest.mark.parametrize(
    "broken", [lambda _: b"", lambda _: b"PAR1", lambda _: b"a,b\n1,2\n" * 9, _cut, _holed, _lying]
)
def test_a_broken_shard_has_a_reason_and_the_others_a_footer(
    tmp_path: Path, broken: object
) -> None:
    good, bad = tmp_path / "good.parquet", tmp_path / "bad.parquet"
    write_shard(good, {"t": ["a"] * 1000, "n": range(1000)})
    assert callable(broken)
    bad.write_bytes(broken(good.read_bytes()))
    found = read_footers([_stored(good), _stored(bad)], text=["t"])
    assert isinstance(found[str(good)], Footer)
    assert str(found[str(bad)]).startswith("not a whole Parquet file: ")


def test_a_shard_replaced_or_gone_since_the_listing(tmp_path: Path) -> None:
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path in paths:
        write_shard(path, {"t": ["a"]})
    listed = [_stored(path) for path in paths]
    write_shard(paths[0], {"t": ["a", "b"]})
    paths[1].unlink()
    reasons = read_footers(listed, text=["t"]).values()
    assert all(str(reason).startswith("changed after it was listed") for reason in reasons)
