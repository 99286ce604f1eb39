"""Static tables: models that are one vector for each word or token, without a transformer.

They come as a single file of words (`models/tables/word_tables.py`), or as a folder that model2vec
or sentence-transformers saved. A file is unpacked once per node, to a folder of the same kind.
Sources: sentence-transformers' WordEmbeddings and StaticEmbedding (Reimers and Gurevych, EMNLP
2019, arXiv:1908.10084), model2vec (Tulkens and van Dongen, 2024).

Shapes: V rows, D width.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from embedjob.config.recipe import Split
from embedjob.errors import ModelError
from embedjob.models import cache
from embedjob.models.checkpoint import read_json, read_tensor, tensors_of
from embedjob.models.tables.word_tables import is_vocabulary, read_table
from embedjob.storage import objects
from embedjob.text.lookup.terms import TermLookup, TermRules
from embedjob.text.lookup.word_lookup import TokenLookup, WordLookup
from embedjob.text.views import TokenizesTexts
from embedjob.vectors.vocabulary import SKETCH, Vocabulary, vocabulary_of

# What config_of gives as the model_type of a static table.
STATIC = "static table"
# Both libraries take any number of words; only model2vec has a limit of its own.
_NO_LIMIT = 1_000_000
_MODEL2VEC_TOKENS = 512
_WORDS = "words.txt"
_WHITESPACE = "whitespacetokenizer_config.json"
_WEIGHTS = "model.safetensors"
_UNPACKED = "static_table.json"
_VOCABULARY = "vocabulary.safetensors"
_UNFITTED = "unfitted.json"
_MODULES = ("StaticEmbedding", "WordEmbeddings")
# The tensor that holds the vectors, by who saved it.
_TENSORS = ("emb_layer.weight", "embedding.weight", "embeddings")
_ROWS_AT_ONCE = 1 << 16
_UNIT = {"normalize": True}


@dataclass(frozen=True)
class StaticTable:
    """Where the vectors of a static table are, and how texts find them.

    `tensor` is the name of the vectors [V, D] in the file `weights`; `folded` says that `mapping`
    and `weights` of model2vec lie beside them. `by_words` is whether texts are cut at blanks and
    looked up; else tokenizer.json gives the rows, and the unknown token counts unless the table is
    model2vec's.
    """

    weights: Path
    tensor: str
    rows: int
    width: int
    by_words: bool

    @property
    def drops_unknown(self) -> bool:
        """Whether the tokenizer's unknown token is left out."""
        return self.tensor == "embeddings"

    @property
    def is_vocabulary(self) -> bool:
        """Whether it is a vocabulary that a fit has made: its rows are terms, without vectors."""
        return self.tensor == "documents"

    @property
    def config(self) -> dict[str, Any]:
        """What a config.json would say."""
        return {
            "model_type": STATIC,
            "hidden_size": self.width,
            "num_hidden_layers": 0,
            "vocab_size": self.rows,
            "counts_terms": self.is_vocabulary,
        }


def is_static(config: Mapping[str, Any] | None) -> bool:
    """Return whether a config, as `config_of` gives it, is that of a static table."""
    return bool(config) and (config or {}).get("model_type") == STATIC


def unpacked(path: Path) -> Path:
    """Return the folder that a file of words is unpacked to, once per node.

    ModelError where the file is damaged, has no words, or a number that is not finite.
    """
    return cache.build_once(path.stem, [_version(path)], lambda to: _unpack(path, to))


def static_table(directory: Path) -> StaticTable | None:
    """Return the static table in a folder; None where the folder is another model's.

    ModelError where its file of vectors is missing or damaged.
    """
    if (directory / _UNFITTED).exists():
        return StaticTable(directory / _UNFITTED, "documents", 0, SKETCH, True)
    inner = _inner(directory)
    if inner is None:
        return None
    if (inner / _VOCABULARY).exists():
        rows = tensors_of(inner / _VOCABULARY)["documents"]["shape"][0]
        return StaticTable(inner / _VOCABULARY, "documents", rows, SKETCH, True)
    header = tensors_of(inner / _WEIGHTS)
    tensor = next((name for name in _TENSORS if name in header), None)
    if tensor is None:
        raise ModelError(
            f"encoder.model: {inner / _WEIGHTS} has {', '.join(header) or 'no tensors'}; allowed is"
            f" a table under {', '.join(_TENSORS)}, as sentence-transformers or model2vec saves it"
        )
    shape = header[tensor]["shape"]
    mapping = header.get("mapping")
    if len(shape) != len("VD") or not all(shape):
        raise ModelError(
            f"encoder.model: {inner / _WEIGHTS}: {tensor} has the shape {shape}; allowed is one"
            " row of numbers for each word, and at least one row"
        )
    rows = shape[0] if mapping is None else mapping["shape"][0]
    by_words = not (inner / "tokenizer.json").exists()
    return StaticTable(inner / _WEIGHTS, tensor, rows, shape[1], by_words)


