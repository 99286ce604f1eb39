"""What of a model decides its vectors, as sha256 of the files that hold it."""

import hashlib
from collections.abc import Sequence

from embedjob.models import cache, hub
from embedjob.models.checkpoint import ADAPTER, MODEL, CheckpointLayout, ModelFile, model_files
from embedjob.models.components import ModelComponents
from embedjob.models.source import (
    ModelSource,
    check_weights,
    materialize,
    module_weights,
    readable_files,
)
from embedjob.storage import objects

_BLOCK = 1 << 24
# Read only where a model brings no tokenizer.json.
_VOCABULARIES_WORDS = """
vocab.txt vocab.json merges.txt spiece.model sentencepiece.bpe.model tokenizer.model
tokenizer_config.json special_tokens_map.json added_tokens.json
"""
_VOCABULARIES = frozenset(_VOCABULARIES_WORDS.split())


def model_digests(made_of: ModelComponents) -> dict[str, str]:
    """The digests of everything that a recipe's model is made of.

    The model's own files go by their names; those of a base and of adapters, which are numbered in
    the order of merging, are named apart.
    """
    if made_of.weights == made_of.model:
        found = file_digests(made_of.model)
    else:
        texts = model_files(str(materialize(made_of.model, tokenizer_only=True)))
        found = _sha256s(texts, _texts(texts, MODEL))
        base = file_digests(made_of.weights).items()
        found |= {f"base/{name}": one for name, one in base if not _is_tokenizer(name)}
    for number, adapter in enumerate(made_of.adapters):
        found |= {f"adapters/{number}/{name}": one for name, one in file_digests(adapter).items()}
    return found


def file_digests(source: ModelSource) -> dict[str, str]:
    """The sha256 of a model's weights, config and tokenizer files, by name; its modules' too.

    A file is read once per node: what was found is remembered until the file changes. Weights on
    the hub are not fetched for it, because the hub records their sha256.
    """
    files = readable_files(source)
    if not files:
        texts = model_files(str(materialize(source, tokenizer_only=True)))
        wanted = {*_texts(texts, source.layout), *_configs(source)}
        return _sha256s(texts, wanted) | _hub_weights(source, texts)
    if files[0].name.endswith(".gguf"):
        return {files[0].name: _sha256(files[0])}
    weights = _weights([file.name for file in files], source, files)
    return _sha256s(files, {*weights, *_texts(files, source.layout), *_configs(source)})


def _hub_weights(source: ModelSource, texts: Sequence[ModelFile]) -> dict[str, str]:
    recorded = {
        file.rfilename: file.lfs.sha256
        for file in hub.model_record(source.model, source.revision, key=source.layout.key).siblings
        or ()
        if file.lfs is not None
    }
    return {name: recorded[name] for name in _weights(list(recorded), source, texts)}


def _weights(names: list[str], source: ModelSource, texts: Sequence[ModelFile]) -> list[str]:
    return [*check_weights(names, source, texts), *module_weights(names, source)]


def _configs(source: ModelSource) -> list[str]:
    return [f"{module}/config.json" for module in source.modules]


def _texts(files: Sequence[ModelFile], layout: CheckpointLayout) -> set[str]:
    """The names of the config and tokenizer files, those one level down included."""
    if layout is ADAPTER:
        return {layout.config}
    names = {file.name: file.name.rpartition("/")[2] for file in files}
    ready = "tokenizer.json" in names.values()
    wanted = {"tokenizer.json"} if ready else _VOCABULARIES
    inner = {name for name in names if "/" not in name or name.startswith("0_")}
    return {name for name in inner if names[name] == "config.json" or names[name] in wanted}


def _is_tokenizer(name: str) -> bool:
    return name.rpartition("/")[2] in {"tokenizer.json", *_VOCABULARIES}


def _sha256s(files: Sequence[ModelFile], names: set[str]) -> dict[str, str]:
    return {file.name: _sha256(file) for file in files if file.name in names}


def _sha256(file: ModelFile) -> str:
    found = cache.cached_json(["sha256", file.version], lambda: {"sha256": _read(file)})
    return str(found["sha256"])


def _read(file: ModelFile) -> str:
    total = hashlib.sha256()
    with objects.open_unchanged(file.stored) as handle:
        while block := handle.read(_BLOCK):
            total.update(block)
    return total.hexdigest()
