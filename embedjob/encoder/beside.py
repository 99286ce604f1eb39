"""How large a model's outputs beside the vector are, by its config.json: no torch, no weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from embedjob.beside import router_in, sparse_in
from embedjob.errors import ModelError
from embedjob.recipe import Recipe

EXPERT_KEYS = ("num_experts", "n_routed_experts", "num_local_experts")


@dataclass(frozen=True)
class Beside:
    """The vocabulary of sparse entries, and the scores of routers in a column; None if not asked.

    `joined` are the router scores that are part of the vector itself.
    """

    vocabulary: int | None = None
    routers: int | None = None
    joined: int = 0


def beside_of(recipe: Recipe, config: Mapping[str, Any]) -> Beside:
    """What a recipe has beside its vector; ModelError if the model is no mixture of experts."""
    config = {**config, **(config.get("text_config") or {})}
    vocabulary = int(config["vocab_size"]) if sparse_in(recipe.heads) else None
    asked = router_in(recipe.heads)
    if asked is None:
        return Beside(vocabulary)
    scores = router_width(config)
    if not scores:
        raise ModelError(
            f"encoder.heads: router: {recipe.model} ({config.get('model_type')}) has no experts;"
            " give a mixture of experts as encoder.model (OLMoE, Qwen-MoE, DeepSeek)"
        )
    return (
        Beside(vocabulary, joined=scores) if asked.join == "concat" else Beside(vocabulary, scores)
    )


def router_width(config: Mapping[str, Any]) -> int:
    """How many scores a token gets of all routers together; 0 if the model has no experts."""
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