def unfitted() -> Path:
    """Return the folder of a vocabulary that its fit is yet to make: it has no term."""
    return cache.build_once("unfitted", ["1"], lambda to: _touch(to / _UNFITTED))


def read_vocabulary(directory: Path) -> Vocabulary | None:
    """Return the vocabulary in a folder; None where it has none, ModelError where it is damaged."""
    path = directory / _VOCABULARY
    if not path.exists():
        return None
    header = tensors_of(path)
    try:
        return vocabulary_of({name: read_tensor(path, header, name) for name in header})
    except ValueError as error:
        raise ModelError(f"encoder.model: {path} is no vocabulary: {error}") from error


def may_be_static(directory: Path) -> bool:
    """Return whether a folder, perhaps without its weights, is that of a static table."""
    return _inner(directory) is not None


def static_layer(directory: Path, table: StaticTable) -> dict[str, Any]:
    """Return the keys that a static table's folder sets, as `folder_layer` does.

    ModelError where a module of the folder is none that a table goes with.
    """
    inner = table.weights.parent
    keys: dict[str, Any] = {"attention": "bidirectional", "max_tokens": _NO_LIMIT}
    if table.is_vocabulary:
        # A sketch may be 0, and rows are compared by their sparse entries.
        compared = {"embedding": "dot", "weight": 0.0, "sparse": 1.0}
        own = {"heads": [{"bag_of_words": {}}], "finish": [], "similarity": compared}
        return {"encoder": keys | own, "roles": {}}
    if table.drops_unknown:
        config = read_json(inner / "config.json") or {}
        keys["max_tokens"] = config.get("max_length", _MODEL2VEC_TOKENS) or _NO_LIMIT
        keys["finish"] = [_UNIT] if config.get("normalize") else []
        return {"encoder": keys, "roles": {}}
    if (directory / _UNPACKED).exists():
        return {"encoder": keys, "roles": {}}
    settings = read_json(inner / "wordembedding_config.json") or {}
    keys["max_tokens"] = settings.get("max_seq_length") or _NO_LIMIT
    keys |= _modules(directory)
    return {"encoder": keys, "roles": {}}


def check_finite(table: StaticTable) -> None:
    """Raise ModelError where a number of a table is not finite; a file is read once per node."""
    version = _version(table.weights)
    facts = cache.cached_json(["static table", version], lambda: {"row": _first_bad(table)})
    if facts["row"] is not None:
        raise ModelError(
            f"encoder.model: {table.weights} has a number that is not finite in row"
            f" {facts['row']} of {table.rows}; give a table without NaN and infinity"
        )


def row_vectors(table: StaticTable) -> npt.NDArray[Any]:
    """Return the vectors [V, D], in the file's own numbers and read from it as they are used.

    A model2vec table with a mapping or weights is folded into one row for each token, in float32.
    """
    header = tensors_of(table.weights)
    vectors_VD = read_tensor(table.weights, header, table.tensor)
    if not table.drops_unknown or not {"mapping", "weights"} & header.keys():
        return vectors_VD
    if "mapping" in header:
        vectors_VD = vectors_VD[np.asarray(read_tensor(table.weights, header, "mapping"))]
    if "weights" in header:
        weights_V = np.asarray(read_tensor(table.weights, header, "weights"))
        vectors_VD = vectors_VD * weights_V[:, None]
    return np.asarray(vectors_VD, np.float32)


def lookup(table: StaticTable, *, max_tokens: int, split: Split | None = None) -> TokenizesTexts:
    """Return what finds the rows of texts in a table; ModelError where its words are not there.

    Passages are made by `split`, if given.
    """
    if table.is_vocabulary:
        made = read_vocabulary(table.weights.parent)
        terms, rules = ([], TermRules(True, "")) if made is None else (made.terms, _rules(made))
        return TermLookup(terms, rules, max_tokens=max_tokens)
    if table.by_words:
        return _word_lookup(table, max_tokens, split)
    path = table.weights.parent / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        # The library raises bare Exception, with the reason and without the path.
        raise ModelError(f"encoder.model: {path} is no tokenizer: {error}") from error
    if tokenizer.get_vocab_size() > table.rows:
        raise ModelError(
            f"encoder.model: {path} has {tokenizer.get_vocab_size()} tokens and {table.rows}"
            " vectors; was one of the folder's files replaced?"
        )
    unknown = _unknown(tokenizer) if table.drops_unknown else None
    return TokenLookup(tokenizer, max_tokens=max_tokens, left_out=unknown, split=split)


