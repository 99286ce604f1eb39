"""What a Ray cluster has, and what its autoscaler could add, as far as Ray tells."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml
from ray._private import state
from ray._private.worker import global_worker
from ray.core.generated import autoscaler_pb2
from ray.experimental.internal_kv import _internal_kv_get

# Where `ray up` leaves the cluster's own file, on the head, which is where submitted jobs run.
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
_STATUS_KEY = b"__autoscaling_status"


@dataclass(frozen=True)
class NodeType:
    """Nodes of one shape: how many CPUs and GPUs each has, and how many there are or could be."""

    cpus: float
    gpus: float
    count: int

    def holds(self, cpus: float, gpus: float) -> int:
        """How many actors of this size such nodes can hold together."""
        shares = [have / need for have, need in ((self.cpus, cpus), (self.gpus, gpus)) if need]
        return int(min(shares) + 1e-6) * self.count if shares else 0


def alive() -> list[NodeType]:
    """The nodes that are there now."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [_node_type(resources, 1) for resources in nodes]


def launchable() -> list[NodeType] | None:
    """The nodes that could be added: none on a static cluster, None where Ray does not say."""
    config = state.state.get_cluster_config()
    if config and config.node_group_configs:
        groups = config.node_group_configs
        return [_node_type(group.resources, group.max_count) for group in groups]
    if not _autoscales():
        return []
    bootstrap = BOOTSTRAP.expanduser()
    if not bootstrap.exists():
        return None
    return types_in(yaml.safe_load(bootstrap.read_text(encoding="utf-8")))


def types_in(cluster_file: Mapping[str, Any]) -> list[NodeType]:
    """The worker node types of a cluster launcher's file."""
    head = cluster_file.get("head_node_type")
    return [
        _node_type(kind.get("resources", {}), kind.get("max_workers", cluster_file["max_workers"]))
        for name, kind in cluster_file["available_node_types"].items()
        if name != head
    ]


def is_infeasible() -> bool:
    """Whether the autoscaler has said that no node type of its own fits what was requested."""
    reported = _status().autoscaling_state
    return bool(
        reported.infeasible_cluster_resource_constraints or reported.infeasible_resource_requests
    )


def _autoscales() -> bool:
    """Only an autoscaler names the types of nodes: `node_...` stands for having none."""
    if any(node.ray_node_type_name for node in _status().cluster_resource_state.node_states):
        return True
    report = json.loads(_internal_kv_get(_STATUS_KEY) or b"{}").get("autoscaler_report") or {}
    return any(not name.startswith("node_") for name in report.get("active_nodes") or {})


def _status() -> Any:
    # Neither is typed: the message is generated, and the client belongs to the connected worker.
    reply, client = vars(autoscaler_pb2)["GetClusterStatusReply"], vars(global_worker)["gcs_client"]
    return reply.FromString(client.get_cluster_status())


def _node_type(resources: Mapping[str, float], count: int) -> NodeType:
    return NodeType(resources.get("CPU", 0.0), resources.get("GPU", 0.0), count)
