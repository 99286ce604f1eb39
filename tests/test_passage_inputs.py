"""Passages of static tables, of documents under titles, in every kind of input.

Invariant: a document's passages and their vectors are the same whatever holds it: Parquet, JSON
Lines, compressed ones, a table whose title is a partition, or one that has lost other rows.
"""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from embedjob.config.job import Input, with_headings
from embedjob.config.job_file import job_source
from embedjob.encoder.encoder import Encoder
from embedjob.errors import ModelError
from embedjob.input.reading import read_chunk
from embedjob.job.resolve import identify, resolve, resolve_encoder
from embedjob.models.tokenizer import load_tokenizer
from embedjob.output.snapshot import open_snapshot
from embedjob.stages.tokenize import tokenize_rows
from embedjob.static.lookup_encoder import LookupEncoder
from tests import running
from tests.cluster import Cluster
from tests.input.tables.nights import input_of, planned
from tests.running import Job
from tests.shards import plan_of, write_shard

TITLES = ("The fox", None, "", "a b/c=1", "Naïve")
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "a", "of", "to", "and")
WIDTH, MOST = 6, 24


def bodies(count: int, *, sentences: int = 12) -> list[str]:
    """Documents of some sentences, of which several documents have some."""
    return [
        " ".join(
            f"{' '.join(WORDS[(d + s + w) % len(WORDS)] for w in range(3 + s % 5))} {d + s}."
            for s in range(sentences)
        )
        for d in range(count)
    ]


def documents() -> list[dict[str, Any]]:
    every = [*bodies(8), "the fox.", "the fox."]
    return [
        {"doc_id": f"d{d}", "title": TITLES[d % len(TITLES)], "body": body}
        for d, body in enumerate(every)
    ]


def glove(folder: Path) -> Path:
    """A table of words, each of which is a token."""
    vectors = np.random.default_rng(3).normal(size=(len(WORDS), WIDTH))
    rows = zip(WORDS, vectors, strict=True)
    path = folder / "glove.txt"
    path.write_text("".join(f"{w} {' '.join(f'{x:.5f}' for x in v)}\n" for w, v in rows))
    return path


