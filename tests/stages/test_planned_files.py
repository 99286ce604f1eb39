"""What an engine loads: the files of the plan, and nothing of how it loads them stays.

Covers: embedjob.stages.engine
"""

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedjob.config.recipe import Recipe
from embedjob.encoder.batching import transfers
from embedjob.errors import ModelError
from embedjob.stages.engine import PlannedFiles, RecipeEngine
from tests.planned import files_of


@pytest.fixture
def own(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


@pytest.fixture
def planned(own: Path) -> PlannedFiles:
    return files_of(Recipe(model=str(own)))


def change(path: Path) -> None:
    """Replace a file by one of the same size, as a new version of a model is."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.unlink()
    path.write_bytes(content)


def test_the_files_of_the_plan_pass(planned: PlannedFiles) -> None:
    planned.check()
    planned.check_tokenizer()


def test_other_weights_are_named_with_their_node(
    planned: PlannedFiles, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "node-7")
    planned.check()
    change(own / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors is another file on node node-7"):
        planned.check()
    # Who tokenizes reads no weights.
    planned.check_tokenizer()


def test_another_tokenizer_is_named(planned: PlannedFiles, own: Path) -> None:
    change(own / "tokenizer.json")
    for check in (planned.check, planned.check_tokenizer):
        with pytest.raises(ModelError, match=r"tokenizer\.json is another file on node"):
            check()


def test_a_file_that_only_one_node_has_is_named(planned: PlannedFiles, own: Path) -> None:
    (own / "model.safetensors").rename(own / "model-00001-of-00001.safetensors")
    with pytest.raises(ModelError):
        planned.check()


@pytest.fixture(params=[True, False])
def collects(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether garbage is collected in this process."""
    before = gc.isenabled()
    (gc.enable if request.param else gc.disable)()
    yield request.param
    (gc.enable if before else gc.disable)()


def test_a_load_leaves_the_garbage_collector_as_it_was(
    own: Path, collects: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This process is not the encoder's own.
    monkeypatch.setattr(transfers, "keep_freed_memory", lambda: None)
    engine = RecipeEngine(Recipe(model=str(own), max_tokens=24).model_dump_json())
    engine.load_encoder()
    assert gc.isenabled() is collects
    (own / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        engine.load_encoder()
    assert gc.isenabled() is collects
