import subprocess
import sys
import time
from pathlib import Path

import pytest

from embedjob.errors import FaultError
from embedjob.input.decoders import DecodesFooters, decoders
from embedjob.input.footers import Footer, Wanted
from embedjob.input.listing import read_footers
from embedjob.storage.objects import stat
from tests.shards import write_shard

TEXT = Wanted(("t",), ("t",))


def _deadly(whole: bytes) -> bytes:
    """The file with its column said to have no nulls, beside a count of them: Arrow aborts."""
    optional, required = b"\x25\x02\x18\x01t", b"\x25\x00\x18\x01t"
    assert whole.count(optional) == 1
    return whole.replace(optional, required)


def _rows(decode: DecodesFooters, whole: bytes) -> int:
    (footer,) = decode([(whole, len(whole))])
    assert isinstance(footer, Footer)
    return footer.rows


def _children() -> set[str]:
    return {
        pid
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    }


@pytest.mark.parametrize("threads", [1, 32])
def test_a_footer_that_ends_its_process_is_a_fault_and_the_others_are_read(
    tmp_path: Path, threads: int
) -> None:
    """With one thread, they are decoded three at a time."""
    before = _children()
    paths = [tmp_path / f"{number:02}.parquet" for number in range(12)]
    for path in paths:
        write_shard(path, {"t": [str(path)] * 10})
    for path in paths[::4]:
        path.write_bytes(_deadly(path.read_bytes()))
    files = [file for path in paths if (file := stat(str(path)))]
    found = read_footers(files, TEXT, threads=threads)
    assert list(found) == [str(path) for path in paths]
    for place, footer in enumerate(found.values()):
        if place % 4:
            assert isinstance(footer, Footer)
            assert footer.group_rows == (10,)
        else:
            assert str(footer).startswith("not a whole Parquet file: its footer cannot be decoded")
            assert "signal 6" in str(footer)
            assert "histogram size mismatch" in str(footer)
    assert _children() == before


def test_only_the_columns_that_are_wanted_can_end_a_process(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_shard(path, {"t": ["a"] * 10, "u": ["b"] * 10})
    path.write_bytes(_deadly(path.read_bytes()))
    with decoders(Wanted(("u",), ("u",)), files=1) as decode:
        assert _rows(decode, path.read_bytes()) == 10


def test_a_process_that_was_ended_from_outside_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_shard(path, {"t": ["a"] * 10})
    whole = path.read_bytes()
    before = _children()
    with decoders(TEXT, files=1) as decode:
        for _ in range(3):
            assert _rows(decode, whole) == 10
            (pid,) = _children() - before
            subprocess.run(["kill", "-9", pid], check=True)


def test_a_process_that_does_not_answer_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_shard(path, {"t": ["a"] * 10})
    whole = path.read_bytes()
    before = _children()
    with decoders(TEXT, files=1, patience=0.5) as decode:
        assert _rows(decode, whole) == 10
        (pid,) = _children() - before
        subprocess.run(["kill", "-STOP", pid], check=True)
        assert _rows(decode, whole) == 10
        assert pid not in _children()


def test_where_no_process_can_start_the_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        decoders(TEXT, files=1) as decode,
        pytest.raises(FaultError, match=r"did not start .*code 1.* got /bin/false"),
    ):
        decode([(b"", 0)])


_DRIVER = """
import os, signal, sys
from pathlib import Path
from embedjob.input.decoders import decoders
from embedjob.input.footers import Wanted
data = Path(sys.argv[1]).read_bytes()
with decoders(Wanted(("t",), ("t",)), files=1) as decode:
    decode([(data, len(data))])
    tasks = Path("/proc/self/task").iterdir()
    print(*(pid for task in tasks for pid in (task / "children").read_text().split()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_driver_that_is_killed_leaves_no_process(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_shard(path, {"t": ["a"]})
    command = [sys.executable, "-c", _DRIVER, str(path)]
    driver = subprocess.run(command, capture_output=True, text=True, check=False)
    assert driver.returncode == -9
    place = Path("/proc", driver.stdout.strip())
    deadline = time.monotonic() + 30
    while place.exists() and "Z" not in (place / "stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
