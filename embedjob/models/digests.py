"""SHA-256 of every file that affects a model's output."""

import hashlib
import re
from collections.abc import Callable, Collection, Sequence

from embedjob.models import cache, hub
from embedjob.models.checkpoint import ADAPTER, MODEL, ModelFile, is_single, model_files
from embedjob.models.components import ModelComponents
from embedjob.models.source import (
    ModelSource,
    check_weights,
    materialize,
    module_weights,
    readable_files,
    source_kind,
    transformer_directory,
)
from embedjob.models.tables.static_tables import may_be_static
from embedjob.models.tokenizer_files import BESIDE, TOKENIZER, read_files
from embedjob.storage import objects

GENERATOR = "generator/"
_BLOCK = 1 << 24
# Read only if a model has no tokenizer.json; those of BESIDE also where they change its ids.
_VOCABULARIES = frozenset(
    {
        "vocab.txt",
        "vocab.json",
        "merges.txt",
        "spiece.model",
        "sentencepiece.bpe.model",
        "tokenizer.model",
        "whitespacetokenizer_config.json",
        "wordembedding_config.json",
        *BESIDE,
    }
)


_VERSION_OF = re.compile(r"tokenizer\.\d[\d.]*\.json")


def model_digests(components: ModelComponents) -> dict[str, str]:
    """Return the digests of all components of a recipe's model, by file name.

    The names of a base model's files begin with base/, those of adapters with adapters/N/, where
    N counts in the order of merging, those of a generator with generator/.
    """
    if components.weights == components.model:
        digests = file_digests(components.model)
    else:
        texts = model_files(str(materialize(components.model, tokenizer_only=True)))
        digests = _sha256s(texts, _texts(texts, components.model))
        base = file_digests(components.weights).items()
        digests |= {f"base/{name}": sha256 for name, sha256 in base if not _is_tokenizer(name)}
    for number, adapter in enumerate(components.adapters):
        own = file_digests(adapter).items()
        digests |= {f"adapters/{number}/{name}": sha256 for name, sha256 in own}
    return digests | _of_generator(components, model_digests)


def tokenizer_digests(components: ModelComponents) -> dict[str, str]:
    """Return the digests of the files that texts are tokenized by, named as by `model_digests`.

    No weights are read, apart from those that share a file with their tokenizer.
    """
    made = _of_generator(components, tokenizer_digests)
    if is_single(components.model.model):
        return file_digests(components.model) | made
    files = model_files(str(materialize(components.model, tokenizer_only=True)))
    named = _texts(files, components.model)
    return _sha256s(files, {name for name in named if _is_tokenizer(name)}) | made


def _of_generator(
    components: ModelComponents, digests_of: Callable[[ModelComponents], dict[str, str]]
) -> dict[str, str]:
    if components.generator is None:
        return {}
    found = digests_of(components.generator).items()
    return {f"{GENERATOR}{name}": sha256 for name, sha256 in found}


def file_digests(source: ModelSource) -> dict[str, str]:
    """Return the SHA-256 of a model's weights, config and tokenizer files, modules included.

    A file is read once per node: its digest is cached until the file changes. Weights on the hub
    are not fetched, because the hub records their SHA-256.
    """
    if source_kind(source.model, source.layout) == "fit":
        return {}
    files = readable_files(source)
    if not files:
        texts = model_files(str(materialize(source, tokenizer_only=True)))
        wanted = {*_texts(texts, source), *_configs(source)}
        return _sha256s(texts, wanted) | _hub_weights(source, texts)
    if is_single(files[0].name) and len(files) == 1:
        return {files[0].name: _sha256(files[0])}
    weights = _weights([file.name for file in files], source, files)
    return _sha256s(files, {*weights, *_texts(files, source), *_configs(source)})


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


def _texts(files: Sequence[ModelFile], source: ModelSource) -> set[str]:
    """Return the names of the config and tokenizer files, also in a subdirectory 0_*."""
    if source.layout is ADAPTER:
        return {source.layout.config}
    names = {file.name: file.name.rpartition("/")[2] for file in files}
    wanted: Collection[str] = _VOCABULARIES
    if TOKENIZER in names.values():
        # The tokenizer of a base model is not read.
        counts = source.layout is MODEL and _others_count(source)
        wanted = {TOKENIZER, *(BESIDE if counts else ())}
        # tokenizer_config.json may name a tokenizer.json for each version of transformers.
        versions = {name for name in names.values() if _VERSION_OF.fullmatch(name)}
        wanted |= versions if counts else set()
    inner = {name for name in names if "/" not in name or name.startswith("0_")}
    return {name for name in inner if names[name] == "config.json" or names[name] in wanted}


def _others_count(source: ModelSource) -> bool:
    """Return whether the files beside tokenizer.json change its ids."""
    directory = materialize(source, tokenizer_only=True)
    # A static table's tokenizer.json is read as it is.
    if may_be_static(directory):
        return False
    return read_files(transformer_directory(directory)).differs is not None


def _is_tokenizer(name: str) -> bool:
    file = name.rpartition("/")[2]
    return file in {TOKENIZER, *_VOCABULARIES} or bool(_VERSION_OF.fullmatch(file))


def _sha256s(files: Sequence[ModelFile], names: set[str]) -> dict[str, str]:
    return {file.name: _sha256(file) for file in files if file.name in names}


def _sha256(file: ModelFile) -> str:
    cached = cache.cached_json(["sha256", file.version], lambda: {"sha256": _read(file)})
    return str(cached["sha256"])


def _read(file: ModelFile) -> str:
    total = hashlib.sha256()
    with objects.open_unchanged(file.stored) as handle:
        while block := handle.read(_BLOCK):
            total.update(block)
    return total.hexdigest()
