"""Tables of Iceberg, written by pyiceberg through a catalog in SQLite; deletes by its own writers.

Invariant: a job reads exactly the rows that the table has in its snapshot, in the table's types, as
pyiceberg's own reader gives them; what that cannot be said of is refused.
"""

import datetime
import json
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedjob.errors import ConfigError, InputError
from embedjob.job.input_listing import list_input
from tests.input.tables.catalogs import made_catalog
from tests.input.tables.nights import Nights, input_of, own_rows, planned, rows_of
from tests.shards import write_shard

pytest.importorskip("pyiceberg", reason="pip install 'embedjob[lakehouse]'")
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.manifest import (
    DataFile,
    DataFileContent,
    FileFormat,
    ManifestContent,
    ManifestWriterV2,
)
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.table.snapshots import Operation
from pyiceberg.table.update.snapshot import _FastAppendFiles
from pyiceberg.transforms import IdentityTransform
from pyiceberg.typedef import Record
from pyiceberg.types import (
    DateType,
    IntegerType,
    ListType,
    LongType,
    NestedField,
    StringType,
    StructType,
    TimestampType,
)

DAY = datetime.date(2024, 2, 29)
COLUMNS = (
    NestedField(1, "t", StringType()),
    NestedField(2, "n", LongType()),
    NestedField(3, "p", StringType()),
    NestedField(4, "day", DateType()),
)


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SqlCatalog:
    """A catalog whose tables lie on the local disk."""
    return made_catalog(tmp_path, monkeypatch, f"file://{tmp_path}/ware house")


def _rows(first: int, rows: int, **more: Any) -> pa.Table:
    numbers = range(first, first + rows)
    columns = {"t": [f"text {number}" for number in numbers], "n": pa.array(numbers, pa.int64())}
    odd = ["a b", "ü/ö", "x=y%20", None, "50%", "plus+", "#?&"]
    columns["p"] = pa.array([odd[number % 7] for number in numbers], pa.string())
    columns["day"] = pa.array([DAY if number % 2 else None for number in numbers], pa.date32())
    return pa.table({**columns, **more})


def _docs(catalog: SqlCatalog, *parts: PartitionField, columns: tuple[Any, ...] = COLUMNS) -> Any:
    spec = PartitionSpec(*parts)
    small = {"write.parquet.row-group-limit": "3"}
    return catalog.create_table("db.docs", Schema(*columns), partition_spec=spec, properties=small)


def _own(table: Any, *names: str, **given: Any) -> Counter[tuple[Any, ...]]:
    return own_rows(table.scan(**given).to_arrow(), *names)


PARTS: dict[str, tuple[PartitionField, ...]] = {
    "no partitions": (),
    "of values": (
        PartitionField(3, 1000, IdentityTransform(), "p"),
        PartitionField(4, 1001, IdentityTransform(), "day"),
    ),
}


@pytest.mark.parametrize("parts", PARTS)
def test_each_snapshot_has_its_own_rows(catalog: SqlCatalog, tmp_path: Path, parts: str) -> None:
    table = _docs(catalog, *PARTS[parts])
    table.append(_rows(0, 8))
    table.append(_rows(8, 8))
    table.delete("n in (3, 4, 9)")
    table.overwrite(_rows(100, 3))
    folder = Path(table.location().removeprefix("file://"))
    write_shard(folder / "data" / "stray.parquet", _rows(500, 2))
    keep = ("p", "day")
    for snapshot in table.snapshots():
        number = snapshot.snapshot_id
        job_input = input_of("iceberg", "db.docs", catalog="tests", version=number, keep=keep)
        if _own(table, "n", snapshot_id=number):
            assert rows_of(job_input) == _own(table, "n", "t", *keep, snapshot_id=number)
            assert list_input(job_input).version == str(number)
        else:
            with pytest.raises(InputError, match="has no file in version"):
                planned(job_input)
    newest = input_of("iceberg", "db.docs", catalog="tests", keep=keep)
    assert rows_of(newest) == _own(table, "n", "t", *keep)
    assert planned(newest).types["day"] == pa.date32()
    # Without a catalog, by the metadata of a version.
    file = input_of("iceberg", table.metadata_location, keep=keep)
    assert rows_of(file) == rows_of(newest)


