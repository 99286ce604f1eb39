import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from embedjob.output.snapshot import newest_snapshot
from tests import running
from tests.cluster import Cluster
from tests.outputs import published, written
from tests.running import texts, write_shard

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROWS = 400


def _mount(*arguments: str) -> bool:
    return subprocess.run(["mount", "-t", "tmpfs", *arguments], check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 256 kB: the claim fits, and some of the chunks."""
    place = tmp_path / "disk"
    place.mkdir()
    if not _mount("-o", "size=256k", "tmpfs", str(place)):
        pytest.skip("mounting a small filesystem needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, small_disk: Path, model: Path, cluster: Cluster
) -> None:
    source, out = tmp_path / "in", small_disk / "out"
    write_shard(source / "a.parquet", texts(ROWS))
    document = running.job(source, out, model)
    full = running.run(document, tmp_path, "--address", cluster.address)
    assert full.code == 1, full.err
    assert "No space left on device" in full.err
    assert "Traceback" not in full.err
    assert newest_snapshot(str(out)) is None
    before = written(out)
    assert 0 < len(before) < ROWS // 10
    for name in before:
        [file] = (out / "data").glob(f"*/{name}")
        assert pq.read_table(file, page_checksum_verification=True).num_rows == 10
    assert _mount("-o", "remount,size=64m", "tmpfs", str(small_disk))
    again = running.run(document, tmp_path, "--address", cluster.address, "--takeover")
    assert again.code == 0, again.err
    assert again.summary["chunks_written"] == ROWS // 10 - len(before)
    assert published(out)["row"].to_pylist() == list(range(ROWS))
    after = written(out)
    assert {name: after[name] for name in before} == before
    assert running.command("verify", str(out)).code == 0
