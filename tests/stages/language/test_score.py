"""Pairs scored on a real cluster: each chunk's file once, whatever ended a run before."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import embedjob
from embedjob.config.generation import TrajectorySettings
from embedjob.errors import InputError
from embedjob.job.input_listing import list_input
from embedjob.job.planning import cut_input
from embedjob.stages.language.score import Pairs, put_scores, score, score_chunk
from embedjob.storage.objects import list_files
from tests import running
from tests.cluster import Cluster
from tests.connection import NOWHERE
from tests.encoder.tiny import save_chat
from tests.running import texts

KEYS = {"count": 3, "max_new_tokens": 4}
SETTINGS = TrajectorySettings(**KEYS)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat(tmp_path_factory.mktemp("scored-model"))


def write_pairs(path: Path, count: int = 12) -> Path:
    left: list[str | None] = [*texts(count)]
    right: list[str | None] = [*texts(count, seed=1)]
    left[2], right[4], right[5] = None, None, left[5]
    table = pa.table({"s1": pa.array(left), "s2": pa.array(right), "n": range(count)})
    pq.write_table(table, path, row_group_size=4)
    return path


def scores(directory: str) -> list[tuple[int, float | None]]:
    """(row, distance) of all files."""
    files = list_files(directory)
    rows = [row for file in files for row in pq.read_table(file.url).to_pylist()]
    return sorted((row["row"], row["distance"]) for row in rows)


@pytest.mark.ray
@pytest.mark.slow
def test_pairs_are_scored_chunk_by_chunk_and_once(
    cluster: Cluster, chat: Path, tmp_path: Path
) -> None:
    path, out = write_pairs(tmp_path / "pairs.parquet"), str(tmp_path / "out")
    pairs = Pairs(str(path), "s1", "s2", chunk_rows=4)
    first = score(pairs, out, str(chat), settings=SETTINGS, address=cluster.address)
    assert (first.pairs, first.chunks, first.chunks_done_before) == (12, 3, 0)
    assert first.faults == ()
    found = dict(scores(first.directory))
    table = pq.read_table(path)
    good = [row for row in range(12) if row not in (2, 4)]
    sides: list[Any] = [table[name].take(good).to_pylist() for name in ("s1", "s2")]
    expected = embedjob.trajectory_distance(*sides, model=str(chat), device="cpu", **KEYS)
    assert np.allclose([found[row] for row in good], expected, atol=1e-5)
    assert (found[2], found[4], found[5]) == (None, None, 0.0)
    # All is there: nobody is asked at all.
    before = {file.url: file.etag for file in list_files(first.directory)}
    again = score(pairs, out, str(chat), settings=SETTINGS, address=NOWHERE)
    assert again.chunks_done_before == 3
    # One file is lost, as by a run that was killed before it put it.
    lost = sorted(before)[1]
    content = Path(lost).read_bytes()
    Path(lost).unlink()
    resumed = score(pairs, out, str(chat), settings=SETTINGS, address=cluster.address)
    assert (resumed.chunks_done_before, resumed.faults) == (2, ())
    (made, then) = (pq.read_table(one) for one in (lost, pa.BufferReader(content)))
    # Another number of threads sums in another order.
    distances = [np.array(one["distance"].to_pylist(), np.float64) for one in (made, then)]
    assert np.allclose(*distances, atol=1e-5, equal_nan=True)
    assert made["row"].equals(then["row"])
    after = {file.url: file.etag for file in list_files(first.directory)}
    assert {url: etag for url, etag in after.items() if url != lost} == {
        url: etag for url, etag in before.items() if url != lost
    }


@pytest.mark.ray
@pytest.mark.slow
def test_the_command_says_how_many_pairs_there_were(
    cluster: Cluster, chat: Path, tmp_path: Path
) -> None:
    path = write_pairs(tmp_path / "pairs.parquet", count=6)
    arguments = ("--model", str(chat), "--out", str(tmp_path / "out"), "--address", cluster.address)
    own = ("--left", "s1", "--right", "s2", "--set", "count=3", "--set", "max_new_tokens=4")
    ran = running.command("score", str(path), *arguments, *own, "--json")
    assert ran.code == 0, ran.err
    document = json.loads(ran.out.splitlines()[-1])
    assert (document["pairs"], document["chunks"], document["faults"]) == (6, 1, [])
    assert len(scores(document["directory"])) == 6


def test_a_chunk_is_scored_by_what_is_given(tmp_path: Path) -> None:
    pairs = Pairs(str(write_pairs(tmp_path / "pairs.parquet")), "s1", "s2")
    listing = list_input(pairs.read_as)
    [chunk] = cut_input(pairs.read_as, listing, chunk_rows=99, fingerprint="f" * 64).chunks
    given: list[list[str]] = []

    def lengths(*sides: Any) -> Any:
        given.extend(sides)
        return [float(len(a) - len(b)) for a, b in zip(*sides, strict=True)]

    table = score_chunk(chunk, pairs, lengths)
    assert table["row"].to_pylist() == list(range(12))
    assert [n for n, one in enumerate(table["distance"].to_pylist()) if one is None] == [2, 4]
    assert [len(side) for side in given] == [10, 10]
    put_scores(str(tmp_path / "out" / "a.parquet"), table)
    put_scores(str(tmp_path / "out" / "a.parquet"), table.slice(0, 1))
    assert pq.read_table(tmp_path / "out" / "a.parquet").equals(table)


@pytest.mark.parametrize(
    ("columns", "said"), [(("s1", "no"), "no"), (("s1", "n"), "n holds int64, allowed is a column")]
)
def test_pairs_without_two_columns_of_texts_are_refused(
    chat: Path, tmp_path: Path, columns: tuple[str, str], said: str
) -> None:
    pairs = Pairs(str(write_pairs(tmp_path / "pairs.parquet")), *columns)
    with pytest.raises(InputError, match=said):
        score(pairs, str(tmp_path / "out"), str(chat), settings=SETTINGS, address=NOWHERE)
    assert not (tmp_path / "out").exists()
