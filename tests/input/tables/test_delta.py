"""Tables of Delta Lake, written by deltalake, and by hand where it writes no such feature.

Invariant: a job reads exactly the rows that the table has at its version, in the table's types, as
deltalake's own reader gives them; what that cannot be said of is refused.
Covers: embedjob.input.tables.table_files, embedjob.input.tables.versions,
embedjob.job.input_listing
"""

import datetime
import json
import struct
import uuid
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedjob.config.job import Input, InputTable, table_name
from embedjob.errors import ConfigError, InputError
from embedjob.input import listing
from embedjob.input.listing import check_apart
from embedjob.job import input_listing
from embedjob.job.input_listing import list_input
from tests.input.tables.nights import Nights, input_of, own_rows, planned, rows_of
from tests.seaweed import S3Server
from tests.shards import write_shard

deltalake = pytest.importorskip("deltalake", reason="pip install 'embedjob[lakehouse]'")
DAY = datetime.date(2024, 2, 29)


def _table(first: int, rows: int, **more: Any) -> pa.Table:
    numbers = range(first, first + rows)
    columns = {"t": [f"text {number}" for number in numbers], "n": pa.array(numbers, pa.int64())}
    return pa.table({**columns, **more})


def test_each_version_has_its_own_rows(tmp_path: Path) -> None:
    odd = ["a b", "ü/ö", "x=y%20", None, "50%", "plus+", "#?&", "a b"]
    days = [DAY, None, DAY, DAY, None, DAY, DAY, DAY]
    place = tmp_path / "docs and more"
    by = {"p": odd, "day": days, "k": pa.array([1, 2] * 4, pa.int16())}
    write = deltalake.write_deltalake
    write(place, _table(0, 8, **by), partition_by=["p", "day", "k"])
    write(place, _table(8, 8, **by), mode="append")
    deltalake.DeltaTable(place).delete("n in (3, 4, 9)")
    deltalake.DeltaTable(place).update(updates={"t": "'changed'"}, predicate="n = 12")
    write(
        place, _table(100, 3, p=["a b"] * 3, day=days[:3], k=by["k"].slice(0, 3)), mode="overwrite"
    )
    # What lies there and the table does not have: files of old versions, and anybody's.
    write_shard(place / "stray.parquet", _table(500, 2, p=["a"] * 2, day=days[:2], k=[1, 1]))
    keep = ("p", "day", "k")
    sizes = []
    for version in [*range(5), None]:
        table = deltalake.DeltaTable(place, version=version)
        job_input = input_of("delta", place, version=version, keep=keep)
        found = rows_of(job_input)
        assert found == own_rows(table.scan(), "n", "t", *keep)
        assert list_input(job_input).version == str(table.version())
        sizes.append(found.total())
    assert sizes == [8, 16, 13, 13, 3, 3]
    types = planned(input_of("delta", place, keep=keep)).types
    assert types == {"n": pa.int64(), "p": pa.large_string(), "day": pa.date32(), "k": pa.int16()}
    only = input_of("delta", place, version=1, keep=("p",), filter=(("p", "=", "ü/ö"),))
    assert {row[2] for row in rows_of(only)} == {"ü/ö"}
    # Not through the folder: that has the files of all versions.
    assert len(planned(Input(path=str(place), text="t", id="n")).shards) > len(
        planned(input_of("delta", place)).shards
    )


def test_a_column_that_came_later_is_null_before(tmp_path: Path) -> None:
    write = deltalake.write_deltalake
    write(tmp_path / "d", _table(0, 3))
    write(tmp_path / "d", _table(3, 3, url=["u"] * 3), mode="append", schema_mode="merge")
    found = rows_of(input_of("delta", tmp_path / "d", keep=("url",)))
    assert found == own_rows(deltalake.DeltaTable(tmp_path / "d").scan(), "n", "t", "url")
    assert Counter(row[2] for row in found.elements()) == {None: 3, "u": 3}
    # At its old version the table has no such column.
    with pytest.raises(InputError, match=r"no column 'url' in version 0; there are: t, n"):
        planned(input_of("delta", tmp_path / "d", version=0, keep=("url",)))


def test_a_night_embeds_what_a_version_has_added(tmp_path: Path) -> None:
    place, nights = tmp_path / "d", Nights(str(tmp_path / "out"))
    job_input = input_of("delta", place)
    deltalake.write_deltalake(place, _table(0, 7))
    first = nights.night(job_input)
    deltalake.write_deltalake(place, _table(7, 2), mode="append")
    second = nights.night(job_input)
    assert nights.embedded == [[f"text {n}" for n in range(7)], ["text 7", "text 8"]]
    assert (first.input_version, second.input_version) == ("0", "1")
    assert nights.ids(second) == list(range(9))
    # A version that changes no row is another version all the same; nothing is embedded.
    deltalake.DeltaTable(place).alter.set_table_name("docs")
    assert nights.night(job_input).input_version == "2"
    assert nights.embedded[-1] == []
    # A whole file goes: its rows go, and nothing else is touched.
    deltalake.DeltaTable(place).delete("n >= 7")
    assert nights.ids(nights.night(job_input)) == list(range(7))
    assert nights.embedded[-1] == []


