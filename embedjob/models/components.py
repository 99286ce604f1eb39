"""Components of a recipe's model: config and tokenizer, weights, and adapters to merge.

A model may itself be an adapter, as those of LLM2Vec: its directory has the config and the
tokenizer, and its adapter_config.json names the model that has the weights.
"""

from dataclasses import dataclass
from typing import Any

from embedjob.config.heads import Decode
from embedjob.config.recipe import HubModel, Recipe
from embedjob.errors import ModelError
from embedjob.models import hub
from embedjob.models.checkpoint import ADAPTER, BASE, MODEL, read_json
from embedjob.models.source import (
    ModelSource,
    materialize,
    pinned,
    readable_files,
    source_kind,
    source_of,
)

# These kinds add tokens, layers or routes to a model instead of changing its weights.
_UNMERGEABLE = frozenset(
    {
        "PROMPT_TUNING",
        "MULTITASK_PROMPT_TUNING",
        "P_TUNING",
        "PREFIX_TUNING",
        "ADAPTION_PROMPT",
        "CPT",
        "POLY",
        "XLORA",
    }
)


@dataclass(frozen=True)
class ModelComponents:
    """The sources of config and tokenizer, of weights, and of adapters in the order of merging.

    `generator` are the components of the model that a recipe generates texts with.
    """

    model: ModelSource
    weights: ModelSource
    adapters: tuple[ModelSource, ...] = ()
    generator: "ModelComponents | None" = None

    def pinned(self) -> "ModelComponents":
        """Return the same components, named so that every node always reads the same files."""
        model = pinned(self.model)
        weights = model if self.weights == self.model else pinned(self.weights)
        # A generator is named so when it is resolved.
        return ModelComponents(model, weights, tuple(map(pinned, self.adapters)), self.generator)

    def keys(self) -> dict[str, Any]:
        """Return the keys of a recipe that name these components."""
        own = self.weights != self.model
        return {
            "model": self.model.model,
            "revision": self.model.revision,
            "base": _named(self.weights) if own else None,
            "adapters": tuple(map(_named, self.adapters[own:])),
        }


def components_of(recipe: Recipe) -> ModelComponents:
    """Return the components of a recipe's model; ModelError if one cannot be found or merged."""
    source = source_of(recipe)
    weights = weights_of(source)
    own = [] if weights == source else [source.derive(_named(source), ADAPTER)]
    adapters = (*own, *(source.derive(adapter, ADAPTER) for adapter in recipe.adapters))
    for adapter in adapters:
        _check_mergeable(adapter)
    generator = generator_recipe(recipe)
    made_by = None if generator is None else components_of(generator)
    return ModelComponents(source, weights, adapters, made_by)


def generator_recipe(recipe: Recipe) -> Recipe | None:
    """Return a recipe that loads the language model of a recipe's generator; None without one.

    The model may run code and read pickles where the encoder's may.
    """
    made = recipe.generate
    if made is None or made.model is None:
        return None
    return Recipe(
        model=made.model,
        revision=made.revision,
        trust_remote_code=recipe.trust_remote_code,
        allow_pickle=recipe.allow_pickle,
        dtype=made.dtype,
        span="last_token",
        decode=Decode(),
    )


def weights_of(source: ModelSource) -> ModelSource:
    """Return the source of a model's weights: itself, or the base model of an adapter."""
    config = None
    if source_kind(source.model) not in ("gguf", "table", "fit"):
        config = read_json(materialize(source, tokenizer_only=True) / ADAPTER.config)
    if config is None or (source.base is None and _has_weights(source)):
        if source.base is not None:
            raise ModelError(
                f"encoder.base: got {source.base.model}, but {source.model} is not an adapter: it"
                " has weights of its own; leave base out, or give it as encoder.model and"
                f" {source.model} in encoder.adapters"
            )
        return source
    if source.base is not None:
        return source.base
    named = config.get("base_model_name_or_path")
    if not named:
        raise ModelError(
            f"encoder.base: {source.model} is an adapter, and its {ADAPTER.config} does not name"
            " the model that it adapts; set encoder.base to that model"
        )
    return source.derive(HubModel(id=named, revision=config.get("revision")), BASE)


def _has_weights(source: ModelSource) -> bool:
    files = [file.name for file in readable_files(source)]
    if not files:
        record = hub.model_record(source.model, source.revision)
        files = [file.rfilename for file in record.siblings or ()]
    return any(MODEL.is_weight(name) or MODEL.is_pickle(name) for name in files)


def _named(source: ModelSource) -> str | HubModel:
    """Return the source as a recipe names it."""
    if source.revision is None:
        return source.model
    return HubModel(id=source.model, revision=source.revision)


def _check_mergeable(source: ModelSource) -> None:
    config = read_json(materialize(source, tokenizer_only=True) / ADAPTER.config)
    kind = str(config.get("peft_type"))
    if kind in _UNMERGEABLE:
        raise ModelError(
            f"encoder.adapters: {source.model} has the kind {kind}, which cannot be merged into a"
            " model's weights; allowed are kinds that can, such as LORA, LOHA and IA3"
        )