def test_branches_and_tags_are_versions(catalog: SqlCatalog) -> None:
    table = _docs(catalog)
    table.append(_rows(0, 3))
    table.manage_snapshots().create_tag(table.current_snapshot().snapshot_id, "v1").commit()
    table.append(_rows(3, 3))
    at = input_of("iceberg", "db.docs", catalog="tests", version="v1")
    assert rows_of(at).total() == 3
    with pytest.raises(InputError, match=r"no version v2; the last ones, .*: \d+, \d+, main, v1"):
        planned(input_of("iceberg", "db.docs", catalog="tests", version="v2"))


def test_columns_are_known_by_their_ids(catalog: SqlCatalog) -> None:
    columns = (
        *COLUMNS[:2],
        NestedField(3, "k", IntegerType()),
        NestedField(4, "url", StringType()),
    )
    table = _docs(catalog, columns=columns)
    kinds = {"k": pa.array([1, 2], pa.int32()), "url": ["u", "v"]}
    table.append(_rows(0, 2, **kinds).drop_columns(["p", "day"]))
    with table.update_schema() as update:
        # What files call `t` is now `body`; another column is `t`; `k` is wider and named anew.
        update.rename_column("t", "body")
        update.rename_column("url", "t")
        update.rename_column("k", "size")
        update.update_column("k", LongType())
    with table.update_schema() as update:
        update.add_column("k", StringType())
    last = pa.table(
        {"body": ["text 2"], "n": [2], "size": [2**40], "t": ["w"], "k": ["a column of that name"]}
    )
    table.append(last)
    names = ("size", "t", "k")
    job_input = input_of("iceberg", "db.docs", catalog="tests", text="body", keep=names)
    found = rows_of(job_input)
    assert found == _own(table, "n", "body", *names)
    assert found[0, "text 0", 1, "u", None] == 1
    assert found[2, "text 2", 2**40, "w", "a column of that name"] == 1
    assert planned(job_input).types["size"] == pa.int64()
    # As it was: names and types of that time.
    first = table.snapshots()[0].snapshot_id
    before = input_of("iceberg", "db.docs", catalog="tests", version=first, keep=("k", "url"))
    assert rows_of(before) == {(0, "text 0", 1, "u"): 1, (1, "text 1", 2, "v"): 1}


def test_a_column_that_was_dropped_and_made_again_is_another(catalog: SqlCatalog) -> None:
    table = _docs(catalog)
    table.append(_rows(0, 2))
    with table.update_schema() as update:
        update.delete_column("p")
    with table.update_schema() as update:
        update.add_column("p", StringType())
    found = rows_of(input_of("iceberg", "db.docs", catalog="tests", keep=("p",)))
    assert found == _own(table, "n", "t", "p") == {(0, "text 0", None): 1, (1, "text 1", None): 1}


def test_a_nested_column_that_has_changed_is_refused(catalog: SqlCatalog) -> None:
    inner = StructType(NestedField(6, "x", StringType()))
    nested = (
        NestedField(5, "more", inner),
        NestedField(7, "tags", ListType(8, StringType(), element_required=False)),
    )
    table = _docs(catalog, columns=(*COLUMNS[:2], *nested))
    more = {"more": [{"x": "a"}, None], "tags": [["a", "b"], []]}
    table.append(_rows(0, 2, **more).drop_columns(["p", "day"]))
    keep = ("more", "tags")
    job_input = input_of("iceberg", "db.docs", catalog="tests", keep=keep)
    made = planned(job_input)
    assert made.types["tags"] == pa.list_(pa.field("element", pa.large_string()))
    with table.update_schema() as update:
        update.rename_column(("more", "x"), "y")
    with pytest.raises(InputError, match=r"column 'more' .* nested, and what is in it has changed"):
        planned(job_input)
    assert planned(input_of("iceberg", "db.docs", catalog="tests", keep=("tags",))).rows == 2


