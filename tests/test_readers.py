"""docs/outputs.md is what readers find: its table of readers (tests/readers.py), its passages."""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedjob.config.job import Input
from embedjob.config.recipe import Recipe, Split
from embedjob.input.reading import read_chunk
from embedjob.output.committing import commit
from embedjob.output.file_names import data_directory
from embedjob.stages.tokenize import tokenize_rows
from embedjob.storage.objects import list_files
from embedjob.text.tokenizing import ViewTokenizer
from tests.fakes import tiny_tokenizer
from tests.readers import DOCUMENT, DTYPES, LISTS, READERS, cell, documented, installed, write_files
from tests.shards import FINGERPRINT, WIDTH, only, output_spec, plan_of, write_shard

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


# Letters of several characters, characters of several bytes, blanks at ends, and no text at all.
BODIES = (
    "Nai\u0308ve cafe\u0301 owners said so. Is it near the river bank? " * 6,
    "\U0001f600\u200d\U0001f600 Yes! \u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3002 " * 9,
    "  one short text \n",
    None,
    "",
)


@pytest.fixture
def passages(tmp_path: Path) -> Path:
    """The one file of an output of passages, beside the corpus that it was made of."""
    columns = {"doc_id": [f"d{row}" for row in range(len(BODIES))], "body": BODIES}
    write_shard(tmp_path / "corpus" / "a.parquet", columns)
    job_input = Input(path=f"{tmp_path}/corpus", text="body", id="doc_id", on_bad_row="null")
    made = plan_of(job_input)
    chunk = only(made.chunks)
    recipe = {"long_text": "split", "split": Split(max_tokens=40), "max_tokens": 64}
    tokenizer = ViewTokenizer(tiny_tokenizer("llama"), Recipe(model="m", **recipe))
    lines, _ = tokenize_rows(read_chunk(chunk, job_input), tokenizer, "split")
    vectors = [None if reason else [1.0, 0, 0, 0] for reason in lines["reason"].to_pylist()]
    kind = pa.list_(pa.float32(), WIDTH)
    spec = output_spec(job_input, made.types, **recipe)
    table = lines.drop_columns(["unique"]).append_column("embedding", pa.array(vectors, kind))
    commit(f"{tmp_path}/out", chunk, table, rows_in=len(BODIES), spec=spec)
    (file,) = list_files(data_directory(f"{tmp_path}/out", FINGERPRINT))
    return Path(file.url)


def test_passages_are_where_the_page_says(
    passages: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    section = DOCUMENT.read_text(encoding="utf-8").split("\n## Passages\n", 1)[1]
    shown = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, re.MULTILINE)
    schema = pq.read_schema(passages)
    assert [(name, str(schema.field(name).type)) for name, _ in shown] == shown
    others = {"shard", "id", "embedding"}
    assert {*schema.names} == {name for name, _ in shown} | others
    (program,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"files": [str(passages)]}
    exec(program, names)
    found = names["passages"]
    assert len(found) == pq.read_metadata(passages).num_rows - 1 > 10
    for row, body in enumerate(BODIES):
        own = [passage for id, _, _, passage in found if id == f"d{row}"]
        assert "".join(own) == (body or "")
