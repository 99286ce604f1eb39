"""`A table` in docs/operations.md, as it stands there, and corpora of lines, as runs on Ray."""

import gzip
import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from embedjob.output.snapshot import newest_snapshot, open_snapshot
from tests import running
from tests.cluster import Cluster
from tests.connection import NOWHERE

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parent.parent
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def _blocks(title: str) -> list[tuple[str, str]]:
    section = OPERATIONS.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)


@pytest.mark.slow
def test_a_table_as_the_document_has_it(
    cluster: Cluster, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deltalake", reason="pip install 'embedjob[lakehouse]'")
    monkeypatch.chdir(tmp_path)
    kinds = [kind for kind, _ in _blocks("A table")]
    assert kinds == ["python", "yaml", "sh", "python", "sh"]
    names: dict[str, object] = {}
    summaries = []
    for kind, block in _blocks("A table"):
        if kind == "python":
            exec(block, names)
        elif kind == "yaml":
            job = yaml.safe_load(block)
            # A model of the tests in place of a package's, so that nobody has to have it.
            job["encoder"] = {"model": str(model)}
            (tmp_path / "table.yaml").write_text(yaml.safe_dump(job))
        for line in block.splitlines() if kind == "sh" else ():
            program, *arguments = line.split("#")[0].split()
            assert program == "embedjob"
            more = ("--json", "--address", cluster.address) if arguments[0] == "run" else ()
            ran = running.command(*arguments, *more)
            assert ran.code == 0, ran.err
            summaries += [ran.summary] if arguments[0] == "run" else []
    assert summaries[0]["embedded"] == 3
    # The delete rewrote the file of `a` without it; the night did not touch `b`.
    assert summaries[1]["chunks_done_before"] == 1
    assert (summaries[1]["embedded"], summaries[1]["reused"]) == (1, 1)
    found = open_snapshot("outputs/docs-table").to_table().select(["id", "lang"]).to_pylist()
    assert sorted((row["id"], row["lang"]) for row in found) == [
        *(("b", "de"), ("c", "en"), ("d", "de")),
    ]
    snapshot = newest_snapshot("outputs/docs-table")
    assert snapshot is not None
    assert snapshot.input == ("delta table ./docs-table",)
    assert snapshot.input_version == "2"
    # Another table is another input.
    shutil.copytree("docs-table", "other")
    other = ("--set", "input.table.uri=./other", "--address", NOWHERE)
    ran = running.command("run", "table.yaml", *other)
    said = "got delta table ./other, but this output holds the corpus of delta table ./docs-table"
    assert (ran.code, said in " ".join(ran.err.split())) == (2, True), ran.err


@pytest.mark.slow
def test_lines_give_the_embeddings_of_parquet(
    cluster: Cluster, model: Path, tmp_path: Path
) -> None:
    bodies = running.texts(60)
    running.write_shard(tmp_path / "parquet" / "a.parquet", bodies)
    rows = [{"doc_id": f"a-{i}", "body": body} for i, body in enumerate(bodies)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "a.jsonl").write_text(text[: text.index('{"doc_id": "a-25"')])
    rest = text[text.index('{"doc_id": "a-25"') :].encode()
    (tmp_path / "lines" / "b.jsonl.gz").write_bytes(gzip.compress(rest))
    found = {}
    for kind in ("parquet", "lines"):
        out = tmp_path / f"out-{kind}"
        document = running.job(tmp_path / kind, out, model)
        ran = running.run(document, tmp_path, "--address", cluster.address)
        assert ran.code == 0, ran.err
        assert ran.summary["rows"] == 60
        found[kind] = open_snapshot(str(out)).to_table().sort_by("id")
        assert running.command("verify", str(out)).code == 0
    for name in ("id", "embedding", "text_hash", "tokens"):
        assert found["lines"][name].combine_chunks().equals(found["parquet"][name].combine_chunks())


@pytest.mark.slow
def test_a_run_with_lists_of_variable_length(cluster: Cluster, model: Path, tmp_path: Path) -> None:
    source = running.write_shard(tmp_path / "in" / "a.parquet", ["one", None, "two"])
    more = {"output": {"vector_list": "variable"}, "input": {"on_bad_row": "null"}}
    document = running.job(source, tmp_path / "out", model, **more)
    ran = running.run(document, tmp_path, "--address", cluster.address)
    assert ran.code == 0, ran.err
    (file,) = (tmp_path / "out" / "data").rglob("*.parquet")
    column = pq.read_table(file)["embedding"]
    assert pa.types.is_list(column.type)
    assert column.is_valid().to_pylist() == [True, False, True]
    assert running.command("verify", str(tmp_path / "out")).code == 0
