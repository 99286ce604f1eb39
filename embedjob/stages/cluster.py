"""Joins a Ray cluster, and settles what the actor pool may ask of it before anything is loaded."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import state
from ray.autoscaler.sdk import request_resources
from ray.data import DataContext

from embedjob.config import ActorRange, Pool
from embedjob.errors import ResourceError
from embedjob.stages.encode import PoolSize

POLL_SECONDS = 2.0


@dataclass(frozen=True)
class NodeType:
    """Nodes of one shape: how many CPUs and GPUs each has, and how many there are or could be."""

    cpus: float
    gpus: float
    count: int

    def holds(self, cpus: float, gpus: float) -> int:
        """How many actors of this size such nodes can hold together."""
        per_cpu = self.cpus / cpus if cpus else float("inf")
        per_gpu = self.gpus / gpus if gpus else float("inf")
        each = min(per_cpu, per_gpu)
        return 0 if each == float("inf") else int(each + 1e-6) * self.count


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Ray, joined at `address`, or where RAY_ADDRESS says, or started here; left at the end."""
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # Every actor pool of Ray Data makes the driver's core print a warning about itself as an error.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    on_terminate = signal.getsignal(signal.SIGTERM)
    joins = address is not None or "RAY_ADDRESS" in os.environ
    # A Ray that lives for one run needs no dashboard, which takes seconds to start.
    mine: dict[str, Any] = {} if joins else {"include_dashboard": False}
    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **mine)
    # Ray's own handler would end the process at once, with finished chunks in hand.
    signal.signal(signal.SIGTERM, on_terminate)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # A chunk is one block row, and a row is never split; without the limit Ray does not try.
    context.target_max_block_size = None
    try:
        yield
    finally:
        ray.shutdown()


def size_pool(pool: Pool, *, chunks: int, wait: float, say: Callable[[str], None]) -> PoolSize:
    """The pool that fits this cluster, waited for while it scales up.

    Raises:
        ResourceError: no node that exists or could be launched holds one actor, no CPU would be
            left to read with (Ray Data would then wait for ever), or the wait was in vain.
    """
    now, ever = _alive(), [*_alive(), *_launchable()]
    need = f"one actor needs {pool.cpus:g} CPUs and {pool.gpus_per_actor:g} GPUs"
    most = sum(kind.holds(pool.cpus, pool.gpus_per_actor) for kind in ever)
    if not most:
        raise ResourceError(
            f"pool: {need}, and no node has that or could be launched with it; there are"
            f" {_listed(ever)}. Lower pool.gpus_per_actor or pool.cpus_per_actor"
        )
    smallest, largest = _asked(pool, ever, most)
    smallest, largest = min(smallest, chunks), min(largest, chunks)
    spare = sum(kind.cpus * kind.count for kind in ever) - smallest * pool.cpus
    if smallest > most or spare < 1:
        raise ResourceError(
            f"pool.actors: {smallest} were asked for and {need}, beside 1 CPU to read with; there"
            f" are {_listed(ever)}. Lower pool.actors or pool.cpus_per_actor"
        )
    size = PoolSize(smallest, largest, pool.cpus, pool.gpus_per_actor)
    if sum(kind.holds(size.cpus, size.gpus) for kind in now) < smallest:
        _await(size, wait, say)
    return size


def threads_per_actor(size: PoolSize) -> int:
    """Torch threads for each actor: on CPU the cluster's cores are shared out, beside a GPU one."""
    if size.gpus:
        return 1
    cores = sum(kind.cpus * kind.count for kind in _alive())
    return max(1, int(cores // size.largest))


def _asked(pool: Pool, kinds: list[NodeType], most: int) -> tuple[int, int]:
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


def _await(size: PoolSize, wait: float, say: Callable[[str], None]) -> None:
    bundle = {"CPU": size.cpus, **({"GPU": size.gpus} if size.gpus else {})}
    request_resources(bundles=[bundle] * size.smallest)
    deadline = time.monotonic() + wait
    try:
        while sum(kind.holds(size.cpus, size.gpus) for kind in _alive()) < size.smallest:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ResourceError(
                    f"run.wait_for_resources: waited {wait:g} s for {size.smallest} x {bundle};"
                    f" there are {_listed(_alive())}"
                )
            say(f"waiting for {size.smallest} x {bundle}, {left:.0f} s left")
            time.sleep(min(POLL_SECONDS, left))
    finally:
        request_resources(bundles=[])


def _alive() -> list[NodeType]:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [_node_type(resources, 1) for resources in nodes]


def _launchable() -> list[NodeType]:
    config = state.state.get_cluster_config()
    groups = config.node_group_configs if config else []
    return [_node_type(group.resources, group.max_count) for group in groups]


def _node_type(resources: Mapping[str, float], count: int) -> NodeType:
    return NodeType(resources.get("CPU", 0.0), resources.get("GPU", 0.0), count)


def _listed(kinds: list[NodeType]) -> str:
    shown = [f"{k.count} x ({k.cpus:g} CPU, {k.gpus:g} GPU)" for k in kinds if k.count]
    return ", ".join(shown) or "no nodes"
