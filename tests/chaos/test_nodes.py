"""Three nodes, of which some die and others join while a run goes on."""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest

from embedjob.errors import AccessError
from embedjob.job.options import Options
from tests import running
from tests.chaos.compared import Done, done
from tests.cluster import ROOT, Cluster, Node, add_node, ray_cluster
from tests.drivers import SEEDS, SLOW_SEEDS, chance_of
from tests.outputs import written
from tests.running import Job, texts, write_shard

pytestmark = pytest.mark.ray
SHARDS, SHARD_ROWS, CHUNK_ROWS = 3, 100, 10
CHUNKS = SHARDS * SHARD_ROWS // CHUNK_ROWS
# Beside the head, where the driver is.
OTHERS = 2
# Dead nodes are found in two seconds, where Ray alone would take half a minute.
QUICK = {"RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "500"}


@dataclass
class Nodes:
    """A head, and nodes that come and go; each has an address of its own."""

    head: Cluster
    environment: dict[str, str]
    others: list[Node] = field(default_factory=list)
    _ips: Iterator[int] = field(default_factory=lambda: count(2))

    def add(self, *before: str) -> Node:
        ip = f"127.0.0.{next(self._ips)}"
        node = add_node(self.head, self.environment, ip=ip, before=before)
        self.others.append(node)
        return node

    def lose(self, node: Node) -> None:
        self.others.remove(node)
        node.kill()

    @contextmanager
    def in_trouble(self, chance: random.Random, out: Path, losses: int) -> Iterator[None]:
        """Lose a node once some chunks are there, soon have another; again and again."""
        over = threading.Event()

        def trouble() -> None:
            for _ in range(losses):
                at = len(written(out)) + chance.randrange(1, CHUNKS // (2 * losses))
                while len(written(out)) < at and not over.is_set():
                    time.sleep(0.02)
                over.wait(chance.random())
                self.lose(chance.choice(self.others))
                over.wait(3 * chance.random())
                self.add()

        thread = threading.Thread(target=trouble)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@pytest.fixture(scope="module")
def nodes(ray_settings: dict[str, str]) -> Iterator[Nodes]:
    environment = {**os.environ, **ray_settings, **QUICK, "PYTHONPATH": str(ROOT)}
    with ray_cluster(environment, cpus=1) as head:
        them = Nodes(head, environment)
        try:
            for _ in range(OTHERS):
                them.add()
            yield them
        finally:
            for node in them.others:
                node.kill()


@dataclass(frozen=True)
class Bench:
    """Three nodes, a corpus and a model."""

    nodes: Nodes
    source: Path
    model: Path

    def job(self, out: Path) -> Job:
        return running.job(
            self.source,
            out,
            self.model,
            encoder={"max_tokens": 72},
            pool={"actors": {"min": 1, "max": 1 + OTHERS}, "cpus_per_actor": 0.5},
        )

    def run(self, folder: Path) -> Done:
        return done(self.job(folder / "out"), self.nodes.head, folder / "encoded")


@pytest.fixture(scope="module")
def bench(nodes: Nodes, slow_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    source = tmp_path_factory.mktemp("in")
    for shard in range(SHARDS):
        bodies = [f"{text} {text} {text}" for text in texts(SHARD_ROWS, seed=shard)]
        write_shard(source / f"{shard}.parquet", bodies)
    return Bench(nodes, source, slow_model)


@pytest.fixture(scope="module")
def quiet(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Done:
    return bench.run(tmp_path_factory.mktemp("quiet"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", SEEDS)
def test_nodes_that_come_and_go_change_nothing_of_a_run(
    seed: int, bench: Bench, quiet: Done, tmp_path: Path, say: Callable[[str], None]
) -> None:
    losses = 1 if seed < SLOW_SEEDS else 2
    with bench.nodes.in_trouble(chance_of(seed, "nodes"), tmp_path / "out", losses):
        ended = bench.run(tmp_path)
    say(f"seed {seed}: {ended.beside(quiet)}")
    ended.require_equal(quiet)


@pytest.mark.slow
def test_a_node_with_a_disk_of_its_own_is_named(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    hide = 'mount -t tmpfs none "$0" && exec "$@"'
    node = bench.nodes.add("unshare", "--mount", "sh", "-c", hide, str(out))
    try:
        with pytest.raises(AccessError, match=r"node .*: .* this node does not see the file"):
            running.run_with(bench.job(out), Options(address=bench.nodes.head.address))
    finally:
        bench.nodes.lose(node)
    assert written(out) == {}
