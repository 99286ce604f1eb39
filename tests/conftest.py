"""Fixtures that several tests share."""

import os
import uuid
from collections.abc import Iterator

import pytest

from tests.seaweed import S3Server, seaweed


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A real S3 server that the environment of this process (and its children) points to."""
    with seaweed() as server, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def bucket(s3: S3Server) -> str:
    """The URL of a fresh bucket."""
    return s3.make_bucket(f"test-{uuid.uuid4().hex[:12]}")
