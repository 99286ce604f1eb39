"""The table of readers in docs/outputs.md is what they do; see tests/readers.py."""

from pathlib import Path

import pytest

from tests.readers import DTYPES, LISTS, READERS, cell, documented, installed, write_files

# Those that everybody has who runs the tests; the others need `pip install 'embedjob[readers]'`.
QUICK = ("DuckDB", "Polars")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    return write_files(tmp_path_factory.mktemp("files"))


def _check(reader: str, files: dict[tuple[str, str], Path]) -> None:
    if installed(reader) is None:
        pytest.skip(f"{READERS[reader][0]} is not installed: pip install 'embedjob[readers]'")
    cells = [part.strip() for part in documented()[reader].strip("|").split("|")][1:]
    pairs = [(kind, dtype) for kind in LISTS for dtype in DTYPES]
    found = {pair: cell(reader, files[pair], pair[1]) for pair in pairs}
    assert found == dict(zip(pairs, cells, strict=True))


@pytest.mark.parametrize("reader", QUICK)
def test_a_reader_reads_what_the_table_says(
    reader: str, files: dict[tuple[str, str], Path]
) -> None:
    _check(reader, files)


@pytest.mark.slow
@pytest.mark.parametrize("reader", [name for name in READERS if name not in QUICK])
def test_every_reader_reads_what_the_table_says(
    reader: str, files: dict[tuple[str, str], Path]
) -> None:
    _check(reader, files)


def test_the_table_has_every_reader_once() -> None:
    assert [*documented()] == [*READERS]
