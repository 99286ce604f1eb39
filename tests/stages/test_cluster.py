import signal
import time

import pytest
import ray
from ray.data import DataContext

from embedjob.errors import ResourceError
from embedjob.stages.cluster import connected
from tests.cluster import Cluster


@pytest.mark.ray
def test_what_outlives_a_run_starts_no_ray_of_its_own(cluster: Cluster) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with connected(cluster.address):
        assert ray.get(ray.put(1)) == 1
        # Ray's own handler would end the process with finished chunks in hand.
        assert signal.getsignal(signal.SIGTERM) is before
        assert DataContext.get_current().target_max_block_size is None
    assert not ray.is_initialized()
    with pytest.raises(ray.exceptions.RaySystemError, match="not been started"):
        ray.put(1)
    assert not ray.is_initialized()


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    started = time.monotonic()
    refused = pytest.raises(ResourceError, match=r"127\.0\.0\.1:1: no Ray cluster answers there")
    with refused, connected("127.0.0.1:1"):
        pass
    assert time.monotonic() - started < 10
    assert not ray.is_initialized()


def test_an_address_in_the_environment_is_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ResourceError, match=r"127\.0\.0\.1:1"), connected(None):
        pass
