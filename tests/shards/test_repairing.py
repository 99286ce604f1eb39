from pathlib import Path

import pytest

from embedjob.shards.repairing import delete_damaged, delete_quarantined
from embedjob.storage import create, list_files
from tests.shards.making import FINGERPRINT
from tests.shards.test_snapshot import _corpus, _run

FOLDER = FINGERPRINT[:12]


def _names(out: str, folder: str) -> list[str]:
    return [file.url.rsplit("/", 1)[-1] for file in list_files(f"{out}/{folder}/{FOLDER}")]


@pytest.fixture
def written(tmp_path: Path, out: str) -> str:
    _run(_corpus(tmp_path), out, epoch=1)
    return out


def test_sound_files_stay(written: str) -> None:
    assert delete_damaged(written, FINGERPRINT) == 0
    assert (len(_names(written, "data")), len(_names(written, "quarantine"))) == (6, 2)


def test_damaged_files_and_half_put_chunks_go(written: str) -> None:
    names = _names(written, "data")
    damaged, half = names[0], _names(written, "quarantine")[1]
    path = Path(written, "data", FOLDER, damaged)
    path.write_bytes(path.read_bytes()[:-1])
    Path(written, "data", FOLDER, half).unlink()
    create(f"{written}/data/{FOLDER}/{names[1][:-8]}-stray.parquet", b"not Parquet")
    assert delete_damaged(written, FINGERPRINT) == 3
    assert _names(written, "data") == sorted({*names} - {damaged, half})
    assert _names(written, "quarantine") == []


def test_chunks_with_quarantined_rows_go_and_are_work_again(tmp_path: Path, out: str) -> None:
    job_input = _corpus(tmp_path)
    _, before = _run(job_input, out, epoch=1)
    assert delete_quarantined(out, FINGERPRINT) == 2
    plan, after = _run(job_input, out, epoch=2)
    assert [chunk.start for chunk in plan.left] == [0, 0]
    assert after.counts == before.counts
