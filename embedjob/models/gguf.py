"""GGUF files: their header, and the transformers directory that they are unpacked to."""

import math
import shutil
from contextlib import redirect_stderr
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

from embedjob.errors import ModelError
from embedjob.models import cache
from embedjob.models.checkpoint import model_files


def header(path: Path) -> dict[str, Any]:
    """Return the fields of ModelInfo that a GGUF header gives; ModelError if it cannot be read."""
    return cache.cached_json(["gguf header", _identity(path)], lambda: _read_header(path))


def folder(path: Path, *, tokenizer_only: bool) -> Path:
    """Return the directory that a GGUF file is unpacked to, once per node.

    This takes half a minute for 135M parameters. Dequantised weights are kept in float32, because
    no 16-bit type holds the products of their scales.
    """
    key = [_identity(path), version("transformers")]
    bare = cache.build_once(f"{path.stem}-tokenizer", key, lambda to: _unpack_tokenizer(path, to))
    if tokenizer_only:
        return bare

    def fill(to: Path) -> None:
        shutil.copytree(bare, to, dirs_exist_ok=True)
        _unpack_weights(path, to)

    return cache.build_once(path.stem, key, fill)


def _identity(path: Path) -> str:
    return model_files(str(path))[0].version


def _read_header(path: Path) -> dict[str, Any]:
    # These libraries take seconds to import, and only GGUF files need them.
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        architecture = str(reader.fields["general.architecture"].contents())
        facts = {
            name: reader.fields[f"{architecture}.{key}"].contents()
            for name, key in {
                "hidden_size": "embedding_length",
                "layers": "block_count",
                "max_positions": "context_length",
            }.items()
        }
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ModelError(f"encoder.model: {path} cannot be read as GGUF ({error})") from error
    parameters = sum(math.prod(int(n) for n in tensor.shape) for tensor in reader.tensors)
    return {**facts, "causal": "bert" not in architecture, "parameters": parameters}


def _unpack_tokenizer(path: Path, to: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    try:
        # Files beside it may name code of their own, about which transformers would ask.
        options = {"gguf_file": path.name, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(path.parent, **options)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(f"encoder.model: {path} cannot be unpacked: {error}") from error
    _forget_quantization(config)
    config.save_pretrained(to)
    tokenizer.save_pretrained(to)


def _unpack_weights(path: Path, to: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from embedjob.models.quiet import quiet

    try:
        # The dequantiser's progress bar cannot be switched off: a line per tensor in a job's log.
        with quiet(), redirect_stderr(StringIO()):
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32
            )
            vars(model)["hf_quantizer"] = None
            _forget_quantization(model.config)
            model.save_pretrained(to)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(f"encoder.model: {path} cannot be unpacked: {error}") from error


def _forget_quantization(config: Any) -> None:
    if hasattr(config, "quantization_config"):
        del config.quantization_config
