"""An input and an output that overlap are refused: embeddings would be embedded every night.

Covers: embedjob.input.listing
"""

from pathlib import Path

import pytest

from embedjob.errors import InputError
from embedjob.input.listing import check_apart, find_files
from tests.shards import write_shard


@pytest.mark.parametrize(
    ("pattern", "out"),
    [
        ("s3://corpus/docs/", "s3://corpus/docs/out"),
        ("s3://corpus/docs", "s3://corpus/docs"),
        ("s3://corpus", "s3://corpus/embeddings/docs/"),
        ("s3://corpus/*/", "s3://corpus/out"),
        ("s3://corpus/**/*.parquet", "s3://corpus/a/b/out"),
        ("s3://corpus/lang=*/docs", "s3://corpus/lang=en/docs/out"),
        ("s3a://corpus/docs/", "s3://corpus/docs/out"),
        ("/corpus/docs", "file:///corpus/docs/out"),
    ],
)
def test_an_output_that_the_input_would_list_is_refused(pattern: str, out: str) -> None:
    with pytest.raises(InputError, match="would be embedded every night"):
        check_apart(pattern, out)
    with pytest.raises(InputError):
        check_apart(["s3://elsewhere/", pattern], out)


@pytest.mark.parametrize(
    ("pattern", "out"),
    [
        ("s3://corpus/docs/", "s3://corpus/docs-embeddings"),
        ("s3://corpus/docs/", "s3://corpus-embeddings/docs"),
        ("s3://corpus/docs/a.parquet", "s3://corpus/docs/out"),
        ("s3://corpus/docs/*.parquet", "s3://corpus/docs/out"),
        # Names that begin with . or _ are left out of every input.
        ("s3://corpus/docs/", "s3://corpus/docs/_embeddings"),
        ("/corpus/docs", "/corpus/out"),
    ],
)
def test_neighbours_are_not(pattern: str, out: str) -> None:
    check_apart(pattern, out)


def test_an_input_inside_the_output_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "out" / "data" / "a.parquet", {"t": ["a"]})
    inside = str(tmp_path / "out" / "data")
    with pytest.raises(InputError, match=r"a\.parquet lies in it"):
        check_apart(inside, str(tmp_path / "out"), find_files(inside).shards)


def test_a_link_hides_no_overlap(tmp_path: Path) -> None:
    (tmp_path / "in" / "out").mkdir(parents=True)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "in")
    with pytest.raises(InputError):
        check_apart(str(tmp_path / "elsewhere"), str(tmp_path / "in" / "out"))
