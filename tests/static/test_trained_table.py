"""A table trained by gensim on a corpus, by the program that docs/operations.md shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from embedjob.encoder.encoder import Encoder
from tests.running import write_shard

DOCS = Path(__file__).parents[2] / "docs" / "operations.md"
COLOURS, ANIMALS = ("red", "green", "blue", "white"), ("fox", "dog", "cat", "owl")


def program() -> str:
    chapter = DOCS.read_text(encoding="utf-8").partition("### A table of your own")[2]
    found = re.search(r"```python\n(.*?)```", chapter, re.DOTALL)
    assert found is not None
    return found[1]


def sentences(count: int) -> list[str]:
    """Colours stand among colours, and animals among animals."""
    chance = np.random.default_rng(0)
    rows = (chance.choice(COLOURS if row % 2 else ANIMALS, 6) for row in range(count))
    return [" ".join(row).capitalize() + "!" for row in rows]


def trained(folder: Path, source: Path, name: str) -> tuple[Path, str]:
    place = folder / "train_table.py"
    place.write_text(program())
    ran = subprocess.run(
        [sys.executable, str(place), str(source), "body", str(folder / name)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )
    assert ran.returncode == 0, ran.stderr
    return folder / name, ran.stdout


def test_a_corpus_trains_the_table_that_embeds_it(tmp_path: Path) -> None:
    keyed = pytest.importorskip("gensim.models").KeyedVectors
    texts = sentences(3000)
    write_shard(tmp_path / "in" / "year=1" / "a.parquet", texts[:2000])
    write_shard(tmp_path / "in" / "b.parquet", [*texts[2000:], None])
    table, said = trained(tmp_path, tmp_path / "in", "one.bin")
    assert said == "8 words of 3000 texts\n"
    again, _ = trained(tmp_path, tmp_path / "in", "two.bin")
    assert table.read_bytes() == again.read_bytes()
    # Vectors are the means of gensim's own, and what stands together is near.
    vectors = keyed.load_word2vec_format(str(table), binary=True)
    encoder = Encoder.from_config({"method": "word2vec", "model": str(table)}, device="cpu")
    queries = ["The fox, a dog?", "Owl", "blue and RED"]
    words = [["fox", "dog"], ["owl"], ["blue", "red"]]
    found = encoder.encode(queries)
    for row, some in enumerate(words):
        mean = np.mean([vectors[word] for word in some], axis=0)
        assert np.abs(found[row] - mean / np.linalg.norm(mean)).max() <= 1e-6
    assert found[0] @ found[1] > found[0] @ found[2] + 0.05
