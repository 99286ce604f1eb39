import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from embedjob.config.generation import Generation
from embedjob.config.job import ActorRange, Generate, Input, Job, Pool
from embedjob.errors import ResourceError
from embedjob.stages import cluster
from embedjob.stages.cluster import (
    NodeType,
    alive,
    beside_pool,
    launchable,
    size_pool,
    size_pools,
    threads_per_actor,
    types_in,
)
from embedjob.stages.connection import connected
from embedjob.stages.encode import PoolSize
from tests.cluster import AUTH, ROOT, Cluster, ray_cluster, wait
from tests.connection import leave
from tests.shards import job_of

GPU_WORKER = {"CPU": 2, "GPU": 1}


@pytest.mark.parametrize(
    ("cpus", "gpus", "held"),
    [(1, 0, 8), (0.5, 0, 16), (1, 1, 2), (1, 0.5, 4), (8, 1, 0), (0, 1, 2), (0, 0, 0), (1, 2, 0)],
)
def test_a_node_type_holds_as_many_as_its_scarcer_resource(
    cpus: float, gpus: float, held: int
) -> None:
    assert NodeType(cpus=4, gpus=1, count=2).holds(cpus, gpus) == held


def test_the_workers_of_the_cluster_file_that_ships_are_understood() -> None:
    shipped = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    workers = types_in(shipped)
    assert len(workers) == len(shipped["available_node_types"]) - 1
    assert all(kind.gpus >= 1 and kind.count > 0 for kind in workers)


@pytest.fixture(scope="module")
def growing() -> Iterator[Cluster]:
    """A head without GPU, whose autoscaler may start one node with a GPU (that is none)."""
    with ray_cluster({**os.environ, "PYTHONPATH": str(ROOT)}, worker=GPU_WORKER) as started:
        yield started


