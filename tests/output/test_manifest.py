"""The list of a snapshot's files in Parquet: equal when read again, small, and safe to open."""

import base64
import hashlib
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import duckdb
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedjob.errors import OutputError
from embedjob.input.footers import Wanted
from embedjob.output import manifest
from embedjob.output.manifest import FileList, Footers, SnapshotFile, remembered
from embedjob.output.snapshot import (
    Snapshot,
    newest_snapshot,
    open_snapshot,
    publish,
    read_snapshot,
)
from tests.output.epochs import commit_left, small_corpus
from tests.shards import FINGERPRINT


def _file(number: int, **changes: Any) -> SnapshotFile:
    shard, part = divmod(number, 10)
    made = hashlib.md5(f"{shard}".encode()).hexdigest()
    name = f"part-{shard:05d}".replace("-", "_") + f"-{made[:16]}-{made[16:]}"
    start, stop = part * 16384, (part + 1) * 16384
    values: dict[str, Any] = {
        "path": f"data/{FINGERPRINT[:12]}/{name}-{start:010d}-{stop:010d}.parquet",
        "rows": 16384,
        "bytes": 30_000_000 + 7919 * number % 999_983,
        "etag": hashlib.md5(f"etag {number}".encode()).hexdigest(),
        "shard": f"s3://corpus/docs/part-{shard:05d}.parquet",
        "shard_etag": made,
        "start": start,
        "stop": stop,
        "counts": {"rows": 16384, "embedded": 16384 - number % 97, "deduplicated": number % 97},
    }
    return SnapshotFile(**{**values, **changes})


