import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.data import DataContext

from embedjob.errors import ResourceError
from embedjob.stages.connection import connected
from tests.cluster import Cluster
from tests.connection import NOWHERE, leave


@pytest.fixture(autouse=True)
def _apart() -> Iterator[None]:
    """Each test joins Ray by itself, and leaves none behind."""
    leave()
    yield
    leave()


@pytest.mark.ray
def test_what_outlives_a_run_starts_no_ray_of_its_own(cluster: Cluster) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with connected(cluster.address):
        assert ray.get(ray.put(1)) == 1
        # Ray's own handler would end the process with finished chunks in hand.
        assert signal.getsignal(signal.SIGTERM) is before
        # What one task yields must stay apart, and a chunk is one row, which cannot be split.
        assert DataContext.get_current().target_max_block_size == 1
    assert not ray.is_initialized()
    with pytest.raises(ray.exceptions.RaySystemError, match="not been started"):
        ray.put(1)
    assert not ray.is_initialized()


@pytest.mark.ray
def test_a_ray_that_was_joined_before_serves_a_run_and_stays_joined(cluster: Cluster) -> None:
    ray.init(address=cluster.address, log_to_driver=False)
    before = DataContext.get_current().target_max_block_size
    for address in (
        None,
        "auto",
        cluster.address,
        cluster.address.replace("127.0.0.1", "localhost"),
    ):
        with connected(address) as started_here:
            assert not started_here
            assert DataContext.get_current().target_max_block_size == 1
        assert ray.is_initialized()
        assert DataContext.get_current().target_max_block_size == before
    for address in ("local", NOWHERE):
        refused = pytest.raises(ResourceError, match=f"{address}: this process has joined the Ray")
        with refused, connected(address):
            pass
    assert ray.get(ray.put(1)) == 1


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    started = time.monotonic()
    refused = pytest.raises(ResourceError, match=r"127\.0\.0\.1:1: no Ray cluster answers there")
    with refused, connected(NOWHERE):
        pass
    assert time.monotonic() - started < 10
    assert not ray.is_initialized()


def test_a_ray_that_does_not_start_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder cannot be made; a node that is slow to start ends in the same way."""
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("RAY_TMPDIR", str(file))
    refused = pytest.raises(ResourceError, match=r"Ray did not start .*\. Run again")
    with refused, connected("local"):
        pytest.fail("it started")


def test_an_address_in_the_environment_is_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", NOWHERE)
    with pytest.raises(ResourceError, match=NOWHERE), connected(None):
        pass


@pytest.fixture
def dead_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What a Ray that was killed leaves behind: the address where nobody listens any more."""
    # Not tmp_path: Ray's sockets lie under it, and their paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        Path(folder, "ray").mkdir()
        Path(folder, "ray", "ray_current_cluster").write_text(NOWHERE)
        yield NOWHERE


@pytest.mark.slow
def test_a_dead_cluster_is_not_waited_for_when_none_is_asked_for(dead_cluster: str) -> None:
    with connected(None) as started_here:
        assert started_here
        assert ray.get_runtime_context().gcs_address != dead_cluster
        assert ray.get(ray.put(1)) == 1


def test_auto_is_refused_at_once_where_the_latest_cluster_is_dead(dead_cluster: str) -> None:
    with pytest.raises(ResourceError, match="auto: no Ray cluster answers"), connected("auto"):
        pass
