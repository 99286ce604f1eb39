"""Fixtures that several tests share."""

import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.cluster import AUTH, ROOT, Cluster, ray_cluster
from tests.seaweed import S3Server, seaweed

# Tiny models gain nothing from several threads, which on busy cores wait long for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# How long one example takes says more about the machine than about the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints a line that is seen although the test succeeds."""

    def write(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n{line}\n")

    return write


@pytest.fixture
def out(tmp_path: Path) -> str:
    """An output on the local disk."""
    return str(tmp_path / "out")


@pytest.fixture(params=["local", "s3"])
def any_out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An output wherever writers can meet: what they settle between them holds on both."""
    return _out_in(request, tmp_path)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.chaos)])
def run_out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The output of a whole run; that runs reach S3 at all, test_s3_job.py shows."""
    return _out_in(request, tmp_path)


def _out_in(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "out")
    return f"{request.getfixturevalue('bucket')}/out"


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


@pytest.fixture(scope="session")
def ray_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What drivers and clusters must agree on, set in the environment of this process."""
    shared = {**AUTH, "EMBEDJOB_CACHE": str(tmp_path_factory.mktemp("cache"))}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in shared.items():
            patch.setenv(name, value)
        yield shared


@pytest.fixture(scope="session")
def cluster(s3: S3Server, ray_settings: dict[str, str]) -> Iterator[Cluster]:
    """A Ray cluster of two CPUs whose workers have the credentials of `s3`."""
    # What a test sends to the workers lies under tests/.
    environment = {**ray_settings, "PYTHONPATH": str(ROOT)}
    with ray_cluster({**os.environ, **s3.environment, **environment}) as started:
        # Here alone: Ray would cost the tests that need no cluster two seconds.
        from tests.connection import keep, leave

        keep(started.address)
        yield started
        leave()


@pytest.fixture(scope="session")
def dashboard_cluster(ray_settings: dict[str, str]) -> Iterator[Cluster]:
    """A Ray cluster that takes submissions, and whose workers have no credentials for S3."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    # The default is three seconds, as the README says.
    shared = {**ray_settings, "RAY_JOB_STOP_WAIT_TIME_S": "60"}
    with ray_cluster({**environment, **shared}, dashboard=True) as started:
        yield started


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny, untrained Llama and its tokenizer."""
    # Here alone: transformers would cost the tests that need no model five seconds.
    from tests.encoder.tiny import save

    return save("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a Llama that takes a fifth of a second for ten rows."""
    from tests.running import save_slow_model

    return save_slow_model(tmp_path_factory.mktemp("slow-model"))