def _word_lookup(table: StaticTable, max_tokens: int, split: Split | None) -> WordLookup:
    inner = table.weights.parent
    if (inner / _WORDS).exists():
        words = (inner / _WORDS).read_text(encoding="utf-8").split("\n")
        return WordLookup(words, max_tokens=max_tokens, split=split)
    settings = read_json(inner / _WHITESPACE)
    if not isinstance(settings, dict) or not isinstance(settings.get("vocab"), list):
        raise ModelError(
            f"encoder.model: {inner} has no {_WHITESPACE} with a vocab; allowed is the"
            " WhitespaceTokenizer of sentence-transformers"
        )
    words = settings["vocab"]
    if len(words) > table.rows:
        raise ModelError(
            f"encoder.model: {inner} has {len(words)} words and {table.rows} vectors; was one of"
            " its files replaced?"
        )
    return WordLookup(
        words,
        max_tokens=max_tokens,
        # The library keeps the last place of a word that is there twice.
        places={word: place for place, word in enumerate(words)},
        left_out=settings.get("stop_words") or (),
        lower_case=bool(settings.get("do_lower_case")),
        split=split,
    )


def _unknown(tokenizer: Tokenizer) -> int | None:
    """Return the id of a tokenizer's unknown token; None where it has none."""
    model = json.loads(tokenizer.to_str())["model"]
    name = model.get("unk_token")
    if name is None:
        return None if model.get("unk_id") is None else int(model["unk_id"])
    return tokenizer.token_to_id(name)


def _rules(vocabulary: Vocabulary) -> TermRules:
    return TermRules(vocabulary.lowercase, vocabulary.token_pattern)


def _touch(path: Path) -> None:
    path.write_text("{}", encoding="utf-8")


def _unpack(path: Path, to: Path) -> None:
    if is_vocabulary(path.name):
        shutil.copyfile(path, to / _VOCABULARY)
        read_vocabulary(to)
        return
    # Only a run that begins with a table needs it.
    from safetensors.numpy import save_file

    table = read_table(path)
    # A line end is no word's: texts are cut there.
    words = [word.replace("\n", " ") for word in table.words]
    (to / _WORDS).write_text("\n".join(words), encoding="utf-8")
    save_file({"embedding.weight": table.vectors_VD}, to / _WEIGHTS)
    (to / _UNPACKED).write_text(json.dumps({"from": path.name}), encoding="utf-8")


def _inner(directory: Path) -> Path | None:
    """Return the folder of the table's own files; None where there is no table."""
    if any((directory / name).exists() for name in (_UNPACKED, _UNFITTED, _VOCABULARY)):
        return directory
    modules = read_json(directory / "modules.json") or []
    first = modules[0] if isinstance(modules, list) and modules else {}
    if str(first.get("type", "")).rpartition(".")[2] in _MODULES:
        return directory / str(first.get("path", ""))
    config = read_json(directory / "config.json")
    named = isinstance(config, dict) and (
        config.get("model_type") == "model2vec" or config.get("architectures") == ["StaticModel"]
    )
    return directory if named else None


def _modules(directory: Path) -> dict[str, Any]:
    """Return the finishing steps of a sentence-transformers folder."""
    keys: dict[str, Any] = {"finish": []}
    for module in (read_json(directory / "modules.json") or [])[1:]:
        name = str(module.get("type", "")).rpartition(".")[2]
        config = read_json(directory / str(module.get("path", "")) / "config.json") or {}
        if name == "Pooling":
            _require_mean(config, directory)
        elif name == "Normalize":
            keys["finish"] = [_UNIT]
        elif name != "Dropout":
            raise ModelError(
                f"{directory / 'modules.json'}: got the module {name} after a static table; allowed"
                " are Pooling, Dropout and Normalize"
            )
    return keys


def _require_mean(config: Mapping[str, Any], directory: Path) -> None:
    modes = config.get("pooling_mode") or [
        key.removeprefix("pooling_mode_").removesuffix("_tokens")
        for key, on in config.items()
        if key.startswith("pooling_mode_") and on
    ]
    if modes not in ("mean", ["mean"]):
        raise ModelError(
            f"{directory}: got the pooling {modes} over a static table; allowed is mean"
        )


def _first_bad(table: StaticTable) -> int | None:
    vectors_VD = row_vectors(table)
    for start in range(0, len(vectors_VD), _ROWS_AT_ONCE):
        finite_R = np.isfinite(vectors_VD[start : start + _ROWS_AT_ONCE]).all(axis=1)
        if not finite_R.all():
            return start + int(finite_R.argmin())
    return None


def _version(path: Path) -> str:
    stored = objects.stat(str(path))
    if stored is None:
        raise ModelError(f"encoder.model: {path} does not exist; give the path of a table")
    return f"{stored.url}:{stored.size}:{stored.etag}"
