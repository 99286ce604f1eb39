"""Chunks that are damaged or hold quarantined rows, found and deleted.

Covers: embedjob.output.cleanup
"""

from pathlib import Path

import pytest

from embedjob.output.cleanup import damaged, delete_chunks, quarantined
from embedjob.storage.objects import create, list_files
from tests.output.epochs import commit_left, small_corpus
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


def test_damaged_files_and_half_put_chunks_go(written: str) -> None:
    names = _names(written, "data")
    head_column_problems, half = names[0], _names(written, "quarantine")[1]
    path = Path(written, "data", FOLDER, head_column_problems)
    path.write_bytes(path.read_bytes()[:-1])
    Path(written, "data", FOLDER, half).unlink()
    stray = f"{names[1][:-8]}-stray.parquet"
    create(f"{written}/data/{FOLDER}/{stray}", b"not Parquet")
    found = damaged(written, FINGERPRINT)
    assert found == {head_column_problems, half, stray}
    delete_chunks(written, FINGERPRINT, found)
    assert _names(written, "data") == sorted({*names} - {head_column_problems, half})
    assert _names(written, "quarantine") == []


def test_chunks_with_quarantined_rows_go_and_are_work_again(tmp_path: Path, out: str) -> None:
    job_input = small_corpus(tmp_path)
    _, before = commit_left(job_input, out, epoch=1)
    found = quarantined(out, FINGERPRINT)
    assert len(found) == 2
    delete_chunks(out, FINGERPRINT, found)
    plan, after = commit_left(job_input, out, epoch=2)
    assert [chunk.start for chunk in plan.left] == [0, 0]
    assert after.counts == before.counts
