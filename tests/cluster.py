"""A real Ray cluster of one node, in processes of its own, for as long as a `with` lasts."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.seaweed import free_ports

ROOT = Path(__file__).parent.parent
START_SECONDS = 120
# The mode is set on both sides: a token in ~/.ray would switch `ray start`, and not its clients.
AUTH = {"RAY_AUTH_MODE": "disabled"}


@dataclass(frozen=True)
class Cluster:
    """Where drivers join, where jobs are submitted, and the ancestor of all its processes."""

    address: str
    dashboard: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def processes(self) -> list[psutil.Process]:
        """Every process of the cluster, its workers included."""
        head = psutil.Process(self.process.pid)
        return [head, *head.children(recursive=True)]

    def kill(self) -> None:
        """All processes gone at one blow, as when the power fails."""
        with suppress(psutil.NoSuchProcess):
            kill(self.processes())
        self.process.wait()


@contextmanager
def ray_cluster(
    environment: Mapping[str, str], *, cpus: int = 2, dashboard: bool = False
) -> Iterator[Cluster]:
    """A cluster that has come up; its workers see this environment and nothing of the drivers'."""
    # Ray's sockets lie under it, and their paths may have 107 characters.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    gcs, board, client, agent, grpc, metrics = free_ports(6)
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"),
        *(f"--port={gcs}", f"--num-cpus={cpus}", "--num-gpus=0", f"--temp-dir={folder}"),
        *("--min-worker-port=0", "--max-worker-port=0", f"--ray-client-server-port={client}"),
        *(f"--include-dashboard={dashboard}", f"--dashboard-port={board}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}"),
        *(f"--metrics-export-port={metrics}", "--disable-usage-stats"),
        *(f"--object-store-memory={200 * 2**20}", "--log-color=false"),
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    log = Path(folder, "start.log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**environment, **AUTH, "PATH": path},
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )
    cluster = Cluster(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{board}", process, log)
    try:
        _wait(cluster)
        yield cluster
    finally:
        cluster.kill()
        shutil.rmtree(folder, ignore_errors=True)


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL for each; one that is gone already is gone."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


def _wait(cluster: Cluster) -> None:
    deadline = time.monotonic() + START_SECONDS
    while "This command will now block" not in cluster.log.read_text(errors="replace"):
        if cluster.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"ray did not start:\n{cluster.log.read_text()[-4000:]}")
        time.sleep(0.2)