def _snapshot(count: int, **changes: Any) -> Snapshot:
    files = FileList.of(_file(number, **changes) for number in range(count))
    shards = tuple(
        {"url": f"s3://corpus/docs/part-{i:05d}.parquet", "etag": "e", "rows": 9, "complete": True}
        for i in range(-(-count // 10))
    )
    return Snapshot(epoch=3, fingerprint=FINGERPRINT, files=files, shards=shards, input=("in/",))


@pytest.mark.parametrize("part_rows", [7, 1_000])
def test_a_list_comes_back_equal_from_any_number_of_parts(
    part_rows: int, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "PART_ROWS", part_rows)
    snapshot = _snapshot(25)
    publish(out, snapshot)
    found = read_snapshot(out, 3)
    assert found == snapshot
    assert [*found.files] == [_file(number) for number in range(25)]
    assert found.files[-1] == _file(24)
    assert [*found.files[3:5]] == [_file(3), _file(4)]
    assert found.files.counts["deduplicated"] == sum(range(25))


def test_the_files_of_some_shards_are_found_and_odd_names_do_no_harm() -> None:
    files = _snapshot(25).files
    wanted = {"s3://corpus/docs/part-00001.parquet", "never seen", "not \udcff UTF-8"}
    assert [*files.of_shards(wanted)] == [_file(number) for number in range(10, 20)]
    assert [*files.of_shards(set())] == []


def test_a_file_costs_little_in_storage(out: str) -> None:
    """60 MB for a million: digests are random, and all else is like its neighbours."""
    publish(out, _snapshot(20_000))
    parts = Path(out, "snapshots", "00000003").glob("*.parquet")
    assert sum(part.stat().st_size for part in parts) < 20_000 * 60
    assert Path(out, "snapshots", "00000003.json").stat().st_size < 2_000


def test_other_libraries_read_it_in_one_line(out: str) -> None:
    publish(out, _snapshot(25))
    parts = f"{out}/snapshots/00000003/files-*.parquet"
    paths = [_file(number).path for number in range(25)]
    found = duckdb.sql(f"SELECT path, counts.rows FROM '{parts}'").fetchall()
    assert found == [(path, 16384) for path in paths]
    assert polars.read_parquet(parts)["path"].to_list() == paths


def test_the_list_of_an_earlier_release_is_read(tmp_path: Path, out: str) -> None:
    """It held the entries in the JSON itself, and the paths of bad rows beside them."""
    _, snapshot = commit_left(small_corpus(tmp_path), out, epoch=1)
    document = {
        "token": "t",
        "format_version": 1,
        "epoch": 1,
        "fingerprint": snapshot.fingerprint,
        "created": snapshot.created,
        "limit": None,
        "files": [asdict(file) for file in snapshot.files],
        "shards": [*snapshot.shards],
        "faults": [],
        "quarantine": [*snapshot.quarantine],
        "counts": snapshot.counts,
    }
    path = Path(out, "snapshots", "00000001.json")
    path.parent.mkdir()
    path.write_text(json.dumps(document))
    found = newest_snapshot(out)
    assert found is not None
    assert (found.files, found.shards) == (snapshot.files, snapshot.shards)
    assert (found.input, found.projection, found.quarantine) == (None, None, snapshot.quarantine)
    assert open_snapshot(out).count_rows() == 48


@pytest.mark.parametrize(
    "path",
    [
        "../elsewhere/secret.parquet",
        "/etc/passwd",
        "data/../../x.parquet",
        f"data/{FINGERPRINT[:12]}/../../x.parquet",
        "s3://other/data/x.parquet",
        f"runs/{FINGERPRINT[:12]}/a-0123456789abcdef-0123456789abcdef-0000000000-0000000010.parquet",
    ],
)
def test_a_list_that_leads_out_of_the_output_is_refused(path: str, out: str) -> None:
    publish(out, _snapshot(3, path=path))
    with pytest.raises(OutputError, match="not a place of embeddings"):
        newest_snapshot(out)


def test_a_part_is_looked_for_in_its_own_folder_alone(out: str) -> None:
    publish(out, _snapshot(3))
    head = Path(out, "snapshots", "00000003.json")
    document = json.loads(head.read_text())
    document["parts"][0]["name"] = "../../../elsewhere.parquet"
    head.write_text(json.dumps(document))
    Path(out).with_name("elsewhere.parquet").write_bytes(b"PAR1")
    with pytest.raises(OutputError, match=r"parts\[0\]\.name is .*elsewhere"):
        newest_snapshot(out)


def test_a_damaged_part_is_named(out: str) -> None:
    publish(out, _snapshot(30))
    part = Path(out, "snapshots", "00000003", "files-00000.parquet")
    whole = part.read_bytes()
    for broken in (whole[:-1], whole[:20] + bytes([whole[20] ^ 255]) + whole[21:], b""):
        part.write_bytes(broken)
        with pytest.raises(OutputError, match=r"files-00000\.parquet: is not a whole Parquet file"):
            newest_snapshot(out)
    part.unlink()
    with pytest.raises(OutputError, match="is missing; its snapshot cannot be read"):
        newest_snapshot(out)


def test_a_part_with_gaps_is_named(out: str) -> None:
    publish(out, _snapshot(30))
    part = Path(out, "snapshots", "00000003", "files-00000.parquet")
    table = pq.read_table(part)
    gap = pa.array([None, *table["start"].to_pylist()[1:]], pa.int64())
    pq.write_table(table.set_column(table.column_names.index("start"), "start", gap), part)
    with pytest.raises(OutputError, match="has no value in some start"):
        newest_snapshot(out)


def test_damaged_schemas_of_footers_are_named(out: str) -> None:
    publish(out, _snapshot(3))
    head = Path(out, "snapshots", "00000003.json")
    document = json.loads(head.read_text())
    schema = pa.schema([("a", pa.int64()), ("text", pa.large_string())]).serialize().to_pybytes()
    random = Random(3)
    for _ in range(300):
        damaged = bytearray(schema)
        damaged[random.randrange(len(damaged))] = random.randrange(256)
        coded = base64.b64encode(damaged[: random.choice([None, 40, len(damaged) - 1])]).decode()
        wanted = {"text": ["text"], "needed": ["text"], "filter": []}
        head.write_text(json.dumps({**document, "footers": {"wanted": wanted, "schemas": [coded]}}))
        with suppress(OutputError):
            newest_snapshot(out)


@pytest.mark.parametrize(
    "changes",
    [
        {"group_rows": [None]},
        {"group_text_bytes": []},
        {"group_rows": [-9]},
        {"footer_bytes": None},
        {"schema": 1},
        {"schema": -1},
    ],
)
def test_a_footer_with_gaps_is_read_from_its_shard(changes: dict[str, Any]) -> None:
    wanted = Wanted(("t",), ("t",))
    footers = Footers(wanted, (pa.schema([("t", pa.string())]),))
    shard = {"url": "u", "etag": "e", "group_rows": [9], "group_text_bytes": [99]}
    shard |= {"footer_bytes": 500, "schema": 0}
    assert list(remembered([shard], footers, wanted)) == [("u", "e")]
    changed = {key: value for key, value in {**shard, **changes}.items() if value is not None}
    assert remembered([changed], footers, wanted) == {}


def test_a_shorter_part_is_named(out: str) -> None:
    publish(out, _snapshot(30))
    head = Path(out, "snapshots", "00000003.json")
    head.write_text(head.read_text().replace('"rows": 30', '"rows": 31'))
    with pytest.raises(OutputError, match="has 30 rows, its snapshot says 31"):
        newest_snapshot(out)
