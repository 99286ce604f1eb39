"""What a Ray cluster has: looks from its nodes, and the actor pool that fits them."""

import json
import math
import socket
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import yaml
from ray._private import state
from ray._private.worker import global_worker
from ray.autoscaler.sdk import request_resources
from ray.core.generated import autoscaler_pb2
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from embedjob.config.job import ActorRange, Job, Pool
from embedjob.errors import (
    AccessError,
    EmbedjobError,
    InterruptedRunError,
    ResourceError,
    amount,
    in_one_line,
)
from embedjob.input.chunks import printable
from embedjob.output.lease import Lease, is_seen, unseen
from embedjob.stages.encode import PoolSize
from embedjob.stages.engine import Engine, PlannedFiles
from embedjob.storage import objects
from embedjob.storage.create_only import require_create_only

# Where `ray up` leaves the cluster's own file, on the head, which is where submitted jobs run.
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
LOOK_SECONDS = 600.0
_POLL_SECONDS = 2.0
SAY_SECONDS = 30.0
GRACE_POLLS = 3
_STATUS_KEY = b"__autoscaling_status"


@dataclass(frozen=True)
class NodeType:
    """Nodes of one shape: how many CPUs and GPUs each has, and how many there are or could be."""

    cpus: float
    gpus: float
    count: int

    def holds(self, cpus: float, gpus: float) -> int:
        """Return how many actors of this size such nodes can hold together."""
        shares = [have / need for have, need in ((self.cpus, cpus), (self.gpus, gpus)) if need]
        return int(min(shares) + 1e-6) * self.count if shares else 0


def alive() -> list[NodeType]:
    """Return the nodes that are there now."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [_node_type(resources, 1) for resources in nodes]


def free() -> list[NodeType]:
    """Return what is left now of the nodes that are there: other jobs may hold the rest."""
    return [_node_type(left, 1) for left in state.available_resources_per_node().values()]


def launchable() -> list[NodeType] | None:
    """Return the nodes that could be added; None where Ray does not say."""
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
    """Return the worker node types of a cluster launcher's file."""
    head = cluster_file.get("head_node_type")
    return [
        _node_type(kind.get("resources", {}), kind.get("max_workers", cluster_file["max_workers"]))
        for name, kind in cluster_file["available_node_types"].items()
        if name != head
    ]


def is_infeasible() -> bool:
    """Tell whether the autoscaler has said that no node type of its own fits what was requested."""
    reported = _status().autoscaling_state
    return bool(
        reported.infeasible_cluster_resource_constraints or reported.infeasible_resource_requests
    )


def _autoscales() -> bool:
    """Tell whether an autoscaler runs: without one, the names of types begin with `node_`."""
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


@dataclass(frozen=True)
class Look:
    """What a node must be able to do: see the input, read and write the output, tokenize.

    A node that does not see the driver's lease has a disk of its own at the output's path, and
    what it would write were lost.
    """

    engine: Engine
    files: PlannedFiles
    shard: str
    lease: Lease

    def __call__(self) -> None:
        """Look from this node; EmbedjobError says what it cannot do."""
        if not is_seen(self.lease):
            raise AccessError(unseen(self.lease))
        if objects.stat(self.shard) is None:
            shard = printable(self.shard)
            raise AccessError(f"{shard}: the driver sees this shard and this node does not")
        require_create_only(self.lease.out)
        self.engine.load_tokenizer()
        self.files.check_tokenizer()


