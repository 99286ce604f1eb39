import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from embedjob.errors import OutputError
from embedjob.output.file_names import chunk_name, parse_name, shard_name, with_generation

# Any path that a file system or a bucket can hold, bytes that are no UTF-8 included.
URLS = st.text(st.characters(exclude_characters="\0"), max_size=300) | st.lists(
    st.sampled_from(["..", ".", "", "a", "ü", "s3:", "part-0.parquet", "k=v", " ", "\udc80"])
).map("/".join)
ROWS = st.integers(0, 2**32)
VERSION = "0123456789abcdef"


@given(URLS, ROWS, ROWS)
@example("s3://b/" + "x/" * 5000 + "../../etc/passwd", 0, 1)
@example("/", 0, 1)
@example("/in/..", 0, 1)
def test_a_name_is_one_harmless_path_part_and_parses_back(url: str, start: int, stop: int) -> None:
    name = chunk_name(url, VERSION, start, stop)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.parquet", name)
    assert ".." not in name
    assert len(name) < 160
    assert tuple(parse_name(name)) == (shard_name(url), VERSION, start, stop, 0)
    again = parse_name(with_generation(name, 12))
    assert (again.generation, again.chunk, parse_name(name).chunk) == (12, name, name)


@given(st.lists(st.tuples(URLS, ROWS, ROWS), unique=True))
def test_names_are_injective(keys: list[tuple[str, int, int]]) -> None:
    names = {chunk_name(url, VERSION, start, stop).lower() for url, start, stop in keys}
    assert len(names) == len(keys)


def test_a_name_is_readable() -> None:
    name = chunk_name("s3://corpus/docs/lang=en/part-7.parquet", VERSION, 0, 16384)
    assert name.startswith("lang_en_part_7-")
    assert name.endswith(f"-{VERSION}-0000000000-0000016384.parquet")


def test_names_sort_as_rows_do() -> None:
    names = [chunk_name("a.parquet", VERSION, start, start + 1) for start in (9, 10, 99, 100)]
    assert names == sorted(names)


@pytest.mark.parametrize("name", ["x.parquet", "../a-b-c-1-2.parquet", "a" * 200])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(OutputError, match="not the name of an embedding file"):
        parse_name(name)
