"""The model's files on a node are compared with the files of the plan.

Covers: embedjob.stages.engine
"""

import shutil
from pathlib import Path

import pytest

from embedjob.config.recipe import Recipe
from embedjob.errors import ModelError
from embedjob.stages.engine import PlannedFiles
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