def preflight(look: Look, *, but: Set[str] = frozenset()) -> frozenset[str]:
    """Look from every node apart from `but`, at the same time; return the ids of all that did.

    Raises:
        EmbedjobError: a node cannot do its part; the message names it.
    """
    nodes = {n["NodeID"]: n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")}
    tasks = {_look_from(node, look): node for node in nodes.keys() - but}
    late: list[Any] = []
    if tasks:
        _, late = ray.wait(list(tasks), num_returns=len(tasks), timeout=LOOK_SECONDS)
    looked = set(but)
    for task, node in tasks.items():
        host = nodes[node]["NodeManagerHostname"]
        if task in late:
            raise ResourceError(f"node {host}: did not answer in {LOOK_SECONDS:g} s; remove it")
        try:
            problem = ray.get(task)
        except RayError as error:
            # A node that left meanwhile does no harm.
            if any(n["NodeID"] == node and n["Alive"] for n in ray.nodes()):
                reason = f"cannot run tasks ({in_one_line(error)})"
                raise ResourceError(f"node {host}: {reason}") from error
            continue
        if problem is not None:
            raise type(problem)(f"node {host}: {problem}")
        looked.add(node)
    return frozenset(looked)


def preflight_here(look: Look) -> frozenset[str]:
    """Look from this process, and return its node's id; EmbedjobError as of `preflight`.

    For a Ray that this process has started: that has one node, and its workers have this process's
    user, environment and files. To wait for the first of them takes more than a second.
    """
    host = socket.gethostname()
    try:
        look()
    except InterruptedRunError:
        raise
    except EmbedjobError as problem:
        raise type(problem)(f"node {host}: {problem}") from problem
    except Exception as error:
        raise ResourceError(f"node {host}: cannot look ({in_one_line(error)})") from error
    return frozenset({ray.get_runtime_context().get_node_id()})


def _look_from(node: str, look: Look) -> Any:
    # No CPU is asked for: on a busy node the task would wait.
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return _answer.options(scheduling_strategy=there).remote(look)


@ray.remote(num_cpus=0, max_retries=2)
def _answer(look: Look) -> EmbedjobError | None:
    # Errors come back as values: Ray wraps a raised one in the worker's traceback.
    try:
        look()
    except EmbedjobError as error:
        return error
    return None


def size_pools(config: Job, *, chunks: int, say: Callable[[str], None]) -> PoolSize:
    """Return the sizes of the encoders' pool and the generators' beside it; wait for both to fit.

    Raises:
        ResourceError: as `size_pool`.
    """
    size = partial(size_pool, chunks=chunks, wait=config.run.resource_wait_seconds, say=say)
    pool, generators = config.pool, config.generator_pool
    if config.encoder.generate is None:
        return size(pool)
    if pool.actors == "auto" and not pool.gpus_per_actor:
        # To generate takes a hundred times as long: the other cores are for that.
        pool = pool.model_copy(update={"actors": 1})
    encoders = size(pool)
    if config.encoder.generate.engine == "vllm":
        # Ray's processor asks for the GPUs itself, before the flow; then files are read.
        generators = Pool(actors=1, gpus_per_actor=0, cpus_per_actor=0.25)
    return replace(encoders, generators=size(generators, what="generate.pool", beside=encoders))


def size_pool(
    pool: Pool,
    *,
    chunks: int,
    wait: float,
    say: Callable[[str], None],
    what: str = "pool",
    beside: PoolSize | None = None,
) -> PoolSize:
    """Return the size of the pool that fits this cluster; wait while it scales up.

    `what` is its section in the job file; `beside` is another pool that has its actors already.

    Raises:
        ResourceError: no node that exists or could be launched holds one actor, no CPU would be
            left to read with (Ray Data would then wait for ever), or the wait was in vain.
    """
    addable = launchable()
    if not _most(pool, beside_pool(alive(), beside)) and addable is None:
        # Ray does not say what could be launched: ask for one actor's node, and see.
        _await(PoolSize(1, 1, pool.cpus, pool.gpus_per_actor), wait, say, beside)
    ever = beside_pool([*alive(), *(addable or ())], beside)
    need = f"one actor needs {pool.cpus:g} CPUs and {pool.gpus_per_actor:g} GPUs"
    most = _most(pool, ever)
    if not most:
        raise ResourceError(
            f"{what}: {need}, and no node has that or could be launched with it; there are"
            f" {_listed(ever)}{_taken(beside)}. Lower {what}.gpus_per_actor or"
            f" {what}.cpus_per_actor{_sharing(beside)}"
        )
    limits = _asked(pool, ever, most)
    smallest, largest = (min(number, chunks) for number in limits)
    spare = sum(kind.cpus * kind.count for kind in ever) - smallest * pool.cpus
    if addable is not None and (smallest > most or spare < 1):
        raise ResourceError(
            f"{what}.actors: {smallest} were asked for and {need}, beside 1 CPU to read with; there"
            f" are {_listed(ever)}{_taken(beside)}. Lower {what}.actors or {what}.cpus_per_actor"
        )
    size = PoolSize(smallest, largest, pool.cpus, pool.gpus_per_actor)
    _await(size, wait, say, beside)
    return size


def beside_pool(kinds: Sequence[NodeType], taken: PoolSize | None) -> list[NodeType]:
    """Return what nodes have left beside the fewest actors of a pool."""
    if taken is None:
        return list(kinds)
    rest, need = [], taken.smallest
    for kind in kinds:
        on_each, nodes = replace(kind, count=1).holds(taken.cpus, taken.gpus), 0
        while need and on_each and nodes < kind.count:
            here = min(need, on_each)
            cpus, gpus = kind.cpus - here * taken.cpus, kind.gpus - here * taken.gpus
            rest.append(NodeType(cpus, gpus, 1))
            need, nodes = need - here, nodes + 1
        if nodes < kind.count:
            rest.append(replace(kind, count=kind.count - nodes))
    return rest


def _taken(beside: PoolSize | None) -> str:
    return "" if beside is None else f" beside {amount(beside.smallest, 'encoder')}"


def _sharing(beside: PoolSize | None) -> str:
    if beside is None or not beside.gpus:
        return ""
    return "; with pool.gpus_per_actor: 0.5 as well, an encoder and a generator share a GPU"


def threads_per_actor(size: PoolSize, *, beside: PoolSize | None = None) -> int:
    """Return the torch threads of each actor: a share of the cores, and one beside a GPU.

    `beside` is the other pool of the run.
    """
    if size.gpus:
        return 1
    cores = sum(kind.cpus * kind.count for kind in alive())
    others = 0 if beside is None or beside.gpus else beside.largest
    return max(1, int(cores // (size.largest + others)))


def _most(pool: Pool, kinds: Sequence[NodeType]) -> int:
    return sum(kind.holds(pool.cpus, pool.gpus_per_actor) for kind in kinds)


def _asked(pool: Pool, kinds: Sequence[NodeType], most: int) -> tuple[int, int]:
    if isinstance(pool.actors, ActorRange):
        return pool.actors.min, pool.actors.max
    if isinstance(pool.actors, int):
        return pool.actors, pool.actors
    if pool.gpus_per_actor:
        return 1, most
    # One single-threaded actor per core, as far as one CPU stays free to read with.
    cores = sum(kind.cpus * kind.count for kind in kinds)
    wanted = max(1, min(int(cores), int((cores - 1) / pool.cpus)))
    return wanted, wanted


def _await(
    size: PoolSize, wait: float, say: Callable[[str], None], beside: PoolSize | None
) -> None:
    """Return once the smallest pool fits into what is free on the nodes that are there."""
    for _ in range(GRACE_POLLS):
        if _fits(size, beside):
            return
        # Ray takes a moment to count what a task of this run has given back.
        time.sleep(_POLL_SECONDS / 2)
    bundle = {"CPU": size.cpus, **({"GPU": size.gpus} if size.gpus else {})}
    request_resources(bundles=[bundle] * size.smallest)
    deadline, said = time.monotonic() + wait, -math.inf
    try:
        while not _fits(size, beside):
            left = deadline - time.monotonic()
            if left <= 0 or is_infeasible():
                reason = "no node type fits" if left > 0 else f"waited {wait:g} s in vain"
                raise ResourceError(
                    f"run.wait_for_resources: {size.smallest} x {bundle}: {reason}; there are"
                    f" {_listed(alive())}, of which {_listed(free())} are free. Lower what pool"
                    " asks for, or wait longer"
                )
            if time.monotonic() - said >= SAY_SECONDS:
                said = time.monotonic()
                say(f"waiting for {size.smallest} x {bundle}, {left:.0f} s left")
            time.sleep(min(_POLL_SECONDS, left))
    finally:
        request_resources(bundles=[])


def _fits(size: PoolSize, beside: PoolSize | None) -> bool:
    """Tell whether the pool fits beside the other one, which has not been started either."""
    nodes = beside_pool(free(), beside)
    return sum(kind.holds(size.cpus, size.gpus) for kind in nodes) >= size.smallest


def _listed(kinds: Sequence[NodeType]) -> str:
    shown = [f"{k.count} x ({k.cpus:g} CPU, {k.gpus:g} GPU)" for k in kinds if k.count]
    return ", ".join(shown) or "no nodes"
