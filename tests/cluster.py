"""A real Ray cluster, each node in processes of its own, for as long as a `with` lasts."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.seaweed import free_ports

ROOT = Path(__file__).parent.parent
START_SECONDS = 120
_COMMANDS = (
    "cluster_synced_files",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
# The mode is set on both sides: a token in ~/.ray would switch `ray start`, and not its clients.
AUTH = {"RAY_AUTH_MODE": "disabled"}


@dataclass(frozen=True)
class Node:
    """The ancestor of all processes of a node, and what it says."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def processes(self) -> list[psutil.Process]:
        """Every process of the node, its workers included."""
        first = psutil.Process(self.process.pid)
        return [first, *first.children(recursive=True)]

    def kill(self) -> None:
        """All processes gone at one blow, as when the power fails."""
        with suppress(psutil.NoSuchProcess):
            kill(self.processes())
        self.process.wait()


@dataclass(frozen=True)
class Cluster(Node):
    """A cluster's head: where drivers join, and where jobs are submitted."""

    address: str
    dashboard: str


@contextmanager
def ray_cluster(
    environment: Mapping[str, str],
    *,
    cpus: int = 2,
    dashboard: bool = False,
    worker: Mapping[str, float] | None = None,
) -> Iterator[Cluster]:
    """A cluster that has come up; its workers see this environment and nothing of the drivers'.

    `worker` is what one node has that its autoscaler may add, as a process on this machine.
    """
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
    if worker is not None:
        settings = Path(folder, "autoscaling.json")
        settings.write_text(json.dumps(_autoscaling(f"127.0.0.1:{gcs}", cpus, worker)))
        command.append(f"--autoscaling-config={settings}")
        environment = {**environment, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    head = _started(command, environment, Path(folder))
    cluster = Cluster(head.process, head.log, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{board}")
    try:
        _wait(cluster)
        yield cluster
    finally:
        cluster.kill()
        shutil.rmtree(folder, ignore_errors=True)


def add_node(
    cluster: Cluster,
    environment: Mapping[str, str],
    *,
    ip: str,
    cpus: int = 1,
    before: Sequence[str] = (),
) -> Node:
    """One node more, once it has joined; to be killed by its owner before the cluster ends.

    `ip` is a loopback address of its own: drivers join the node of theirs. `before` is a command
    that runs the command after it, as `nice` does.
    """
    agent, grpc, metrics = free_ports(3)
    command = [
        *before,
        *(str(Path(sys.executable).with_name("ray")), "start", f"--address={cluster.address}"),
        *("--block", f"--node-ip-address={ip}", f"--num-cpus={cpus}", "--num-gpus=0"),
        *("--min-worker-port=0", "--max-worker-port=0"),
        *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}"),
        *(f"--metrics-export-port={metrics}", "--disable-usage-stats"),
        *(f"--object-store-memory={100 * 2**20}", "--log-color=false"),
    ]
    folder = Path(tempfile.mkdtemp(prefix="node-", dir=cluster.log.parent))
    node = _started(command, environment, folder)
    try:
        _wait(node)
    except BaseException:
        node.kill()
        raise
    return node


def _started(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> Node:
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    log = folder / "start.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**environment, **AUTH, "PATH": path},
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )
    return Node(process, log)


def _autoscaling(address: str, cpus: int, worker: Mapping[str, float]) -> dict[str, Any]:
    """A cluster file for Ray's own provider of local nodes, which asks for every key."""
    head = {"resources": {"CPU": cpus}, "node_config": {}, "max_workers": 0}
    added = {"resources": dict(worker), "node_config": {}, "min_workers": 0, "max_workers": 1}
    nothing: dict[str, Any] = {key: [] for key in _COMMANDS}
    return nothing | {
        "cluster_name": "test",
        "max_workers": 1,
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": address,
        },
        "head_node_type": "head",
        "available_node_types": {"head": head, "worker": added},
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5.0,
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "head_node": {},
        "worker_nodes": {},
    }


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL for each; one that is gone already is gone."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


def _wait(node: Node) -> None:
    deadline = time.monotonic() + START_SECONDS
    while "This command will now block" not in node.log.read_text(errors="replace"):
        if node.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"ray did not start:\n{node.log.read_text()[-4000:]}")
        time.sleep(0.2)


def wait(found: Callable[[], object], what: str, seconds: float = 120) -> None:
    """Return once something is found; a failed test if it is not in time."""
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, f"no {what} in {seconds} s"
        time.sleep(0.2)