def model2vec(folder: Path) -> Path:
    """A table whose tokens a tokenizer finds."""
    place = folder / "model2vec"
    place.mkdir()
    made = Tokenizer(models.WordLevel({w: n for n, w in enumerate(["[UNK]", *WORDS])}, "[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.save(str(place / "tokenizer.json"))
    rows = np.random.default_rng(5).normal(size=(len(WORDS) + 1, WIDTH)).astype(np.float32)
    save_file({"embeddings": rows}, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps({"model_type": "model2vec"}))
    return place


MODELS: dict[str, Callable[[Path], Path]] = {"glove": glove, "model2vec": model2vec}
SPLIT: Job = {"long_text": "split", "split": {"max_tokens": MOST, "carry": ["title"]}}


def lines_file(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON Lines in which a null title is missing."""
    shown = [{k: v for k, v in row.items() if v is not None} for row in rows]
    data = "".join(json.dumps(row) + "\n" for row in shown).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    pack = {".gz": gzip.compress, ".zst": lambda raw: pa.compress(raw, "zstd", asbytes=True)}
    path.write_bytes(pack.get(path.suffix, bytes)(data))


def parquet(folder: Path) -> Input:
    write_shard(folder / "p" / "a.parquet", pa.Table.from_pylist(documents()), group_rows=4)
    return Input(path=f"{folder}/p", text="body", id="doc_id")


def lines(ending: str) -> Callable[[Path], Input]:
    def write(folder: Path) -> Input:
        rows = documents()
        lines_file(folder / "lines" / f"a.jsonl{ending}", rows[:5])
        lines_file(folder / "lines" / f"b.jsonl{ending}", rows[5:])
        return Input(path=f"{folder}/lines", text="body", id="doc_id")

    return write


def delta(*, by: list[str]) -> Callable[[Path], Input]:
    def write(folder: Path) -> Input:
        deltalake = pytest.importorskip("deltalake", reason="pip install 'embedjob[lakehouse]'")
        more = {"doc_id": "gone", "title": "The fox", "body": bodies(9)[-1]}
        # As a partition an empty title is null, as it is where it stands before a passage.
        table = pa.Table.from_pylist([*documents(), more])
        place = folder / "-".join(["delta", *by])
        deltalake.write_deltalake(place, table, partition_by=by)
        deltalake.DeltaTable(place).delete("doc_id = 'gone'")
        return input_of("delta", place, text="body", id="doc_id")

    return write


INPUTS: dict[str, Callable[[Path], Input]] = {
    "parquet": parquet,
    "lines": lines(""),
    "lines of gzip": lines(".gz"),
    "lines of zstd": lines(".zst"),
    "delta": delta(by=[]),
    "delta by title": delta(by=["title"]),
}


def embedded(job_input: Input, model: Path) -> dict[tuple[str, int], tuple[Any, ...]]:
    """What a run makes of an input: by document and part its characters, hash and vector."""
    recipe = resolve_encoder({"model": str(model), **SPLIT}, on_gpu=False).recipe
    job_input = with_headings(job_input, recipe.split.carry)
    made = planned(job_input) if job_input.table else plan_of(job_input, chunk_rows=3)
    assert not made.faults, made.faults
    found: dict[tuple[str, int], tuple[Any, ...]] = {}
    tokenizer, encoder = load_tokenizer(recipe), LookupEncoder(recipe)
    for chunk in made.chunks:
        table, views = tokenize_rows(read_chunk(chunk, job_input), tokenizer, "split")
        assert views.lengths.max() <= MOST
        vectors = encoder.encode_views(views).embeddings
        for line in table.to_pylist():
            assert line["reason"] is None, line
            place = (line["char_start"], line["char_stop"], line["text_hash"])
            vector = vectors[line["unique"]].tolist()
            found[line["id"], line["part"]] = (*place, *vector)
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_passages_are_the_same_in_every_input(tmp_path: Path, kind: str) -> None:
    model = MODELS[kind](tmp_path)
    encoder = Encoder.from_config({"model": str(model), **SPLIT}, device="cpu")
    rows = documents()
    vectors, parts = encoder.encode_parts(
        [row["body"] for row in rows], headings=[row["title"] for row in rows]
    )
    keys = [(f"d{d}", part) for d, count in enumerate(parts.counts) for part in range(count)]
    assert len(keys) > 2 * len(rows)
    for name, write in INPUTS.items():
        found = embedded(write(tmp_path), model)
        assert sorted(found) == sorted(keys), name
        ours = np.array([found[key][3:] for key in keys])
        assert np.allclose(ours, vectors, atol=1e-6), name
        if name == "parquet":
            first = found
        assert {key: one[:3] for key, one in found.items()} == {
            key: one[:3] for key, one in first.items()
        }, name


@pytest.mark.parametrize("method", ["tfidf", "bow"])
def test_vocabularies_take_no_passages(tmp_path: Path, method: str) -> None:
    """Their terms are counted over documents."""
    document = {
        "input": {"path": str(tmp_path), "text": "body"},
        "encoder": {"method": method, **SPLIT},
        "output": {"path": str(tmp_path / "out")},
    }
    with pytest.raises(ModelError, match="long_text: got split"):
        identify(resolve(job_source(document)))


@pytest.mark.ray
@pytest.mark.slow
def test_a_night_over_lines_costs_its_passages(cluster: Cluster, tmp_path: Path) -> None:
    """A sentence of one document is changed, and its file has another name: the rest is reused."""
    model, rows, out = glove(tmp_path), documents(), tmp_path / "out"
    lines_file(tmp_path / "in" / "a.jsonl.gz", rows)
    document = {
        **running.job(tmp_path / "in", out, model),
        "encoder": {"model": str(model), **SPLIT},
        "pool": {"actors": 1},
    }
    ran = running.run(document, tmp_path, "--address", cluster.address)
    assert ran.code == 0, ran.err
    first = open_snapshot(str(out)).to_table()
    assert ran.summary["passages"] == len(first)
    assert running.command("verify", str(out)).code == 0
    sentence = rows[3]["body"].split(". ")[5]
    edited = [*rows[:3], {**rows[3], "body": rows[3]["body"].replace(sentence, "it is a dog")}]
    lines_file(tmp_path / "in" / "b.jsonl.zst", [*edited, *rows[4:]])
    (tmp_path / "in" / "a.jsonl.gz").unlink()
    night = running.run(document, tmp_path, "--address", cluster.address)
    assert night.code == 0, night.err
    second = open_snapshot(str(out)).to_table()
    new = {*second["text_hash"].to_pylist()} - {*first["text_hash"].to_pylist()}
    assert 1 <= len(new) <= 3
    assert (night.summary["chunks_written"], night.summary["rows"]) == (1, len(rows))
    assert running.command("verify", str(out)).code == 0
