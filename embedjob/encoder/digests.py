"""What of a model decides its vectors, as sha256 of the files that hold it."""

import hashlib
from collections.abc import Sequence

from embedjob import storage
from embedjob.encoder import cache, hub
from embedjob.encoder.files import ModelFile, model_files
from embedjob.encoder.source import (
    ModelSource,
    files_at_hand,
    materialize,
    module_weights,
    require_weights,
)

_BLOCK = 1 << 24
# Read only where a model brings no tokenizer.json.
_VOCABULARIES_WORDS = """
vocab.txt vocab.json merges.txt spiece.model sentencepiece.bpe.model tokenizer.model
tokenizer_config.json special_tokens_map.json added_tokens.json
"""
_VOCABULARIES = frozenset(_VOCABULARIES_WORDS.split())


def digests(source: ModelSource) -> dict[str, str]:
    """The sha256 of a model's weights, config and tokenizer files, by name; its modules' too.

    A file is read once per node: what was found is remembered until the file changes. Weights on
    the hub are not fetched for it, because the hub records their sha256.
    """
    files = files_at_hand(source)
    if not files:
        texts = model_files(str(materialize(source, tokenizer_only=True)))
        return _sha256s(texts, {*_texts(texts), *_configs(source)}) | _hub_weights(source)
    if files[0].name.endswith(".gguf"):
        return {files[0].name: _sha256(files[0])}
    weights = _weights([file.name for file in files], source)
    return _sha256s(files, {*weights, *_texts(files), *_configs(source)})


def _hub_weights(source: ModelSource) -> dict[str, str]:
    recorded = {
        file.rfilename: file.lfs.sha256
        for file in hub.described(source.model, source.revision).siblings or ()
        if file.lfs is not None
    }
    return {name: recorded[name] for name in _weights(list(recorded), source)}


def _weights(names: list[str], source: ModelSource) -> list[str]:
    return [*require_weights(names, source), *module_weights(names, source)]


def _configs(source: ModelSource) -> list[str]:
    return [f"{module}/config.json" for module in source.modules]


def _texts(files: Sequence[ModelFile]) -> set[str]:
    """The names of the config and tokenizer files, those one level down included."""
    names = {file.name: file.name.rpartition("/")[2] for file in files}
    ready = "tokenizer.json" in names.values()
    wanted = {"tokenizer.json"} if ready else _VOCABULARIES
    inner = {name for name in names if "/" not in name or name.startswith("0_")}
    return {name for name in inner if names[name] == "config.json" or names[name] in wanted}


def _sha256s(files: Sequence[ModelFile], names: set[str]) -> dict[str, str]:
    return {file.name: _sha256(file) for file in files if file.name in names}


def _sha256(file: ModelFile) -> str:
    found = cache.remembered(["sha256", file.version], lambda: {"sha256": _read(file)})
    return str(found["sha256"])


def _read(file: ModelFile) -> str:
    total = hashlib.sha256()
    with storage.open_unchanged(file.stored) as handle:
        while block := handle.read(_BLOCK):
            total.update(block)
    return total.hexdigest()
