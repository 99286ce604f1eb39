"""Which files an input names, and which columns their directories are.

Covers: embedjob.input.listing
"""

import os
from pathlib import Path

import numpy as np
import pytest

from embedjob.config.job import Input
from embedjob.errors import InputError
from embedjob.input.listing import (
    described_unread,
    find_files,
    partitions,
    shards_of,
)
from embedjob.input.reading import read_chunk
from embedjob.output.chunk_file import data_table
from embedjob.output.manifest import FileList, SnapshotFile
from embedjob.storage.objects import Stored, create
from tests.shards import WIDTH, finished, footers_of, output_spec, plan_of, write_shard


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def _names(folder: Path, *patterns: str) -> list[str]:
    found = find_files([f"{folder}/{pattern}" for pattern in patterns]).shards
    return [shard.url.removeprefix(f"{folder}/") for shard in found]


def test_a_directory_gives_its_parquet_files_only(tmp_path: Path) -> None:
    _touch(tmp_path, "b.parquet", "sub/a.PQ", "c.parq", "README.md", "_SUCCESS", ".d.parquet")
    _touch(tmp_path, "_temporary/e.parquet")
    assert _names(tmp_path, "") == ["b.parquet", "c.parq", "sub/a.PQ"]


def test_a_file_or_a_glob_gives_what_it_names(tmp_path: Path) -> None:
    _touch(tmp_path, "part-0", "part-1", "other", "sub/part-2", "sub/x.parquet", "sub/x.txt")
    assert _names(tmp_path, "part-0") == ["part-0"]
    assert _names(tmp_path, "part-*") == ["part-0", "part-1"]
    assert _names(tmp_path, "s*") == ["sub/x.parquet"]
    assert _names(tmp_path, "*") == ["sub/x.parquet"]


def test_overlapping_patterns_give_each_file_once(tmp_path: Path) -> None:
    _touch(tmp_path, "a.parquet", "b.parquet")
    assert _names(tmp_path, "b.parquet", "", "*.parquet") == ["a.parquet", "b.parquet"]


@pytest.mark.parametrize("missing", ["nothing-here", "empty", "*.parquet"])
def test_a_pattern_that_finds_nothing_is_named(tmp_path: Path, missing: str) -> None:
    _touch(tmp_path, "data/a.parquet", "empty/README.md")
    with pytest.raises(InputError, match=r"no Parquet file at .*looked for"):
        find_files([f"{tmp_path}/data", f"{tmp_path}/{missing}"])


def test_hive_directories_are_columns() -> None:
    url = "s3://b/docs=1/lang=en/lang=de/day=__HIVE_DEFAULT_PARTITION__/q=a%2Fb=c/x=y.parquet"
    expected = {"docs": "1", "lang": "de", "day": None, "q": "a/b=c"}
    assert dict(partitions(url)) == expected
    (shard,) = shards_of({"s3://b": [Stored(url, 1, "e")]})
    assert dict(shard.partitions) == expected


def test_shards_of_a_bucket(bucket: str) -> None:
    for name in ("docs/k=v/a.parquet", "docs/_x.parquet", "docs/b.txt"):
        create(f"{bucket}/{name}", b"x")
    (shard,) = find_files(f"{bucket}/docs").shards
    assert shard.url == f"{bucket}/docs/k=v/a.parquet"
    assert shard.partitions == (("k", "v"),)


def test_what_is_listed_and_not_read_is_counted_and_said(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", {"t": ["a"]})
    whole = (tmp_path / "a.parquet").read_bytes()
    for name in ("b.parquet.gzip", "c.snappy", "part-0"):
        (tmp_path / name).write_bytes(whole)
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".hidden").write_text("a tool's own")
    found = find_files(str(tmp_path))
    assert [shard.url for shard in found.shards] == [f"{tmp_path}/a.parquet"]
    assert len(found.unread) == 4
    said = described_unread(found.unread)
    assert said.startswith(f"4 files beside the shards, such as {tmp_path}/b.parquet.gzip (Parquet")
    assert described_unread(()) == ""


@pytest.mark.parametrize("pattern", ["", "*.parquet", "*/x.parquet", "**/*.parquet", "x.parquet"])
def test_a_link_that_leads_nowhere_is_a_fault(tmp_path: Path, pattern: str) -> None:
    write_shard(tmp_path / "a" / "x.parquet", {"t": ["a"]})
    (tmp_path / "x.parquet").symlink_to("/nowhere/x.parquet")
    (tmp_path / "volume").symlink_to("/nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "_tools").symlink_to("/nowhere")
    shards = find_files(f"{tmp_path}/{pattern}".rstrip("/")).shards
    named = {shard.url: shard for shard in shards}
    assert f"{tmp_path}/_tools" not in named
    lost = {"x.parquet"} if pattern in ("*.parquet", "x.parquet") else {"volume", "loop"}
    for name in lost:
        footers = footers_of([named[f"{tmp_path}/{name}"]], Input(path="p", text="t"))
        assert "a link that leads nowhere" in str(footers[f"{tmp_path}/{name}"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"/annex/objects/SHA256E-s1--a.parquet\n", "a git-annex pointer"),
        (b"<!doctype html><title>404", "an HTML page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied', "an XML document"),
        (b"ARROW1\x00\x00" + b"x" * 20, "an Arrow IPC file"),
        (b"ORC" + b"x" * 20, "an ORC file"),
        (b"\x1f\x8b\x08" + b"x" * 20, "compressed as a whole by gzip"),
        (b"PAR1" + b"x" * 50, "the beginning of a Parquet file"),
        (b"PK\x03\x04" + b"x" * 50, "a ZIP archive"),
        (b'{"text": "a"}\n', "JSON"),
        (b"id,text\n1,a\n", "text, such as CSV"),
        (b"\x00" * 600, "zeros only"),
        (b"", "empty"),
        (b"\x01\x02\xfe", "no file of a known kind"),
    ],
)
def test_what_a_file_is_that_is_no_parquet(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    reason = footers_of(find_files(str(path)).shards, Input(path="p", text="t"))[str(path)]
    assert f"it is {said}" in str(reason)


@pytest.mark.parametrize("name", [b"caf\xe9.parquet", b"\xff/\xfe=\xfd/a.parquet"])
def test_a_name_that_is_not_utf8_has_one_spelling(tmp_path: Path, name: bytes) -> None:
    write_shard(tmp_path / "whole.parquet", {"t": ["a"]})
    path = os.fsencode(tmp_path) + b"/in/" + name
    os.makedirs(os.path.dirname(path))
    os.rename(tmp_path / "whole.parquet", path)
    job_input = Input(path=str(tmp_path / "in"), text="t")
    plan = plan_of(job_input)
    (shard,) = plan.shards
    shard.url.encode()
    assert os.fsencode(shard.stored.url) == path
    table = read_chunk(plan.chunks[0], job_input)
    assert table.column("text").to_pylist() == ["a"]
    files = FileList.of([SnapshotFile("data/x", 1, 1, "e", shard.url, "e", 0, 1, {"rows": 1})])
    made = data_table(
        finished(table), np.eye(1, WIDTH, dtype=np.float32), shard, spec=output_spec(job_input, {})
    )
    # What `verify` compares.
    assert made.column("shard").to_pylist() == [files[0].shard] == [shard.url]