def test_files_that_were_added_as_they_are(catalog: SqlCatalog, tmp_path: Path) -> None:
    # They have no ids; the table maps names to them.
    table = _docs(catalog, PartitionField(3, 1000, IdentityTransform(), "p"))
    same = _rows(0, 3).set_column(2, "p", [["here"] * 3])
    write_shard(tmp_path / "old" / "a.parquet", same)
    table.add_files([f"{tmp_path}/old/a.parquet"])
    with table.update_schema() as update:
        update.rename_column("t", "body")
    table.append(_rows(3, 2).rename_columns(["body", "n", "p", "day"]))
    job_input = input_of("iceberg", "db.docs", catalog="tests", text="body", keep=("p",))
    assert rows_of(job_input) == _own(table, "n", "body", "p")
    with table.transaction() as change:
        change.remove_properties("schema.name-mapping.default")
    faulty = [chunk for chunk in planned(job_input).chunks if "old/" in chunk.shard.url]
    from embedjob.errors import ChunkError
    from embedjob.input.reading import read_chunk

    with pytest.raises(ChunkError, match=r"have no ids, and its table has no schema\.name-mapping"):
        read_chunk(faulty[0], job_input)


class _DeletesWriter(ManifestWriterV2):
    def content(self) -> ManifestContent:
        return ManifestContent.DELETES

    @property
    def _meta(self) -> dict[str, str]:
        return {**super()._meta, "content": "deletes"}


class _Deletes(_FastAppendFiles):
    """A snapshot that adds files of deletes, which pyiceberg reads and does not write."""

    def new_manifest_writer(self, spec: PartitionSpec) -> Any:
        return _DeletesWriter(
            spec=spec,
            schema=self._transaction.table_metadata.schema(),
            output_file=self.new_manifest_output(),
            snapshot_id=self._snapshot_id,
            avro_compression=self._compression,
        )


def _delete(
    table: Any, path: str, kind: DataFileContent, rows: pa.Table | bytes, *, number: int = 1
) -> None:
    """Put a file of deletes, of Parquet or of Puffin, and a snapshot that has it."""
    if isinstance(rows, bytes):
        data, count, format = rows, number, FileFormat.PUFFIN
    else:
        buffer = pa.BufferOutputStream()
        pq.write_table(rows, buffer)
        data, count, format = buffer.getvalue().to_pybytes(), len(rows), FileFormat.PARQUET
    with table.io.new_output(path).create(overwrite=True) as output:
        output.write(data)
    file = DataFile.from_args(
        content=kind,
        file_path=path,
        file_format=format,
        partition=Record(),
        record_count=count,
        file_size_in_bytes=len(data),
        equality_ids=[2] if kind == DataFileContent.EQUALITY_DELETES else None,
        column_sizes={},
        value_counts={},
        null_value_counts={},
        nan_value_counts={},
        lower_bounds={},
        upper_bounds={},
    )
    file.spec_id = 0
    with table.transaction() as change:
        producer = _Deletes(operation=Operation.DELETE, transaction=change, io=table.io)
        with producer:
            producer.append_data_file(file)


def _data_files(table: Any) -> list[str]:
    """The places of the data files, the largest first."""
    tasks = sorted(table.scan().plan_files(), key=lambda task: -task.file.record_count)
    return [task.file.file_path for task in tasks]


def _positions(table: Any, path: str | Path, rows: dict[int, list[int]]) -> None:
    """Delete rows, by the number of the data file and their numbers there."""
    files = _data_files(table)
    pairs = [(files[number], row) for number, some in rows.items() for row in some]
    columns = {"file_path": [one for one, _ in pairs], "pos": [row for _, row in pairs]}
    table_of = pa.table(
        columns, schema=pa.schema([("file_path", pa.string()), ("pos", pa.int64())])
    )
    _delete(table, str(path), DataFileContent.POSITION_DELETES, table_of)


