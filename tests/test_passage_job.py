"""Whole jobs whose documents become passages: real Ray, real Parquet, and `verify` at the end.

The section "Passages, and an edit" of docs/operations.md runs here as it stands there.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from tokenizers import Tokenizer

import embedjob
from embedjob.encoder.encoder import Encoder
from embedjob.job.options import Options
from embedjob.output.claim import read_claims
from embedjob.text.conversations import text_hash
from tests import running
from tests.cluster import Cluster
from tests.connection import NOWHERE
from tests.engines import MARKER, MARKER_TOKEN, counting, failing, texts_encoded
from tests.fakes import SENTENCES
from tests.outputs import published
from tests.running import Job, write_shard

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parent.parent
TITLE = "The river bank"


def documents(count: int, sentences: int = 9) -> list[str]:
    """Different documents of some sentences each, a sentence now and then in several of them."""
    own = [one for one in SENTENCES[:10] if one.isascii()]
    return [
        " ".join(f"{own[(d + s) % len(own)]} Number {d + s}." for s in range(sentences))
        for d in range(count)
    ]


def job(folder: Path, model: Path, **sections: Job) -> Job:
    split = {"max_tokens": 60, "carry": ["title"]}
    encoder = {"max_tokens": 76, "long_text": "split", "split": split}
    encoder |= sections.pop("encoder", {})
    return running.job(folder / "in", folder / "out", model, encoder=encoder, **sections)


def lines_of(out: Path) -> pa.Table:
    return published(str(out)).sort_by([("shard", "ascending"), ("row", "ascending")])


def section() -> str:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    return page.split("\n## Passages, and an edit\n", 1)[1].split("\n## ", 1)[0]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", section(), re.DOTALL)


def write_corpus(folder: Path, bodies: list[str], only: int | None = None) -> None:
    for number, body in enumerate(bodies):
        if only in (None, number):
            texts = [body, f"Short {number}."]
            write_shard(folder / f"{number}.parquet", texts, title=[TITLE, None])


class Reader:
    """A store that follows an output by the page's program, and says what that printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        (self._program,) = blocks("python")
        self._names: dict[str, Any] = {}
        self._capsys = capsys

    def follow(self) -> tuple[int, int, int]:
        """How many passages there are, how many are new, how many are gone."""
        self._capsys.readouterr()
        exec(self._program, self._names)
        total, new, gone = re.findall(r"[0-9]+", self._capsys.readouterr().out)
        return int(total), int(new), int(gone)


def write_job(folder: Path, model: Path) -> None:
    """The page's job; the tiny model has 80 positions."""
    (shown,) = blocks("yaml")
    document: dict[str, Any] = yaml.safe_load(shown)
    document["encoder"] |= {"model": str(model), "max_tokens": 76}
    document["encoder"]["split"]["max_tokens"] = 60
    (folder / "passages.yaml").write_text(yaml.safe_dump(document))


