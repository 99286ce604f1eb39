import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.data import DataContext

from embedjob.config.recipe import Recipe
from embedjob.errors import RefusedError, ResourceError
from embedjob.stages.cluster import Look, connected, preflight
from embedjob.stages.engine import RecipeEngine
from tests.cluster import Cluster
from tests.planned import files_of


@pytest.mark.ray
def test_what_outlives_a_run_starts_no_ray_of_its_own(cluster: Cluster) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with connected(cluster.address):
        assert ray.get(ray.put(1)) == 1
        # Ray's own handler would end the process with finished chunks in hand.
        assert signal.getsignal(signal.SIGTERM) is before
        # What one task yields must stay apart, and a chunk is one row, which cannot be split.
        assert DataContext.get_current().target_max_block_size == 1
    assert not ray.is_initialized()
    with pytest.raises(ray.exceptions.RaySystemError, match="not been started"):
        ray.put(1)
    assert not ray.is_initialized()


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    started = time.monotonic()
    refused = pytest.raises(ResourceError, match=r"127\.0\.0\.1:1: no Ray cluster answers there")
    with refused, connected("127.0.0.1:1"):
        pass
    assert time.monotonic() - started < 10
    assert not ray.is_initialized()


def test_an_address_in_the_environment_is_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ResourceError, match=r"127\.0\.0\.1:1"), connected(None):
        pass


@pytest.fixture
def dead_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What a Ray that was killed leaves behind: the address where nobody listens any more."""
    # Not tmp_path: Ray's sockets lie under it, and their paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        Path(folder, "ray").mkdir()
        Path(folder, "ray", "ray_current_cluster").write_text("127.0.0.1:1")
        yield "127.0.0.1:1"


def test_a_dead_cluster_is_not_waited_for_when_none_is_asked_for(dead_cluster: str) -> None:
    with connected(None):
        assert ray.get_runtime_context().gcs_address != dead_cluster
        assert ray.get(ray.put(1)) == 1


def test_auto_is_refused_at_once_where_the_latest_cluster_is_dead(dead_cluster: str) -> None:
    with pytest.raises(ResourceError, match="auto: no Ray cluster answers"), connected("auto"):
        pass


@pytest.mark.ray
def test_a_node_is_refused_by_its_name_unless_it_sees_what_the_driver_has_put(
    cluster: Cluster, model: Path, tmp_path: Path
) -> None:
    recipe = Recipe(model=str(model), max_tokens=24)
    engine, files = RecipeEngine(recipe.model_dump_json()), files_of(recipe)
    shard, out = tmp_path / "in.parquet", tmp_path / "out"
    shard.touch()
    mark = out / "leases" / "00000001.json"
    mark.parent.mkdir(parents=True)
    mark.write_text("the token")
    look = Look(engine, files, str(shard), str(out), (str(mark), "the token"))
    host = socket.gethostname()
    with connected(cluster.address):
        [node] = preflight(look)
        assert preflight(look, but={node}) == {node}
        for spoiled, reason in (
            (replace(look, mark=(str(mark), "another")), "does not see the file that the driver"),
            (replace(look, shard=f"{shard}-gone"), "the driver sees this shard"),
            (replace(look, files=replace(files, digests=())), r"tokenizer\.json is another file"),
        ):
            with pytest.raises(RefusedError, match=f"^node {host}: .*{reason}"):
                preflight(spoiled, but=frozenset())