def _puffin(vectors: dict[str, list[int]], **properties: str) -> bytes:
    """A Puffin file of deletion vectors: https://iceberg.apache.org/puffin-spec."""
    bitmap = pytest.importorskip("pyroaring").BitMap
    data, blobs = b"PFA1", []
    for file, rows in vectors.items():
        vector = b"\xd1\xd3\x39\x64" + struct.pack("<QI", 1, 0) + bitmap(rows).serialize()
        blob = struct.pack(">I", len(vector)) + vector + struct.pack(">I", zlib.crc32(vector))
        named = {"referenced-data-file": file, "cardinality": str(len(rows)), **properties}
        place = {"offset": len(data), "length": len(blob), "fields": [2147483546]}
        none = {"snapshot-id": -1, "sequence-number": -1}
        blobs.append({"type": "deletion-vector-v1", **place, **none, "properties": named})
        data += blob
    footer = json.dumps({"blobs": blobs}).encode()
    return data + b"PFA1" + footer + struct.pack("<II", len(footer), 0) + b"PFA1"


def test_rows_of_position_deletes_are_left_out(catalog: SqlCatalog, tmp_path: Path) -> None:
    table, nights = _docs(catalog), Nights(str(tmp_path / "out"))
    job_input = input_of("iceberg", "db.docs", catalog="tests")
    table.append(_rows(0, 9))
    table.append(_rows(9, 6))
    first = nights.night(job_input)
    _positions(table, tmp_path / "deletes" / "1.parquet", {0: [0, 1], 1: [5]})
    second = nights.night(job_input)
    assert rows_of(job_input) == _own(table, "n", "t")
    assert len(nights.ids(first)) == 15
    assert len(nights.ids(second)) == 12
    # Only of the two chunks of three rows that have lost some, what is left.
    assert len(nights.embedded[1]) == 3
    # Two files of deletes may name rows of one data file, also the same ones.
    _positions(table, tmp_path / "deletes" / "2.parquet", {0: [1, 8]})
    third = nights.night(job_input)
    assert rows_of(job_input) == _own(table, "n", "t")
    assert len(nights.ids(third)) == 11
    assert third.input_version == str(table.current_snapshot().snapshot_id)
    # What comes later is not deleted, and is what this night costs.
    table.append(_rows(100, 2))
    nights.night(job_input)
    assert nights.embedded[-1] == ["text 100", "text 101"]


def test_rows_of_deletion_vectors_are_left_out(catalog: SqlCatalog, tmp_path: Path) -> None:
    """One file has the vectors of several data files, and a later one takes the place of one."""
    table, nights = _docs(catalog), Nights(str(tmp_path / "out"))
    job_input = input_of("iceberg", "db.docs", catalog="tests")
    table.append(_rows(0, 9))
    table.append(_rows(9, 6))
    nights.night(job_input)
    one, other = _data_files(table)
    both = _puffin({one: [0, 1], other: [5]})
    _delete(table, str(tmp_path / "1.puffin"), DataFileContent.POSITION_DELETES, both)
    assert nights.ids(nights.night(job_input)) == [*range(2, 14)]
    assert rows_of(job_input) == _own(table, "n", "t")
    # Two chunks of three rows each have lost some: what is left of them.
    assert nights.embedded[1] == ["text 12", "text 13", "text 2"]
    more = _puffin({one: [0, 1, 8]})
    _delete(table, str(tmp_path / "2.puffin"), DataFileContent.POSITION_DELETES, more)
    table.append(_rows(100, 2))
    assert nights.ids(nights.night(job_input)) == [*range(2, 8), *range(9, 14), 100, 101]
    assert nights.embedded[2] == ["text 100", "text 101", "text 6", "text 7"]
    assert rows_of(job_input) == _own(table, "n", "t")
    # Each version has its own rows; what was embedded for one is not embedded again.
    for snapshot, rows in zip(table.snapshots(), (9, 15, 12, 11, 13), strict=True):
        at = input_of("iceberg", "db.docs", catalog="tests", version=snapshot.snapshot_id)
        assert rows_of(at).total() == rows
        nights.night(at)
    assert nights.embedded[3:] == [[]] * 5


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda puffin: puffin[:-20],
    "no magic": lambda puffin: b"0000" + puffin[4:],
    "fewer rows": lambda puffin: puffin.replace(b'"cardinality": "2"', b'"cardinality": "3"'),
    "of nothing": lambda puffin: puffin.replace(b'"referenced-', b'"referencing'),
    "another count of bitmaps": lambda puffin: puffin.replace(struct.pack("<QI", 1, 0), bytes(12)),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_deletion_vector_that_is_damaged_is_refused(
    catalog: SqlCatalog, tmp_path: Path, how: str
) -> None:
    table = _docs(catalog)
    table.append(_rows(0, 3))
    whole = _puffin({_data_files(table)[0]: [0, 2]})
    damaged = DAMAGED[how](whole)
    assert damaged != whole
    _delete(table, str(tmp_path / "d.puffin"), DataFileContent.POSITION_DELETES, damaged)
    with pytest.raises(InputError, match=r"d\.puffin, which is damaged .*not known which; rewrite"):
        planned(input_of("iceberg", "db.docs", catalog="tests"))


