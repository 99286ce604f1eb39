import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, cast

import pytest

from embedjob.config.recipe import Recipe
from embedjob.errors import InterruptedRunError, RefusedError, ResourceError
from embedjob.output import lease
from embedjob.stages.cluster import Look, preflight, preflight_here
from embedjob.stages.connection import connected
from embedjob.stages.engine import Engine, RecipeEngine
from tests.cluster import Cluster
from tests.planned import files_of


@pytest.mark.ray
def test_a_node_is_refused_by_its_name_unless_it_sees_what_the_driver_has_put(
    cluster: Cluster, model: Path, tmp_path: Path
) -> None:
    recipe = Recipe(model=str(model), max_tokens=24)
    engine, files = RecipeEngine(recipe.model_dump_json()), files_of(recipe)
    shard, out = tmp_path / "in.parquet", tmp_path / "out"
    shard.touch()
    look = Look(engine, files, str(shard), lease.acquire(str(out), job="test"))
    another = replace(look.lease, token="another")
    host = socket.gethostname()
    with connected(cluster.address):
        [node] = preflight(look)
        # As from a Ray that this process has started.
        assert preflight_here(look) == {node}
        assert preflight(look, but={node}) == {node}
        odd = tmp_path / os.fsdecode(b"caf\xe9.parquet")  # no UTF-8
        odd.touch()
        assert preflight(replace(look, shard=str(odd))) == {node}
        for spoiled, reason in (
            (replace(look, lease=another), "does not see the file that the driver"),
            (replace(look, shard=f"{shard}-gone"), "the driver sees this shard"),
            (replace(look, shard=f"{odd}-gone"), r"caf\\udce9\.parquet-gone: the driver sees"),
            (replace(look, files=replace(files, digests=())), r"tokenizer\.json is another file"),
        ):
            for looks in (preflight, preflight_here):
                with pytest.raises(RefusedError, match=f"^node {host}: .*{reason}"):
                    looks(spoiled)


@dataclass(frozen=True)
class _Raises:
    """An engine whose tokenizer raises an error of this class as it loads."""

    kind: type[Exception]

    def load_tokenizer(self) -> NoReturn:
        raise self.kind("what comes in between")


def test_a_look_from_this_process_is_a_refusal_or_a_signal(model: Path, tmp_path: Path) -> None:
    shard, out = tmp_path / "in.parquet", tmp_path / "out"
    shard.touch()
    mine = lease.acquire(str(out), job="test")
    files = files_of(Recipe(model=str(model)))
    look = Look(cast(Engine, _Raises(OSError)), files, str(shard), mine)
    with pytest.raises(ResourceError, match=r"^node .*: cannot look .*what comes in between"):
        preflight_here(look)
    with pytest.raises(InterruptedRunError, match=r"^what comes in between$"):
        preflight_here(replace(look, engine=cast(Engine, _Raises(InterruptedRunError))))
