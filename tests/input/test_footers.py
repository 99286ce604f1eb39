"""Footers of whole, of broken and of lying shards.

Covers: embedjob.input.listing
"""

import base64
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as encryption
import pytest

from embedjob.input.footers import Footer, Wanted
from embedjob.input.listing import FIRST_READ, read_footers
from embedjob.storage.objects import Stored, stat
from tests.shards import write_shard


def _stored(path: Path) -> Stored:
    found = stat(str(path))
    assert found is not None
    return found


TEXT = Wanted(("t",), ("t",))


def _footer(path: Path, wanted: Wanted) -> Footer | str:
    return read_footers([_stored(path)], wanted)[str(path)]


def test_row_groups_text_bytes_and_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"{i:0100}" for i in range(300)]
    write_shard(path, {"t": texts, "u": ["q" * 5000] * 300}, group_rows=200)
    footer = _footer(path, TEXT)
    assert isinstance(footer, Footer)
    assert (footer.group_rows, footer.rows) == ((200, 100), 300)
    assert 20_000 < footer.group_text_bytes[0] < 23_000
    assert 10_000 < footer.group_text_bytes[1] < 12_000
    assert footer.schema == pa.schema({"t": pa.string(), "u": pa.string()})


def test_a_footer_longer_than_the_first_read(tmp_path: Path) -> None:
    path = tmp_path / "wide.parquet"
    write_shard(path, {f"column-{i}": [i] for i in range(2000)})
    footer = _footer(path, Wanted((), ()))
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
    found = read_footers([_stored(good), _stored(bad)], TEXT)
    assert isinstance(found[str(good)], Footer)
    assert str(found[str(bad)]).startswith("not a whole Parquet file: ")


def test_a_shard_replaced_or_gone_since_the_listing(tmp_path: Path) -> None:
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path in paths:
        write_shard(path, {"t": ["a"]})
    listed = [_stored(path) for path in paths]
    write_shard(paths[0], {"t": ["a", "b"]})
    paths[1].unlink()
    reasons = read_footers(listed, TEXT).values()
    assert all(str(reason).startswith("changed after it was listed") for reason in reasons)


ROWS = 1000
_FLAG = b"\x16"  # a thrift i64 in the field after the one before


def _i64(value: int) -> bytes:
    """A thrift integer: zigzag, then seven bits a byte."""
    left, written = value * 2 if value >= 0 else -value * 2 - 1, b""
    while left > 127:
        written, left = written + bytes([left & 127 | 128]), left >> 7
    return _FLAG + written + bytes([left])