def test_an_unchanged_file_is_not_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, nights = tmp_path / "d", Nights(str(tmp_path / "out"))
    deltalake.write_deltalake(place, _table(0, 7))
    nights.night(input_of("delta", place))
    opened: list[str] = []
    real = listing.read_footers

    def footers(files: Any, *given: Any) -> Any:
        opened.extend(file.url for file in files)
        return real(files, *given)

    monkeypatch.setattr(input_listing, "read_footers", footers)
    planned(input_of("delta", place), nights.out)
    assert opened == []
    deltalake.write_deltalake(place, _table(7, 2), mode="append")
    planned(input_of("delta", place), nights.out)
    assert len(opened) == 1


def _commit(place: Path, version: int, *actions: dict[str, Any]) -> None:
    """A commit of the log, by hand: https://github.com/delta-io/delta, PROTOCOL.md."""
    log = place / "_delta_log"
    log.mkdir(parents=True, exist_ok=True)
    info = {"commitInfo": {"timestamp": version, "operation": "by hand"}}
    lines = [json.dumps(action) for action in (info, *actions)]
    (log / f"{version:020}.json").write_text("\n".join(lines))


def _protocol(*features: str) -> dict[str, Any]:
    listed = {"readerFeatures": [*features], "writerFeatures": [*features]}
    return {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, **listed}}


def _metadata(fields: list[dict[str, Any]], **configuration: str) -> dict[str, Any]:
    schema = json.dumps({"type": "struct", "fields": fields})
    given = {"format": {"provider": "parquet", "options": {}}, "schemaString": schema}
    return {
        "metaData": {
            "id": str(uuid.UUID(int=1)),
            **given,
            "partitionColumns": [],
            "configuration": configuration,
            "createdTime": 0,
        }
    }


def _field(name: str, kind: str, **metadata: Any) -> dict[str, Any]:
    return {"name": name, "type": kind, "nullable": True, "metadata": metadata}


def _add(place: Path, name: str, table: pa.Table, **more: Any) -> dict[str, Any]:
    path = place / name
    if not path.exists():
        write_shard(path, table, group_rows=3)
    stats = json.dumps({"numRecords": len(table)})
    given = {"partitionValues": {}, "modificationTime": 0, "dataChange": True, "stats": stats}
    return {"add": {"path": name, "size": path.stat().st_size, **given, **more}}


def _remove(name: str, **more: Any) -> dict[str, Any]:
    return {"remove": {"path": name, "deletionTimestamp": 0, "dataChange": True, **more}}


Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"


