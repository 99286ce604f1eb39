"""Which files an input names, and which columns their directories are.

Covers: embedjob.input.listing
"""

from pathlib import Path

import pytest

from embedjob.errors import InputError
from embedjob.input.listing import find_shards, partitions, shards_of
from embedjob.storage.objects import Stored, create


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def _names(folder: Path, *patterns: str) -> list[str]:
    found = find_shards([f"{folder}/{pattern}" for pattern in patterns])
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
        find_shards([f"{tmp_path}/data", f"{tmp_path}/{missing}"])


def test_hive_directories_are_columns() -> None:
    url = "s3://b/docs=1/lang=en/lang=de/day=__HIVE_DEFAULT_PARTITION__/q=a%2Fb=c/x=y.parquet"
    expected = {"docs": "1", "lang": "de", "day": None, "q": "a/b=c"}
    assert dict(partitions(url)) == expected
    (shard,) = shards_of({"s3://b": [Stored(url, 1, "e")]})
    assert dict(shard.partitions) == expected


def test_shards_of_a_bucket(bucket: str) -> None:
    for name in ("docs/k=v/a.parquet", "docs/_x.parquet", "docs/b.txt"):
        create(f"{bucket}/{name}", b"x")
    (shard,) = find_shards(f"{bucket}/docs")
    assert shard.url == f"{bucket}/docs/k=v/a.parquet"
    assert shard.partitions == (("k", "v"),)