@pytest.mark.slow
def test_an_edit_as_the_page_shows_it(
    cluster: Cluster,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One document of three is edited, then edited back: the others and their passages stay."""
    monkeypatch.chdir(tmp_path)
    write_job(tmp_path, model)
    # No passage of one is a passage of another, which would be neither new nor gone.
    long = enumerate(documents(3, sentences=30))
    bodies = [body.replace("Number", f"Document {number}, number") for number, body in long]
    write_corpus(tmp_path / "corpus", bodies)
    edited = [*bodies[:1], bodies[1].replace("number 16.", "another number."), *bodies[2:]]
    assert edited != bodies
    reader, seen = Reader(capsys), []
    for line in blocks("sh")[0].splitlines():
        program, *words = shlex.split(line, comments=True)
        if program == "python":
            write_corpus(tmp_path / "corpus", edited, only=1)
            continue
        ran = running.command(*words, *(["--address", cluster.address] if "run" in words else []))
        assert ran.code == 0, ran.err
        if "run" in words:
            running.require_sum(ran.summary)
            embedded = ran.summary["passages"] - ran.summary["passages_reused"]
            seen.append((ran.summary["chunks_written"], embedded, *reader.follow()))
    (first, once, total, *begun), (second, again, left, new, gone) = seen
    assert (first, second, begun) == (3, 1, [total, 0])
    assert (once, again) == (total, new)
    assert total > 15
    assert 1 <= new <= 3
    assert left == total + new - gone
    write_corpus(tmp_path / "corpus", bodies, only=1)
    assert running.command("run", "passages.yaml", "--address", cluster.address).code == 0
    assert reader.follow() == (total, gone, new)


@pytest.mark.slow
def test_an_edited_document_in_another_file_costs_its_new_passages(
    cluster: Cluster, model: Path, tmp_path: Path
) -> None:
    """Other files in another order, an edit, a title more, a null: all else is taken over."""
    bodies = [
        body.replace("Number", f"Document {n}, number") for n, body in enumerate(documents(6))
    ]
    titles = [TITLE, None, TITLE, TITLE, TITLE, "x y " * 40]
    write_shard(tmp_path / "in" / "a.parquet", bodies, title=titles)
    document = job(tmp_path, model, run={"max_quarantined": 0.2}, output={"chunk_rows": 3})
    options = Options(address=cluster.address)
    first = running.run_with(document, options, counting(tmp_path / "first"))
    assert first.faults == ()
    before = lines_of(tmp_path / "out")
    assert first.summary.passages_reused == 0

    (tmp_path / "in" / "a.parquet").unlink()
    tonight: list[str | None] = [bodies[3].replace("number 8.", "another one."), *bodies[2::-1]]
    tonight += [None, *bodies[5:3:-1]]
    own = [titles[3], *titles[2::-1], None, *titles[5:3:-1]]
    own[2] = "Another title"
    for part, start in enumerate((0, 4)):
        rows = slice(start, start + 4)
        write_shard(tmp_path / "in" / f"part-{part}.parquet", tonight[rows], title=own[rows])
    plan = embedjob.plan(document, reusable=True)
    night = running.run_with(document, options, counting(tmp_path / "night"))
    assert night.faults == ()
    assert plan.rows_reusable == night.summary.reused
    running.require_sum(night.summary.as_dict())
    assert (night.summary.embedded, night.summary.reused, night.summary.quarantined) == (2, 4, 1)
    assert running.command("verify", str(tmp_path / "out")).code == 0

    full = {**document, "output": {**document["output"], "path": str(tmp_path / "full")}}
    assert running.run_with(full, options, counting(tmp_path / "full-log")).faults == ()
    ours, theirs = lines_of(tmp_path / "out"), lines_of(tmp_path / "full")
    columns = [name for name in theirs.column_names if name != "embedding"]
    assert ours.select(columns) == theirs.select(columns)
    assert pc.any(ours["truncated"]).as_py()
    pairs = [np.stack(table["embedding"].to_pylist()) for table in (ours, theirs)]
    assert (pairs[0] * pairs[1]).sum(axis=1).min() >= 0.99999
    known = dict(zip(before["text_hash"].to_pylist(), before["embedding"].to_pylist(), strict=True))
    after = dict(zip(ours["text_hash"].to_pylist(), ours["embedding"].to_pylist(), strict=True))
    new = after.keys() - known.keys()
    assert texts_encoded(tmp_path / "night") == len(new)
    assert night.summary.passages - night.summary.passages_reused == len(new)
    assert all(after[one] == known[one] for one in after.keys() & known.keys())


@pytest.mark.slow
def test_lines_hold_what_the_encoder_gives(cluster: Cluster, model: Path, tmp_path: Path) -> None:
    """Long, short, repeated, empty and null documents, with titles that some rows lack."""
    bodies: list[str | None] = [*documents(6), "A fox.", "", None, documents(1)[0]]
    titles = [TITLE, None, "", TITLE, TITLE, TITLE, TITLE, TITLE, TITLE, TITLE]
    write_shard(tmp_path / "in" / "a.parquet", bodies, group_rows=6, title=titles)
    document = job(tmp_path, model, run={"max_quarantined": 0.2}, output={"chunk_rows": 6})
    ran = running.run(document, tmp_path, "--address", cluster.address)
    assert ran.code == 0, ran.err
    running.require_sum(ran.summary)
    assert [ran.summary[key] for key in ("rows", "quarantined")] == [10, 1]
    out = tmp_path / "out"
    assert running.command("verify", str(out)).code == 0
    table = lines_of(out)
    assert ran.summary["passages"] == len(table)
    assert "title" not in table.column_names
    for line in table.to_pylist():
        body, title = bodies[line["row"]], titles[line["row"]]
        assert body is not None
        own = body[line["char_start"] : line["char_stop"]].strip()
        assert line["text_hash"] == text_hash(f"{title}\n{own}" if title else own)
        assert not line["truncated"]
    encoder = Encoder.from_output(str(out))
    good = [number for number, body in enumerate(bodies) if body is not None]
    vectors, lines = encoder.encode_parts(
        [bodies[number] or "" for number in good], headings=[titles[number] for number in good]
    )
    assert lines.counts.max() > 2
    assert table["row"].to_pylist() == np.repeat(good, lines.counts).tolist()
    found = np.stack(table["embedding"].to_pylist())
    assert (found * vectors).sum(axis=1).min() >= 0.99999
    assert encoder.encode(["A fox."], role="query").shape == (1, 32)
    assert "sentencex" in read_claims(str(out))[0].versions
    again = running.run(document, tmp_path, "--address", NOWHERE)
    assert (again.code, again.summary["chunks_written"]) == (0, 0)


@pytest.mark.slow
def test_a_passage_that_breaks_the_model_is_alone(
    cluster: Cluster, model: Path, tmp_path: Path
) -> None:
    bodies = documents(8)
    bodies[5] = bodies[5].replace("Number 9.", f"Number 9 {MARKER}.")
    write_shard(tmp_path / "in" / "a.parquet", bodies, title=[TITLE] * 8)
    document = job(tmp_path, model, run={"max_quarantined": 0.2})
    token = Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id(MARKER_TOKEN)
    options = Options(address=cluster.address)
    result = running.run_with(document, options, failing("raise", token, tmp_path / "log"))
    assert result.faults == ()
    assert (result.summary.quarantined, result.summary.rows) == (1, 8)
    out = tmp_path / "out"
    assert running.command("verify", str(out)).code == 0
    (bad,) = pq.read_table(out / "quarantine").to_pylist()
    own = bodies[5][bad["char_start"] : bad["char_stop"]]
    assert (bad["row"], bad["reason"], MARKER in own) == (5, "model_error", True)
    left = [one for one in published(str(out)).to_pylist() if one["row"] == 5]
    assert len(left) > 1
    assert bad["part"] not in [one["part"] for one in left]
    covered = sorted((one["char_start"], one["char_stop"]) for one in [*left, bad])
    assert (covered[0][0], covered[-1][1]) == (0, len(bodies[5]))
    retried = running.run(document, tmp_path, "--address", cluster.address, "--retry-quarantined")
    assert (retried.code, retried.summary["quarantined"]) == (0, 0), retried.err
    assert running.command("verify", str(out)).code == 0
    whole = published(str(out)).filter(pc.equal(published(str(out))["row"], 5))
    assert len(whole) == len(left) + 1


@pytest.mark.slow
def test_ranges_of_eight_bits_are_those_of_passages(
    cluster: Cluster, model: Path, tmp_path: Path
) -> None:
    """The sample goes the way of the rows, titles included: else its vectors would be others."""
    write_shard(tmp_path / "in" / "a.parquet", documents(6), title=[TITLE] * 6)
    document = job(tmp_path, model, encoder={"vector_dtype": "int8"})
    ran = running.run(document, tmp_path, "--address", cluster.address)
    assert ran.code == 0, ran.err
    out = str(tmp_path / "out")
    assert running.command("verify", out).code == 0
    claim = read_claims(out)[0]
    assert claim.calibration is not None
    encoder = Encoder.from_output(out)
    vectors, _ = encoder.encode_parts(documents(6), headings=[TITLE] * 6)
    assert claim.calibration.vectors == len(published(out)["text_hash"].unique())
    low, high = claim.calibration.array
    assert np.allclose(low, vectors.min(axis=0), atol=1e-5)
    assert np.allclose(high, vectors.max(axis=0), atol=1e-5)