def _z85(data: bytes) -> str:
    padded = data + b"\0" * (-len(data) % 4)
    words = [word for (word,) in struct.iter_unpack(">I", padded)]
    return "".join(Z85[word // 85**power % 85] for word in words for power in (4, 3, 2, 1, 0))


def _vector(rows: list[int], file: Path | None = None) -> dict[str, Any]:
    """A deletion vector as PROTOCOL.md has it, a roaring bitmap: in the log itself, or in a file.

    The file's name follows from a number that the log has.
    """
    bitmap = pytest.importorskip("pyroaring").BitMap(rows).serialize()
    data = struct.pack("<IQI", 1681511377, 1, 0) + bitmap
    kind: dict[str, Any] = {"storageType": "i", "pathOrInlineDv": _z85(data)}
    if file is not None:
        framed = struct.pack(">BI", 1, len(data)) + data + struct.pack(">I", zlib.crc32(data))
        file.write_bytes(framed)
        number = uuid.UUID(file.stem.removeprefix("deletion_vector_"))
        kind = {"storageType": "u", "pathOrInlineDv": _z85(number.bytes), "offset": 1}
    size = {"sizeInBytes": len(data), "cardinality": len(rows)}
    return {"deletionVector": {**kind, **size}}


def test_rows_of_deletion_vectors_are_left_out(tmp_path: Path) -> None:
    place, nights = tmp_path / "a table", Nights(str(tmp_path / "out"))
    rows, fields = _table(0, 9), [_field("t", "string"), _field("n", "long")]
    enabled = {"delta.enableDeletionVectors": "true"}
    named = ("a b.parquet", "a%20b.parquet")  # the log has paths as parts of URLs
    _add(place, named[0], rows)
    add = {**_add(place, named[0], rows)["add"], "path": named[1]}
    _commit(place, 0, _protocol("deletionVectors"), _metadata(fields, **enabled), {"add": add})
    job_input = input_of("delta", place)
    nights.night(job_input)
    _commit(place, 1, _remove(named[1]), {"add": {**add, **_vector([0, 4, 5])}})
    served = nights.night(job_input)
    assert nights.ids(served) == [1, 2, 3, 6, 7, 8]
    reference = own_rows(deltalake.DeltaTable(place).scan(), "n", "t")
    assert rows_of(job_input) == reference
    # Chunks of three rows: the last one has lost none, and its file stays.
    assert nights.embedded[1] == [f"text {n}" for n in (1, 2, 3)]
    # More of the same file; a whole chunk of it is gone.
    more = {**add, **_vector([0, 4, 5, 6, 7, 8])}
    _commit(place, 2, _remove(named[1], **_vector([0, 4, 5])), {"add": more})
    assert nights.ids(nights.night(job_input)) == [1, 2, 3]
    assert nights.embedded[2] == []
    # A log by which one file is there twice is no log of rows.
    _commit(place, 3, {"add": {**add, **_vector([1])}})
    with pytest.raises(InputError, match=r"lists .*a b\.parquet twice"):
        planned(job_input)
    # Back at an earlier version, nothing is embedded twice.
    assert nights.ids(nights.night(input_of("delta", place, version=1))) == [1, 2, 3, 6, 7, 8]
    assert nights.embedded[3] == []


def test_deletion_vectors_in_files_are_read_or_refused(tmp_path: Path) -> None:
    place = tmp_path / "d"
    fields = [_field("t", "string"), _field("n", "long")]
    add = _add(place, "a.parquet", _table(0, 5))["add"]
    enabled = {"delta.enableDeletionVectors": "true"}
    _commit(place, 0, _protocol("deletionVectors"), _metadata(fields, **enabled), {"add": add})
    file = place / f"deletion_vector_{uuid.UUID(int=7)}.bin"
    _commit(place, 1, _remove("a.parquet"), {"add": {**add, **_vector([1, 4], file)}})
    job_input = input_of("delta", place)
    assert rows_of(job_input) == own_rows(deltalake.DeltaTable(place).scan(), "n", "t")
    assert {row[0] for row in rows_of(job_input)} == {0, 2, 3}
    whole = file.read_bytes()
    for damage in (file.unlink, lambda: file.write_bytes(whole[:-6] + b"??????")):
        damage()
        with pytest.raises(InputError, match=r"vector cannot be read: .*not known which"):
            planned(job_input)
    assert rows_of(input_of("delta", place, version=0)).total() == 5


def test_columns_with_other_names_in_files_are_those_of_the_table(tmp_path: Path) -> None:
    place = tmp_path / "d"
    mapped = {"delta.columnMapping.mode": "name", "delta.columnMapping.maxColumnId": "3"}

    def named(name: str, kind: Any, physical: str, number: int) -> dict[str, Any]:
        by = {"delta.columnMapping.id": number, "delta.columnMapping.physicalName": physical}
        return _field(name, kind, **by)

    # Renamed crosswise: what files call `t` is the table's `url`.
    rows = pa.table({"col-1": ["text 0", "text 1"], "n": [0, 1], "t": ["u", "v"]})
    inner: Any = {"type": "struct", "fields": [named("x", "string", "col-5", 5)]}
    fields = [named("t", "string", "col-1", 1), named("n", "long", "n", 2)]
    fields += [named("url", "string", "t", 3), named("more", inner, "col-4", 4)]
    _commit(
        place,
        0,
        _protocol("columnMapping"),
        _metadata(fields, **mapped),
        _add(place, "a.parquet", rows),
    )
    found = rows_of(input_of("delta", place, keep=("url",)))
    assert found == {(0, "text 0", "u"): 1, (1, "text 1", "v"): 1}
    assert found == own_rows(
        deltalake.DeltaTable(place).scan(columns=["n", "t", "url"]), "n", "t", "url"
    )
    with pytest.raises(InputError, match=r"column .more. of .* is nested, and the table maps"):
        planned(input_of("delta", place, keep=("more",)))


def test_what_cannot_be_read_rightly_is_refused(tmp_path: Path) -> None:
    fields = [_field("t", "string"), _field("n", "long")]
    place = tmp_path / "new"
    add = _add(place, "a.parquet", _table(0, 2))
    _commit(place, 0, _protocol("a feature of tomorrow"), _metadata(fields), add)
    with pytest.raises(InputError, match="a feature of tomorrow"):
        planned(input_of("delta", place))
    _commit(
        place,
        0,
        _protocol("columnMapping"),
        _metadata(fields, **{"delta.columnMapping.mode": "id"}),
        add,
    )
    with pytest.raises(InputError, match=r"input\.table: .*new"):
        planned(input_of("delta", place))


def test_a_file_that_is_gone_is_a_fault_of_its_shard(tmp_path: Path) -> None:
    place = tmp_path / "d"
    deltalake.write_deltalake(place, _table(0, 2))
    deltalake.write_deltalake(place, _table(2, 2), mode="append")
    gone = sorted(place.glob("*.parquet"))[0]
    gone.unlink()
    (fault,) = planned(input_of("delta", place)).faults
    assert fault[0] == str(gone)
    assert "changed after it was listed" in fault[1]


@pytest.mark.parametrize(
    ("uri", "version", "said"),
    [
        ("nowhere", None, "cannot be read as a delta table"),
        ("files", None, "cannot be read as a delta table"),
        ("d", 7, "version 7 cannot be read"),
        ("empty", None, "has no file in version 0"),
    ],
)
def test_what_is_not_there_is_named(
    tmp_path: Path, uri: str, version: int | None, said: str
) -> None:
    deltalake.write_deltalake(tmp_path / "d", _table(0, 2))
    deltalake.write_deltalake(tmp_path / "empty", _table(0, 0))
    write_shard(tmp_path / "files" / "a.parquet", _table(0, 2))
    with pytest.raises(InputError, match=said) as refused:
        planned(input_of("delta", tmp_path / uri, version=version))
    assert str(refused.value).startswith(f"input.table: {tmp_path / uri}")


def test_a_table_by_its_time(tmp_path: Path) -> None:
    deltalake.write_deltalake(tmp_path / "d", _table(0, 2))
    time = datetime.datetime.now(datetime.timezone.utc).isoformat()
    deltalake.write_deltalake(tmp_path / "d", _table(2, 2), mode="append")
    assert rows_of(input_of("delta", tmp_path / "d", version=time)).total() == 2


def test_an_output_inside_of_the_table_is_refused(tmp_path: Path) -> None:
    deltalake.write_deltalake(tmp_path / "d", _table(0, 2))
    listed = list_input(input_of("delta", tmp_path / "d"))
    with pytest.raises(InputError, match=r"output\.path"):
        check_apart(listed.place or "", str(tmp_path / "d" / "out"), listed.shards)


def test_a_table_is_one_input_in_all_its_versions() -> None:
    table = InputTable(format="iceberg", uri="db.docs", catalog="prod", version=3)
    assert table_name(table.model_dump()) == "iceberg table prod db.docs"
    with pytest.raises(ValueError, match="catalog: is for iceberg alone"):
        InputTable(format="delta", uri="u", catalog="c")
    for given in ({}, {"path": "p", "table": table}):
        with pytest.raises(ValueError, match="path: is required, or table in its place"):
            Input(text="t", **given)


def test_a_table_in_a_bucket(bucket: str, s3: S3Server, tmp_path: Path) -> None:
    place = f"{bucket}/tables/docs"
    options = {"AWS_ALLOW_HTTP": "true"}
    for first in (0, 5):
        table = _table(first, 5, p=["a b", "c", "a b", None, "c"])
        deltalake.write_deltalake(
            place, table, mode="append", partition_by=["p"], storage_options=options
        )
    deltalake.DeltaTable(place, storage_options=options).delete("n = 6")
    found = rows_of(input_of("delta", f"{place}/", keep=("p",)))
    own = deltalake.DeltaTable(place, storage_options=options).scan()
    assert found == own_rows(own, "n", "t", "p")
    assert found.total() == 9


def test_a_library_that_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "deltalake", None)
    with pytest.raises(ConfigError, match=r"needs deltalake; pip install 'embedjob\[lakehouse\]'"):
        planned(input_of("delta", tmp_path))


def test_the_table_may_be_read_through_int96_of_spark(tmp_path: Path) -> None:
    place = tmp_path / "d"
    moment = datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.timezone.utc)
    rows = pa.table({"t": ["a"], "n": [0], "at": pa.array([moment], pa.timestamp("us", "UTC"))})
    place.mkdir()
    pq.write_table(rows, place / "a.parquet", use_deprecated_int96_timestamps=True)
    fields = [_field("t", "string"), _field("n", "long"), _field("at", "timestamp")]
    protocol = {"protocol": {"minReaderVersion": 1, "minWriterVersion": 2}}
    _commit(place, 0, protocol, _metadata(fields), _add(place, "a.parquet", rows))
    assert rows_of(input_of("delta", place, keep=("at",))) == {(0, "a", moment): 1}