@pytest.mark.slow
def test_a_table_in_a_bucket(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by the catalog, whose configuration does not name the server, and by its metadata."""
    table = _docs(made_catalog(tmp_path, monkeypatch, f"{bucket}/warehouse"), *PARTS["of values"])
    nights = Nights(str(tmp_path / "out"))
    job_input = input_of("iceberg", "db.docs", catalog="tests", keep=("p", "day"))
    table.append(_rows(0, 8))
    nights.night(job_input)
    table.append(_rows(8, 3))
    table.delete("n = 4")
    nights.night(job_input)
    assert rows_of(job_input) == _own(table, "n", "t", "p", "day")
    assert nights.embedded[1] == ["text 10", "text 8", "text 9"]
    by_file = input_of("iceberg", table.metadata_location, keep=("p", "day"))
    assert rows_of(by_file) == rows_of(job_input)


@pytest.mark.slow
def test_deletes_in_a_bucket(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = _docs(made_catalog(tmp_path, monkeypatch, f"{bucket}/warehouse"))
    table.append(_rows(0, 9))
    job_input = input_of("iceberg", "db.docs", catalog="tests")
    place = f"{table.location()}/data"
    _positions(table, f"{place}/1.parquet", {0: [3]})
    vector = _puffin({_data_files(table)[0]: [3, 4]})
    _delete(table, f"{place}/2.puffin", DataFileContent.POSITION_DELETES, vector)
    assert {row[0] for row in rows_of(job_input)} == {0, 1, 2, 5, 6, 7, 8}
    assert rows_of(job_input) == _own(table, "n", "t")


MANIFESTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (Path.unlink, "its manifests are gone, as after expire_snapshots; give a version"),
    "damaged": (lambda file: file.write_bytes(b"Obj"), "manifests cannot be read: give another"),
}


@pytest.mark.parametrize("how", MANIFESTS)
def test_manifests_that_cannot_be_read_are_named(catalog: SqlCatalog, how: str) -> None:
    table = _docs(catalog)
    table.append(_rows(0, 3))
    damage, said = MANIFESTS[how]
    (manifest,) = table.current_snapshot().manifests(table.io)
    damage(Path(manifest.manifest_path.removeprefix("file://")))
    with pytest.raises(InputError, match=said) as refused:
        planned(input_of("iceberg", "db.docs", catalog="tests"))
    assert "rewrite" not in str(refused.value)


def test_deletes_by_values_are_refused(catalog: SqlCatalog, tmp_path: Path) -> None:
    table = _docs(catalog)
    table.append(_rows(0, 3))
    values = pa.table({"n": pa.array([1], pa.int64())})
    _delete(table, str(tmp_path / "d.parquet"), DataFileContent.EQUALITY_DELETES, values)
    with pytest.raises(InputError, match=r"equality deletes.*rewrite the table's data files"):
        planned(input_of("iceberg", "db.docs", catalog="tests"))


def test_deletes_that_are_gone_are_refused(catalog: SqlCatalog, tmp_path: Path) -> None:
    table = _docs(catalog)
    table.append(_rows(0, 3))
    _positions(table, tmp_path / "d.parquet", {0: [1]})
    (tmp_path / "d.parquet").unlink()
    with pytest.raises(InputError, match="which is missing, so that it is not known which"):
        planned(input_of("iceberg", "db.docs", catalog="tests"))


def test_other_files_than_parquet_are_refused(catalog: SqlCatalog, tmp_path: Path) -> None:
    table = _docs(catalog)
    table.append(_rows(0, 3))
    orc = DataFile.from_args(
        content=DataFileContent.DATA,
        file_path=str(tmp_path / "a.orc"),
        file_format=FileFormat.ORC,
        partition=Record(),
        record_count=1,
        file_size_in_bytes=1,
        column_sizes={},
        value_counts={},
        null_value_counts={},
        nan_value_counts={},
        lower_bounds={},
        upper_bounds={},
    )
    orc.spec_id = 0
    with table.transaction() as change, change.update_snapshot().fast_append() as append:
        append.append_data_file(orc)
    with pytest.raises(InputError, match=r"a\.orc is .*ORC; allowed is Parquet"):
        planned(input_of("iceberg", "db.docs", catalog="tests"))


MISSING: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "no such table": (lambda at: {"uri": "db.nothing", "catalog": "tests"}, "as tests has it"),
    "no such catalog": (lambda at: {"uri": "db.docs", "catalog": "others"}, "as others has it"),
    "no such file": (lambda at: {"uri": at / "v1.metadata.json"}, "version-hint.text"),
    "a folder without a hint": (lambda at: {"uri": at}, "version-hint.text"),
    "no version yet": (lambda at: {"uri": "db.docs", "catalog": "tests"}, "has no version yet"),
}


@pytest.mark.parametrize("what", MISSING)
def test_what_is_not_there_is_named(catalog: SqlCatalog, tmp_path: Path, what: str) -> None:
    _docs(catalog)
    given, said = MISSING[what]
    fields = given(tmp_path)
    with pytest.raises(InputError, match=said):
        planned(input_of("iceberg", fields.pop("uri"), **fields))


def test_a_folder_with_a_hint_is_a_table(catalog: SqlCatalog, tmp_path: Path) -> None:
    table = _docs(catalog)
    table.append(_rows(0, 3))
    folder = Path(table.location().removeprefix("file://"))
    name = Path(table.metadata_location).name
    (folder / "metadata" / "version-hint.text").write_text(name)
    assert rows_of(input_of("iceberg", folder)).total() == 3


def test_a_timestamp_partition_is_a_column(catalog: SqlCatalog) -> None:
    columns = (*COLUMNS[:2], NestedField(3, "at", TimestampType()))
    table = _docs(catalog, PartitionField(3, 1000, IdentityTransform(), "at"), columns=columns)
    moment = datetime.datetime(2024, 2, 29, 12, 30)
    rows = {"at": pa.array([moment, None], pa.timestamp("us"))}
    table.append(_rows(0, 2, **rows).drop_columns(["p", "day"]))
    found = rows_of(input_of("iceberg", "db.docs", catalog="tests", keep=("at",)))
    assert found == {(0, "text 0", moment): 1, (1, "text 1", None): 1}


def test_a_library_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs pyiceberg; pip install 'embedjob\[lakehouse\]'"):
        planned(input_of("iceberg", "db.docs", catalog="tests"))


def test_own_files_have_ids(catalog: SqlCatalog) -> None:
    """What `file_columns` relies on."""
    table = _docs(catalog)
    table.append(_rows(0, 1))
    (task,) = table.scan().plan_files()
    schema = pq.read_schema(task.file.file_path.removeprefix("file://"))
    assert schema.field("t").metadata[b"PARQUET:field_id"] == b"1"
