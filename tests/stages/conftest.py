"""A driver that has joined the cluster."""

from collections.abc import Iterator

import pytest

from embedjob.stages.connection import connected
from tests.cluster import Cluster


@pytest.fixture(scope="module")
def joined(cluster: Cluster) -> Iterator[None]:
    with connected(cluster.address):
        yield
