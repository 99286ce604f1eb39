"""Model architecture by its config.json: sizes, attention, positions, experts; without weights."""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from embedjob.config.checks import check_rules
from embedjob.config.recipe import Recipe
from embedjob.errors import ConfigError, ModelError
from embedjob.models import gguf, hub, nvembed
from embedjob.models.checkpoint import ModelFile, model_files, read_json
from embedjob.models.components import weights_of
from embedjob.models.source import (
    ModelSource,
    address,
    check_weights,
    materialize,
    readable_files,
    source_kind,
    transformer_directory,
)
from embedjob.models.tables.static_tables import check_finite, is_static, static_table
from embedjob.storage import objects

# Architectures with bidirectional attention; all others are decoders. A table, because the driver
# must know without importing transformers; a test compares it with transformers.
ENCODER_TYPES = frozenset(
    {
        "albert",
        "bert",
        "big_bird",
        "camembert",
        "convbert",
        "data2vec-text",
        "deberta",
        "deberta-v2",
        "distilbert",
        "electra",
        "embedding_gemma2",
        "embedding_gemma2_text",
        "ernie",
        "esm",
        "esmc",
        "eurobert",
        "flaubert",
        "fnet",
        "funnel",
        "gte",
        "ibert",
        "jina_embeddings_v3",
        "layoutlm",
        "longformer",
        "luke",
        "megatron-bert",
        "mobilebert",
        "modernbert",
        "modernvbert",
        "mpnet",
        "mra",
        "mt5",
        "neomme",
        "new",
        "nomic_bert",
        "nystromformer",
        "perceiver",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "squeezebert",
        "t5",
        "tapas",
        "ultrabert",
        "ultravbert",
        "umt5",
        "xlm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
        "yoso",
    }
)
T5_TYPES = frozenset({"t5", "mt5", "umt5"})
# Their position table starts after the padding token's id: the places before it are not used.
_OFFSET_POSITIONS = frozenset(
    {
        "camembert",
        "data2vec-text",
        "ibert",
        "longformer",
        "luke",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
_SIZE_KEYS = ("hidden_size", "n_embd", "d_model", "dim")
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")
EXPERT_KEYS = ("num_experts", "n_routed_experts", "num_local_experts")
_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window", "window_size")
# Their angles depend on the length of the whole input, so a prefix cannot be run by itself.
_LENGTH_BOUND_ROPES = frozenset({"dynamic", "longrope"})
_OLD_NAMES = {"su": "longrope"}
_ORIGINAL_POSITIONS = "original_max_position_embeddings"


@dataclass(frozen=True)
class ModelInfo:
    """The size and kind of a model.

    `causal` marks a decoder; `max_positions` is None without a limit. `vocabulary` counts the token
    ids that have an embedding, None if the config does not say. With `length_bound` the model has
    more positions, but a longer text would change those of the texts in its micro-batch. A `static`
    table has neither layers nor attention; a vocabulary `counts_terms`.
    """

    hidden_size: int
    layers: int
    causal: bool
    max_positions: int | None
    parameters: int | None
    vocabulary: int | None = None
    length_bound: bool = False
    static: bool = False
    counts_terms: bool = False

    @property
    def kind(self) -> str:
        """What it is, for people."""
        table = "a static table, in which words are looked up without a transformer"
        return table if self.static else "a transformer"


@dataclass(frozen=True)
class HeadWidths:
    """The widths of outputs beside the vector; None for a head that the recipe does not have.

    `vocabulary` bounds the sparse entries, `routers` counts the router scores of their column,
    and `joined` the router scores that are part of the vector.
    """

    vocabulary: int | None = None
    routers: int | None = None
    joined: int = 0


def model_info(source: ModelSource) -> ModelInfo:
    """Return size and kind of a model; ModelError if it has no weights or cannot be found."""
    if source_kind(source.model) == "gguf":
        return ModelInfo(**gguf.header(Path(address(source.model))))
    directory = materialize(source, tokenizer_only=True)
    table = static_table(directory)
    if table is not None:
        if not table.is_vocabulary:
            check_finite(table)
        numbers = None if table.is_vocabulary else table.rows * table.width
        return info_of(table.config, parameters=numbers)
    return info_of(config_of(directory), parameters=_parameters(weights_of(source)))


def info_of(config: Mapping[str, Any], *, parameters: int | None = None) -> ModelInfo:
    """Return size and kind of a model by its config.json; ModelError if it does not give them."""
    config = {**config, **(config.get("text_config") or {})}
    model_type = str(config.get("model_type"))
    if config.get("is_encoder_decoder") and model_type not in T5_TYPES:
        raise ModelError(
            f"encoder.model: {model_type} models have an encoder and a decoder, which is not"
            f" available in this version, except for {', '.join(sorted(T5_TYPES))}"
        )
    size, layers = _first_number(config, _SIZE_KEYS), _first_number(config, _LAYER_KEYS)
    if is_static(config) and size is not None:
        rows = _first_number(config, ("vocab_size",))
        counts = bool(config.get("counts_terms"))
        return ModelInfo(
            size, 0, False, None, parameters, vocabulary=rows, static=True, counts_terms=counts
        )
    if size is None or layers is None:
        raise ModelError(
            f"encoder.model: its config.json ({model_type}) has no hidden size or layers;"
            f" looked for {', '.join(_SIZE_KEYS)} and {', '.join(_LAYER_KEYS)}"
        )
    positions = None if model_type in T5_TYPES else _first_number(config, _POSITION_KEYS)
    if positions and model_type in _OFFSET_POSITIONS:
        positions -= int(config.get("pad_token_id") or 0) + 1
    vocabulary = _first_number(config, ("vocab_size",))
    steady = steady_positions(config)
    return ModelInfo(
        size,
        layers,
        is_causal(config),
        max_positions=steady or positions,
        parameters=parameters,
        vocabulary=vocabulary,
        length_bound=steady is not None,
    )


def is_causal(config: Mapping[str, Any]) -> bool:
    """Tell whether a model's own attention is causal, by its config.json."""
    if config.get("use_bidirectional_attention") or config.get("is_causal") is False:
        return False
    if config.get("model_type") in (nvembed.MODEL_TYPE, nvembed.BACKBONE_TYPE):
        return False
    return config.get("model_type") not in ENCODER_TYPES or bool(config.get("is_decoder"))


def check_model(recipe: Recipe, info: ModelInfo) -> None:
    """Raise ModelError if the model cannot have the recipe's attention, layer, blocks or length."""
    check_rules(recipe, "with model", model=info)


def check_quantizer(recipe: Recipe) -> None:
    """Raise ConfigError if a recipe's weights are quantised and torchao is not installed."""
    if recipe.quantize != "none" and find_spec("torchao") is None:
        raise ConfigError(
            f"encoder.quantize: got {recipe.quantize}, which needs torchao, and it is not"
            " installed; install embedjob[quantize] on every node, or set quantize: none"
        )


def config_of(directory: Path) -> dict[str, Any]:
    """Return the config.json of a materialised model, or what one of a static table would say."""
    if table := static_table(directory):
        return table.config
    config: dict[str, Any] = read_json(transformer_directory(directory) / "config.json")
    return config


def head_widths(recipe: Recipe, config: Mapping[str, Any]) -> HeadWidths:
    """Return the widths of a recipe's heads; ModelError for router scores without experts."""
    config = {**config, **(config.get("text_config") or {})}
    vocabulary = int(config["vocab_size"]) if "sparse_values" in recipe.head_columns else None
    if not recipe.reads_routers:
        return HeadWidths(vocabulary)
    scores = router_width(config)
    if not scores:
        raise ModelError(
            f"encoder.heads: router: {recipe.model} ({config.get('model_type')}) has no experts;"
            " give a mixture of experts as encoder.model (OLMoE, Qwen-MoE, DeepSeek)"
        )
    in_column = "router" in recipe.head_columns
    return HeadWidths(vocabulary, scores) if in_column else HeadWidths(vocabulary, joined=scores)


def router_width(config: Mapping[str, Any]) -> int:
    """Return how many scores all routers give a token; 0 if the model has no experts."""
    experts = int(next((config[key] for key in EXPERT_KEYS if config.get(key)), 0))
    layers = int(config["num_hidden_layers"]) if experts else 0
    dense = set(config.get("mlp_only_layers") or ())
    step, first = (
        int(config.get(key) or default)
        for key, default in (("decoder_sparse_step", 1), ("first_k_dense_replace", 0))
    )
    kinds = config.get("mlp_layer_types") or ["sparse"] * layers
    sparse = [
        n
        for n in range(layers)
        if n not in dense and (n + 1) % step == 0 and n >= first and kinds[n] == "sparse"
    ]
    return experts * len(sparse)


def windows_of(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the widths in tokens of the model's attention windows; empty if it has none."""
    widths = _values_of(config, _WINDOWS)
    return tuple(width for width in widths if isinstance(width, int) and width)


def length_bound_ropes(config: Mapping[str, Any]) -> list[str]:
    """Return the kinds of rotary positions that depend on the length of the whole input."""
    kinds = map(str, _values_of(config, ("rope_type", "type")))
    return sorted(_LENGTH_BOUND_ROPES.intersection(_OLD_NAMES.get(kind, kind) for kind in kinds))


def steady_positions(config: Mapping[str, Any]) -> int | None:
    """Return the view length beyond which all positions of a micro-batch change; None if never.

    `dynamic` positions change at the model's own limit, which no view may exceed; so do `longrope`
    positions if the config gives no other length.
    """
    if "longrope" not in length_bound_ropes(config):
        return None
    own = config.get(_ORIGINAL_POSITIONS)
    lengths = [own] if own else _values_of(config, (_ORIGINAL_POSITIONS,))
    return min((int(length) for length in lengths if length), default=None)


def _values_of(config: Mapping[str, Any], keys: tuple[str, ...]) -> Iterator[Any]:
    """Yield the values of these keys at any depth of a config."""
    for key, value in config.items():
        if key in keys and not isinstance(value, Mapping):
            yield value
        if isinstance(value, Mapping):
            yield from _values_of(value, keys)


def _first_number(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    value = next((config[key] for key in keys if config.get(key) is not None), None)
    return None if value is None else int(value)


def _parameters(source: ModelSource) -> int | None:
    """Return how many parameters the weights hold; None if neither files nor hub record say."""
    files = readable_files(source)
    if not files:
        record = hub.model_record(source.model, source.revision, key=source.layout.key)
        texts = model_files(str(materialize(source, tokenizer_only=True)))
        check_weights([file.rfilename for file in record.siblings or ()], source, texts)
        return record.safetensors.total if record.safetensors else None
    check_weights([file.name for file in files], source, files)
    weights = [file for file in files if source.layout.is_weight(file.name)]
    return sum(map(_tensor_elements, weights)) or None


def _tensor_elements(file: ModelFile) -> int:
    """Return how many elements the tensors of a safetensors file have, by its header."""
    with objects.open_unchanged(file.stored) as handle:
        try:
            length = struct.unpack("<Q", handle.read(8))[0]
            tensors = json.loads(handle.read(length if length < 1 << 28 else 0))
        except (struct.error, ValueError) as error:
            raise _cut_short(file, f"is not a safetensors file ({error})") from error
    tensors.pop("__metadata__", None)
    size = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    if file.stored.size < size:
        raise _cut_short(file, f"has {file.stored.size} bytes, and its header says {size}")
    return sum(math.prod(tensor["shape"]) for tensor in tensors.values())


def _cut_short(file: ModelFile, what: str) -> ModelError:
    return ModelError(f"{file.stored.url}: {what}; was its download cut short?")
