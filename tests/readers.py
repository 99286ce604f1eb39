"""Which readers read which vectors: the table of docs/outputs.md, made by reading real files.

`python -m tests.readers` reads with every library that is installed, and writes the table. Each
reader runs in a process of its own: several of them would not share one.
"""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embedjob.config.job import Input
from embedjob.input.reading import read_chunk
from embedjob.output.committing import commit
from embedjob.output.file_names import data_directory
from embedjob.storage.objects import list_files
from tests.shards import FINGERPRINT, WIDTH, finished, output_spec, plan_of, write_shard

DOCUMENT = Path(__file__).parents[1] / "docs" / "outputs.md"
LISTS = ("fixed", "variable")
DTYPES = ("float32", "float16", "int8")
ROWS = 20
_SECONDS = 240


def _duckdb(path: str) -> Any:
    import duckdb

    kind = duckdb.sql(f"DESCRIBE SELECT embedding FROM read_parquet('{path}')").fetchall()[0][1]
    rows = duckdb.sql(f"SELECT embedding FROM read_parquet('{path}') ORDER BY row").fetchall()
    return kind, [row[0] for row in rows]


def _polars(path: str) -> Any:
    import polars

    column = polars.scan_parquet(path).select("embedding").collect()["embedding"]
    return str(column.dtype), column.to_list()


def _pandas(path: str) -> Any:
    import pandas

    column = pandas.read_parquet(path)["embedding"]
    return f"{column[0].dtype} arrays", [one.tolist() for one in column]


def _lancedb(path: str) -> Any:
    import lancedb
    import pyarrow.dataset as ds

    documents = ds.dataset([path])
    with tempfile.TemporaryDirectory() as folder:
        table = lancedb.connect(folder).create_table("d", documents.to_batches(), documents.schema)
        rows = table.to_arrow()
        vectors = rows["embedding"].to_pylist()
        # As LanceDB is used: a search by the vector of the last row, which is unlike all others.
        query = np.asarray(vectors[-1], np.float32)
        found = table.search(query, vector_column_name="embedding").limit(1).to_list()[0]
        assert found["row"] == rows["row"].to_pylist()[-1], "another row is nearest"
        return str(rows.schema.field("embedding").type), vectors


def _spark(path: str) -> Any:
    from pyspark.sql import SparkSession

    options = {"spark.ui.enabled": "false", "spark.driver.host": "127.0.0.1"}
    builder = SparkSession.builder.master("local[1]")
    for name, value in options.items():
        builder = builder.config(name, value)
    spark = builder.getOrCreate()
    frame = spark.read.parquet(path).select("embedding")
    return frame.schema["embedding"].dataType.simpleString(), [row[0] for row in frame.collect()]


def _clickhouse(path: str) -> Any:
    import chdb

    asked = f"SELECT toTypeName(embedding) k, embedding FROM file('{path}', Parquet) ORDER BY row"
    rows = [json.loads(line) for line in str(chdb.query(asked, "JSONEachRow")).splitlines()]
    return rows[0]["k"], [row["embedding"] for row in rows]


def _deltalake(path: str) -> Any:
    import deltalake
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as folder:
        deltalake.write_deltalake(folder, pq.read_table(path, columns=["row", "embedding"]))
        table = deltalake.DeltaTable(folder)
        rows = pa.table(table.scan()).sort_by("row")
        (field,) = (field for field in table.schema().fields if field.name == "embedding")
        return f"array of {field.type.element_type.type}", rows["embedding"].to_pylist()


def _datasets(path: str) -> Any:
    import datasets

    with tempfile.TemporaryDirectory() as folder:
        rows = datasets.Dataset.from_parquet(path, cache_dir=folder)
        feature = rows.features["embedding"]
        length = getattr(feature, "length", -1)
        kind = f"List({feature.feature.dtype}{'' if length < 0 else f', {length}'})"
        return kind, [row["embedding"] for row in rows]


def _faiss(path: str) -> Any:
    import faiss
    import pyarrow.parquet as pq

    # It reads no files: a matrix of float32, through Arrow, is what it takes.
    column = pq.read_table(path)["embedding"]
    vectors = np.stack(column.to_numpy()).astype(np.float32)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return "float32 matrix", index.reconstruct_n(0, index.ntotal).tolist()


