"""Chunks that are damaged or hold quarantined rows, and how they are made again.

Covers: embedjob.output.cleanup
"""

from pathlib import Path

import pytest

from embedjob.config.job import Input
from embedjob.job.options import Options
from embedjob.job.output import chunks_to_redo
from embedjob.job.planning import relisted
from embedjob.output.cleanup import damaged
from embedjob.output.file_names import with_generation
from embedjob.output.snapshot import publish
from embedjob.storage.objects import create, list_files
from tests.output.epochs import commit_chunks, commit_left, replace_out, small_corpus
from tests.shards import FINGERPRINT

FOLDER = FINGERPRINT[:12]


def _names(out: str, folder: str) -> list[str]:
    return [file.name for file in list_files(f"{out}/{folder}/{FOLDER}")]


@pytest.fixture
def written(tmp_path: Path, out: str) -> str:
    commit_left(small_corpus(tmp_path), out, epoch=1)
    return out


def test_sound_files_stay(written: str) -> None:
    assert damaged(written, FINGERPRINT) == frozenset()
    assert (len(_names(written, "data")), len(_names(written, "quarantine"))) == (6, 2)


def test_damaged_files_and_half_put_chunks_are_named(written: str) -> None:
    names = _names(written, "data")
    broken, half = names[0], _names(written, "quarantine")[1]
    path = Path(written, "data", FOLDER, broken)
    path.write_bytes(path.read_bytes()[:-1])
    Path(written, "data", FOLDER, half).unlink()
    create(f"{written}/data/{FOLDER}/stray.parquet", b"not Parquet")
    assert damaged(written, FINGERPRINT) == {broken, half}


def test_only_the_last_generation_of_a_chunk_is_looked_at(written: str) -> None:
    """What an earlier run left broken, and a later one made again, is sound."""
    first = Path(written, "data", FOLDER, _names(written, "data")[1])
    whole = first.read_bytes()
    first.write_bytes(whole[:-1])
    again = first.with_name(with_generation(first.name, 2))
    again.write_bytes(whole)
    assert damaged(written, FINGERPRINT) == frozenset()
    first.write_bytes(whole)
    again.unlink()
    again.write_bytes(whole[:-1])
    assert damaged(written, FINGERPRINT) == {first.name}


def test_chunks_with_quarantined_rows_are_made_again_beside_the_old(
    tmp_path: Path, out: str
) -> None:
    """Readers of the first snapshot keep every file of it, and the second names the new ones."""
    job_input = small_corpus(tmp_path)
    plan, before = commit_left(job_input, out, epoch=1)
    publish(out, before)
    options = Options(retry_quarantined=True)
    redo = chunks_to_redo(replace_out(plan, out), options, lambda _: None)
    assert len(redo) == 2
    again = relisted(replace_out(plan, out), epoch=2, redo=redo)
    assert [(chunk.start, chunk.generation) for chunk in again.left] == [(0, 2), (0, 2)]
    standing = _names(out, "data")
    after = commit_chunks(again, job_input, out, epoch=2)
    assert set(standing) < set(_names(out, "data"))
    assert after.counts == before.counts
    assert {with_generation(name, 2) for name in redo} < after.files.names
    assert not redo & after.files.names


def test_nothing_of_another_plan_is_sent_back(tmp_path: Path, out: str) -> None:
    """A snapshot that is kept may name chunks of shards that are no longer there."""
    commit_left(small_corpus(tmp_path), out, epoch=1)
    (tmp_path / "in" / "1.parquet").unlink()
    plan, _ = commit_left(Input(path=str(tmp_path / "in"), text="t", id="n"), out, epoch=2)
    options = Options(retry_quarantined=True)
    [name] = chunks_to_redo(replace_out(plan, out), options, lambda _: None)
    assert name in {chunk.name for chunk in plan.chunks}
