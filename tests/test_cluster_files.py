"""The cluster files say to Ray's own parsers what the documentation says of them."""

from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay import autoscaling_config as kuberay
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

ROOT = Path(__file__).parent.parent
IMAGE = f"rayproject/ray:{ray.__version__}-py311"


def _pinned(package: str) -> str:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.split("==")[1] for line in lines if line.startswith(f"{package}=="))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(ROOT)
    return prepare_config(yaml.safe_load(Path("cluster.yaml").read_text()))


@pytest.fixture
def rayjob() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "jobs" / "rayjob.yaml").read_text())


def test_cluster_file_is_valid_to_ray(cluster: dict[str, Any]) -> None:
    validate_config(cluster)


def test_head_has_no_gpu_and_workers_start_at_none(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["resources"]["GPU"] == 0
    workers = {name: node for name, node in types.items() if name != cluster["head_node_type"]}
    assert {node["min_workers"] for node in workers.values()} == {0}
    assert {node["resources"]["GPU"] for node in workers.values()} == {1}
    spot = [
        name for name, node in workers.items() if "InstanceMarketOptions" in node["node_config"]
    ]
    assert spot == ["gpu_spot"]
    assert cluster["idle_timeout_minutes"] <= 10


def _launched(cluster: dict[str, Any], *, available: dict[str, float]) -> dict[str, int]:
    """What Ray's scheduler would launch for four actors of one GPU each."""
    config = AutoscalingConfig(cluster, skip_content_hash=True)
    actors = [ResourceRequestUtil.make({"CPU": 1, "GPU": 1})] * 4
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count(actors),
            recoverable_resource_availabilities=available,
        )
    )
    assert not reply.infeasible_resource_requests
    return {
        launch.instance_type: launch.count
        for launch in reply.to_launch
        if launch.instance_type != cluster["head_node_type"]
    }


def test_spot_comes_first_and_on_demand_after_a_failed_launch(cluster: dict[str, Any]) -> None:
    assert _launched(cluster, available={}) == {"gpu_spot": 4}
    assert _launched(cluster, available={"gpu_spot": 0.0}) == {"gpu_on_demand": 4}


def test_images_are_of_the_pinned_ray(cluster: dict[str, Any], rayjob: dict[str, Any]) -> None:
    assert _pinned("ray") == ray.__version__
    assert cluster["docker"]["head_image"] == f"{IMAGE}-cpu"
    assert cluster["docker"]["worker_image"] == f"{IMAGE}-gpu"
    assert rayjob["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__
    assert f"FROM {IMAGE}-gpu\n" in (ROOT / "Dockerfile").read_text()


def test_both_sides_set_the_authentication_mode(
    cluster: dict[str, Any], rayjob: dict[str, Any]
) -> None:
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        starts = [command for command in commands if "ray start" in command]
        assert starts
        assert all("RAY_AUTH_MODE=token" in command for command in starts)
    # KubeRay makes the token; where an old one does not, Ray ends instead of serving all comers.
    made = rayjob["spec"]["rayClusterSpec"]
    assert made["authOptions"] == {"mode": "token"}
    groups = [made["headGroupSpec"], *made["workerGroupSpecs"]]
    containers = [one for group in groups for one in group["template"]["spec"]["containers"]]
    assert len(containers) == 2
    for container in containers:
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]


def test_a_stopped_job_is_given_longer_than_it_needs(
    cluster: dict[str, Any], rayjob: dict[str, Any]
) -> None:
    starts = " ".join(cluster["head_start_ray_commands"])
    assert "RAY_JOB_STOP_WAIT_TIME_S=40 " in starts
    head = rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    env = {item["name"]: item["value"] for item in head["containers"][0]["env"]}
    assert 30 < int(env["RAY_JOB_STOP_WAIT_TIME_S"]) < head["terminationGracePeriodSeconds"]


def test_rayjob_is_valid_to_rays_autoscaler(rayjob: dict[str, Any]) -> None:
    resource = {
        "metadata": {"name": "embedjob", "namespace": "default"},
        "spec": rayjob["spec"]["rayClusterSpec"],
    }
    config = kuberay._derive_autoscaling_config_from_ray_cr(resource)
    validate_config(config)
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"]["GPU"] == 0
    assert {(node["min_workers"], node["max_workers"]) for node in types.values()} == {(0, 32)}
    assert {node["resources"]["GPU"] for node in types.values()} == {1}


def test_rayjob_runs_files_that_the_image_holds(rayjob: dict[str, Any]) -> None:
    workdir = "/home/ray/embedjob"
    assert f"WORKDIR {workdir}\n" in (ROOT / "Dockerfile").read_text()
    program, script, config = rayjob["spec"]["entrypoint"].split()
    assert program == "python"
    for path in (script, config):
        assert (ROOT / Path(path).relative_to(workdir)).is_file()
    assert rayjob["spec"]["shutdownAfterJobFinishes"] is True


def test_spot_taints_are_tolerated(rayjob: dict[str, Any]) -> None:
    (group,) = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    keys = {item["key"] for item in group["template"]["spec"]["tolerations"]}
    assert {"nvidia.com/gpu", "cloud.google.com/gke-spot"} <= keys