@pytest.mark.ray
@pytest.mark.slow
def test_a_growing_cluster(
    growing: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One story, since each part needs the cluster as the one before left it."""
    for name, value in AUTH.items():
        monkeypatch.setenv(name, value)
    bootstrap = tmp_path / "bootstrap.yaml"
    monkeypatch.setattr(cluster, "BOOTSTRAP", bootstrap)
    said: list[str] = []
    leave()  # the cluster that a test before this one stayed joined to
    with connected(growing.address):
        # Until it does, Ray looks like a cluster that does not grow.
        wait(lambda: launchable() != [], "autoscaler that has reported")
        assert launchable() is None
        worker = {"resources": GPU_WORKER, "max_workers": 1}
        types = {"head": {"resources": {"CPU": 2}}, "worker": worker}
        bootstrap.write_text(
            yaml.safe_dump(
                {"head_node_type": "head", "max_workers": 1, "available_node_types": types}
            )
        )
        assert launchable() == [NodeType(2, 1, 1)]
        # Never to be had: refused at once, although one could wait for an hour.
        with pytest.raises(ResourceError, match=r"no node has that .*1 x \(2 CPU, 1 GPU\)"):
            size_pool(Pool(gpus_per_actor=4), chunks=9, wait=3600, say=said.append)
        with pytest.raises(ResourceError, match="2 were asked for"):
            size_pool(Pool(actors=2), chunks=9, wait=3600, say=said.append)
        assert said == []
        bootstrap.unlink()
        # Ray does not say that this is in vain: waited for, and no longer than was asked.
        with pytest.raises(ResourceError, match=r"run\.wait_for_resources: .* in vain"):
            size_pool(Pool(gpus_per_actor=4), chunks=9, wait=3, say=said.append)
        # To be had: asked for, waited for, and there.
        found = size_pool(
            Pool(actors=ActorRange(min=1, max=4)), chunks=9, wait=120, say=said.append
        )
        assert found == PoolSize(smallest=1, largest=4, cpus=1.0, gpus=1.0)
        assert "waiting for 1 x {'CPU': 1.0, 'GPU': 1}" in said[-1]
        assert NodeType(2, 1, 1) in alive()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("pool", "found"),
    [
        (Pool(gpus_per_actor=0), PoolSize(2, 2, 0.5, 0.0)),
        (Pool(gpus_per_actor=0, actors=1), PoolSize(1, 1, 0.5, 0.0)),
        (Pool(gpus_per_actor=0, actors=ActorRange(min=1, max=2)), PoolSize(1, 2, 0.5, 0.0)),
        (Pool(gpus_per_actor=0, cpus_per_actor=2), "beside 1 CPU to read with"),
        (Pool(gpus_per_actor=0, cpus_per_actor=3), "no node has that"),
        (Pool(gpus_per_actor=1), "no node has that"),
    ],
)
def test_a_fixed_cluster_gives_what_it_has_or_refuses_at_once(
    cluster: Cluster, pool: Pool, found: PoolSize | str
) -> None:
    said: list[str] = []
    with connected(cluster.address):
        if isinstance(found, PoolSize):
            assert size_pool(pool, chunks=9, wait=60, say=said.append) == found
        else:
            with pytest.raises(ResourceError, match=found):
                size_pool(pool, chunks=9, wait=3600, say=said.append)
    assert said == []


def test_what_a_pool_takes_is_not_there_for_the_other() -> None:
    nodes = [NodeType(4, 1, 2), NodeType(8, 0, 1)]
    assert beside_pool(nodes, None) == nodes
    assert beside_pool(nodes, PoolSize(1, 4, 1.0, 1.0)) == [
        NodeType(3, 0, 1),
        NodeType(4, 1, 1),
        NodeType(8, 0, 1),
    ]
    assert beside_pool(nodes, PoolSize(3, 3, 1.0, 0.5)) == [
        NodeType(2, 0, 1),
        NodeType(3, 0.5, 1),
        NodeType(8, 0, 1),
    ]
    assert (
        sum(node.cpus * node.count for node in beside_pool(nodes, PoolSize(16, 16, 1.0, 0.0))) == 0
    )


def generating(**pools: dict[str, Any]) -> Job:
    """A job that generates, with these sections."""
    kinds = {"shorter": {"instruction": "Say less."}}
    own = Generation.model_validate({"kinds": kinds}, strict=False)
    job = job_of(Input(path="in", text="t")).config
    recipe = job.encoder.model_copy(update={"generate": own})
    pool = Pool.model_validate({"gpus_per_actor": 0, **pools.get("pool", {})})
    generate = Generate.model_validate({"kinds": kinds, "pool": pools.get("generate", {})})
    run = job.run.model_copy(update={"wait_for_resources": "60s"})
    changed = {"encoder": recipe, "pool": pool, "generate": generate, "run": run}
    return job.model_copy(update=changed)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("job", "found"),
    [
        (generating(), PoolSize(1, 1, 0.5, 0.0, PoolSize(1, 1, 0.5, 0.0))),
        (
            generating(generate={"cpus_per_actor": 0.25}),
            PoolSize(1, 1, 0.5, 0.0, PoolSize(1, 1, 0.25, 0.0)),
        ),
        (generating(generate={"actors": 3}), r"generate\.pool\.actors: 3 were asked for"),
        (generating(generate={"gpus_per_actor": 1}), r"generate\.pool: .* beside 1 encoder\."),
        (generating(pool={"actors": 2}), r"generate\.pool\.actors: 1 were asked for"),
    ],
)
def test_generators_have_their_actors_beside_the_encoders(
    cluster: Cluster, job: Job, found: PoolSize | str
) -> None:
    with connected(cluster.address):
        if isinstance(found, PoolSize):
            assert size_pools(job, chunks=9, say=print) == found
            assert threads_per_actor(found, beside=found.generators) == 1
        else:
            with pytest.raises(ResourceError, match=found):
                size_pools(job, chunks=9, say=print)


@pytest.mark.ray
def test_there_are_never_more_actors_than_chunks(cluster: Cluster) -> None:
    with connected(cluster.address):
        size = size_pool(Pool(gpus_per_actor=0), chunks=1, wait=60, say=print)
    assert size == PoolSize(1, 1, 0.5, 0.0)