# By the name in the table: the distribution, and how a file's vectors are read.
READERS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "DuckDB": ("duckdb", _duckdb),
    "Polars": ("polars", _polars),
    "pandas": ("pandas", _pandas),
    "LanceDB": ("lancedb", _lancedb),
    "Spark": ("pyspark", _spark),
    "ClickHouse (chdb)": ("chdb", _clickhouse),
    "deltalake": ("deltalake", _deltalake),
    "datasets": ("datasets", _datasets),
    "faiss": ("faiss-cpu", _faiss),
}


def installed(reader: str) -> str | None:
    """The version of a reader's library; None where it, or what it runs on, is not installed."""
    if reader == "Spark" and shutil.which("java") is None:
        return None
    try:
        return importlib.metadata.version(READERS[reader][0])
    except importlib.metadata.PackageNotFoundError:
        return None


def write_files(folder: Path) -> dict[tuple[str, str], Path]:
    """A file as WRITE puts it, for each kind of list and each type of numbers."""
    write_shard(folder / "in.parquet", {"t": [f"text {row}" for row in range(ROWS)]})
    job_input = Input(path=f"{folder}/in.parquet", text="t")
    plan = plan_of(job_input, chunk_rows=ROWS)
    (chunk,) = plan.chunks
    rows = finished(read_chunk(chunk, job_input))
    values = matrix()
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), WIDTH)
    place = rows.column_names.index("embedding")
    files = {}
    for kind in LISTS:
        for dtype in DTYPES:
            spec = output_spec(job_input, plan.types, vector_dtype=dtype, finish=())
            spec = replace(spec, vector_list=kind)
            if dtype == "int8":
                spec = replace(spec, quantize=_codes)
            out = f"{folder}/{kind}-{dtype}"
            table = rows.set_column(place, "embedding", embedding)
            commit(out, chunk, table, rows_in=ROWS, spec=spec)
            (file,) = list_files(data_directory(out, FINGERPRINT))
            files[kind, dtype] = Path(file.url)
    return files


def matrix() -> np.ndarray:
    """Vectors that float16 and, times 64, int8 hold exactly; the last one is unlike all others."""
    values = np.arange(ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH) % 64 / 64
    values[-1] = [-1, -1, 1, -1]
    return values


def _codes(vectors: np.ndarray) -> np.ndarray:
    codes: np.ndarray = (vectors * 64).astype(np.int8)
    return codes


def cell(reader: str, path: Path, dtype: str) -> str:
    """What a reader makes of a file: `yes` and as which type, or `no`; why goes to stderr."""
    command = [sys.executable, "-m", "tests.readers", reader, str(path)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    if done.returncode:
        sys.stderr.write(f"{reader}, {path}: {done.stderr[-2000:]}\n")
        return "no"
    kind, vectors = json.loads(done.stdout.splitlines()[-1])
    expected = _codes(matrix()) if dtype == "int8" else matrix()
    if not np.array_equal(np.asarray(vectors, np.float32), expected.astype(np.float32)):
        sys.stderr.write(f"{reader}, {path}: other values, as {kind}\n")
        return "no"
    return f"yes: {kind}"


def rows_of_table(files: Mapping[tuple[str, str], Path]) -> Iterator[tuple[str, str]]:
    """Each installed reader's line of the table."""
    for reader in READERS:
        if version := installed(reader):
            cells = [cell(reader, files[kind, dtype], dtype) for kind in LISTS for dtype in DTYPES]
            yield reader, f"| {reader} {version} | {' | '.join(cells)} |"


def documented() -> dict[str, str]:
    """The lines of the table as the document has them, by reader."""
    text = DOCUMENT.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    known = {reader: f"| {reader} " for reader in READERS}
    return {
        reader: line for reader, start in known.items() for line in lines if line.startswith(start)
    }


def _main(arguments: list[str]) -> None:
    if len(arguments) == 2:
        sys.stdout.write(f"\n{json.dumps(READERS[arguments[0]][1](arguments[1]), default=float)}\n")
        return
    text = DOCUMENT.read_text(encoding="utf-8")
    before = documented()
    with tempfile.TemporaryDirectory() as folder:
        for reader, line in rows_of_table(write_files(Path(folder))):
            sys.stdout.write(f"{line}\n")
            text = text.replace(before[reader], line)
    DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    _main(sys.argv[1:])