def _edited(whole: bytes, old: bytes, new: bytes, *, last: bool = False) -> bytes:
    """The file with bytes of its footer replaced, all or the last, and the length set right."""
    start = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    footer = whole[start:-8]
    assert old in footer
    parts = footer.rsplit(old, 1) if last else footer.split(old)
    footer = new.join(parts)
    return whole[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def _lie(path: Path, old: bytes, new: bytes, *, last: bool = False) -> str:
    write_shard(path, {"t": [f"text {i}" for i in range(ROWS)]})
    path.write_bytes(_edited(path.read_bytes(), old, new, last=last))
    reason = _footer(path, TEXT)
    assert isinstance(reason, str)
    return reason


@pytest.mark.parametrize(
    ("claimed", "last", "reason"),
    [
        (-ROWS, False, "row group 0 claims -1000 rows"),
        (2**32 - 1, False, "row group 0 claims 4294967295 rows"),
        (ROWS - 1, True, "row group 0, column 't': claims 1000 values for 999 rows"),
        (2**32 - 1, True, "row group 0 claims 4294967295 rows"),
    ],
)
def test_row_counts_that_cannot_be(tmp_path: Path, claimed: int, last: bool, reason: str) -> None:
    assert reason in _lie(tmp_path / "a.parquet", _i64(ROWS), _i64(claimed), last=last)


def test_bytes_that_the_file_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_shard(path, {"t": [f"text {i}" for i in range(ROWS)]})
    text = pq.read_metadata(path).row_group(0).column(0)
    compressed, whole = text.total_compressed_size, text.total_uncompressed_size
    for old, new, reason in (
        (compressed, 10**9, "claims 1000000000 bytes of a file of 57"),
        (compressed, -5, "claims -5 bytes of a file"),
        (whole, 10**12, "are 1000000000000 once decompressed"),
        (whole, -5, "are -5 once decompressed"),
    ):
        assert reason in _lie(path, _i64(old), _i64(new))


def test_a_column_name_that_is_not_utf8(tmp_path: Path) -> None:
    reason = _lie(tmp_path / "a.parquet", b"\x18\x01t", b"\x18\x01\xff")
    assert reason.startswith("not a whole Parquet file: a column's name is not UTF-8")


def test_a_list_that_claims_more_entries_than_the_footer_has_bytes(tmp_path: Path) -> None:
    # The schema, a list of two: so many would take 1 GB before the first is read.
    written, claimed = b"\x19\x2c", b"\x19\xfc" + _i64(10**6)[1:]
    assert "Exceeded size limit" in _lie(tmp_path / "a.parquet", written, claimed)


def test_an_encrypted_footer(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PARE" + bytes(100) + b"PARE")
    assert "its footer is encrypted, which is not supported" in str(_footer(path, TEXT))


def test_a_codec_that_arrow_cannot_read_is_named_where_its_column_is_needed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.parquet"
    write_shard(path, {"t": ["a"] * 10, "n": range(10)})
    # The last column is in LZO now, as Hive writes it where it is told to.
    path.write_bytes(_edited(path.read_bytes(), b"\x15\x02\x16", b"\x15\x06\x16", last=True))
    assert isinstance(_footer(path, TEXT), Footer)
    said = "whole, but its column 'n' is compressed by LZO, which Arrow cannot read; write it again"
    assert str(_footer(path, Wanted(("t",), ("t", "n")))).startswith(said)


class _Keys(encryption.KmsClient):
    """Keys that are kept as they are."""

    def __init__(self) -> None:
        super().__init__()

    def wrap_key(self, key: bytes, name: str) -> bytes:
        return base64.b64encode(key)

    def unwrap_key(self, key: bytes, name: str) -> bytes:
        return base64.b64decode(key)


def _write_encrypted(path: Path, columns: list[str], *, plaintext_footer: bool) -> None:
    """A shard with the columns t, s and n, where s is a struct; some of them are encrypted."""
    configuration = encryption.EncryptionConfiguration(
        footer_key="footer",
        column_keys={"column": columns},
        plaintext_footer=plaintext_footer,
        double_wrapping=False,
    )
    factory = encryption.CryptoFactory(lambda _: _Keys())
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), configuration)
    table = pa.table({"t": ["a"], "s": [{"x": 1}], "n": [1]})
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    ("hidden", "wanted", "fault"),
    [
        (["t"], Wanted(("t",), ("t",)), True),
        (["s.x"], Wanted(("t",), ("t", "s")), True),
        (["n"], Wanted(("t",), ("t", "n"), ("n",)), True),
        (["n"], Wanted(("t",), ("t", "s")), False),
        (["n", "s.x"], Wanted(("t",), ("t",)), False),
    ],
)
def test_an_encrypted_column_is_a_fault_of_its_shard_where_it_is_needed(
    hidden: list[str], wanted: Wanted, fault: bool, tmp_path: Path
) -> None:
    """Arrow ends the process that looks at one."""
    path = tmp_path / "a.parquet"
    _write_encrypted(path, hidden, plaintext_footer=True)
    write_shard(tmp_path / "b.parquet", {"t": ["a"], "s": [{"x": 1}], "n": [1]})
    found = read_footers([_stored(path), _stored(tmp_path / "b.parquet")], wanted)
    assert isinstance(found[str(tmp_path / "b.parquet")], Footer)
    said = "whole, but it has an encrypted column that this job needs, which is not supported"
    assert (said in str(found[str(path)])) is fault
    _write_encrypted(path, hidden, plaintext_footer=False)
    said = "whole, but its footer is encrypted, which is not supported; decrypt the file"
    assert _footer(path, wanted) == said


def test_other_columns_may_be_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_shard(path, {"t": ["a"] * 50, "list": [[i] * 3 for i in range(50)]})
    path.write_bytes(_edited(path.read_bytes(), _i64(150), _i64(-150)))
    assert isinstance(_footer(path, TEXT), Footer)


def test_the_schema_keeps_no_metadata_and_equal_schemas_are_one(tmp_path: Path) -> None:
    field = pa.field("t", pa.string(), metadata={"ARROW:extension:name": "some.type"})
    schema = pa.schema([field], metadata={"k": "v"})
    for name in "ab":
        write_shard(tmp_path / f"{name}.parquet", pa.table({"t": ["x"]}, schema=schema))
    files = [_stored(tmp_path / f"{name}.parquet") for name in "ab"]
    one, other = read_footers(files, TEXT).values()
    assert isinstance(one, Footer)
    assert isinstance(other, Footer)
    assert one.schema is other.schema
    assert (one.schema.metadata, one.schema.field("t").metadata) == (None, None)
