"""NV-Embed checkpoints by their config.json: a bidirectional Mistral and a latent attention layer.

Their own Python code is not run, and does not run with current transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MODEL_TYPE = "nvembed"
BACKBONE_TYPE = "bidir_mistral"
BACKBONE_PREFIX, LATENT_PREFIX = "embedding_model.", "latent_attention_model."
# The keys that define the backbone; the published config also holds all generation settings.
_MISTRAL_KEYS = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "vocab_size",
)


@dataclass(frozen=True)
class LatentSizes:
    """Sizes of the latent attention layer; the published config relies on these defaults."""

    num_latents_value: int = 512
    num_cross_heads: int = 8
    hidden_dim: int = 4096
    latent_dim: int = 4096
    cross_dim_head: int = 4096


def is_nvembed(config: Mapping[str, Any]) -> bool:
    """Tell whether a config.json belongs to an NV-Embed checkpoint."""
    return config.get("model_type") == MODEL_TYPE


def mistral_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the backbone's MistralConfig, without a window: its mask has none."""
    text = config.get("text_config") or {}
    kept = {key: text[key] for key in _MISTRAL_KEYS if text.get(key) is not None}
    return {**kept, "sliding_window": None}


def latent_sizes(config: Mapping[str, Any]) -> LatentSizes:
    """Return the sizes of the latent attention layer."""
    written = config.get("latent_attention_config") or {}
    sizes = LatentSizes.__dataclass_fields__
    return LatentSizes(**{key: int(value) for key, value in written.items() if key in sizes})


def normalizes(config: Mapping[str, Any]) -> bool:
    """Tell whether the checkpoint itself scales its vectors to unit length."""
    return bool((config.get("latent_attention_config") or {}).get("output_normalize", True))
