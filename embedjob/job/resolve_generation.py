"""Resolution of the `generate` section: a method's keys under the job's, the generator's model.

As in `resolve`, no weights are looked at. The model is named so that every node reads the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from embedjob.config.checks import check_rules
from embedjob.config.generation import Generation
from embedjob.config.job import Generate
from embedjob.config.job_file import JobSource, Layer, merge, validate
from embedjob.config.recipe import Recipe
from embedjob.errors import ConfigError, ModelError
from embedjob.methods.catalogue import read_method
from embedjob.models.architecture import config_of, is_causal
from embedjob.models.chat_template import ChatTemplate, read_chat_template, special_tokens, stop_ids
from embedjob.models.components import generator_recipe
from embedjob.models.questions import load_questioner
from embedjob.models.source import materialize, pinned, source_kind, source_of

# Who sets a key that neither the job nor a method does.
_FROM_MODEL = {
    "model": "encoder.model",
    "revision": "encoder.revision",
    "dtype": "generate.pool.gpus_per_actor",
    "chat_template": "the generator's folder",
    "chat_tokens": "the generator's folder",
    "stop_ids": "the generator's folder",
}


@dataclass(frozen=True)
class ResolvedGeneration:
    """The `generate` section with every key set, and who set each of them."""

    section: Generate
    origins: Mapping[str, str]

    def put_into(self, recipe: Recipe) -> Recipe:
        """Return a recipe that generates so; ConfigError where its other keys do not allow it."""
        keys = {key: getattr(self.section, key) for key in Generation.model_fields}
        made = recipe.model_copy(update={"generate": Generation.model_construct(**keys)})
        try:
            check_rules(made, "with method")
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return made


def resolve_generation(source: JobSource, recipe: Recipe) -> ResolvedGeneration | None:
    """Resolve what a job's recipe generates: library default < method < job file < `--set`.

    None where neither the job nor its method generates, or where the job says `generate: null`.

    Raises:
        ConfigError: a key is wrong, is lacking, or leaves a prompt no room.
        ModelError: there is no such model, or it cannot follow instructions.
    """
    layers = _layers(source)
    if layers is None:
        return None
    document, every = merge(layers)
    origins = {f"generate.{key}": origin for key, origin in _FROM_MODEL.items()}
    origins |= {key: origin for key, origin in every.items() if key.startswith("generate.")}
    section = validate(Generate, document["generate"], at="generate", origins=origins)
    _check_engine(section, source)
    if section.model is None:
        if recipe.base is not None or recipe.adapters:
            raise ConfigError(
                "generate.model: is required and was not given; without one the encoder's model"
                " generates, and that has adapters to embed with"
            )
        own = {"model": recipe.model, "revision": recipe.revision}
        section = section.model_copy(update=own)
    section = section.model_copy(update=_of_model(section, recipe, source))
    resolved = ResolvedGeneration(section, origins)
    load_questioner(resolved.put_into(recipe))
    return resolved


def moved_generator(values: Mapping[str, Any], copies: Mapping[str, str]) -> dict[str, Any]:
    """Return the `generate` key of a recorded recipe whose generator lies elsewhere now.

    A generator that is the encoder's own model moves with it.
    """
    made = values.get("generate")
    if made is None:
        return {}
    own = copies.get("model") if made.get("model") == values.get("model") else None
    place = copies.get("generator", own)
    moved = {} if place is None else {"model": place, "revision": None}
    return {"generate": {**made, **moved}}


def _layers(source: JobSource) -> list[Layer] | None:
    written, _ = merge(source.layers)
    own = written.get("generate")
    if "generate" in written and own is None:
        return None
    name = (own or {}).get("method") or source.get("encoder.method")
    default = read_method(name).generate if name else None
    if default is not None:
        return [Layer(f"method {name}", {"generate": default}), *source.layers]
    if own is None:
        return None
    if not own.get("kinds"):
        what = f"{name} generates nothing" if name else "no method is named"
        raise ConfigError(
            f"generate.method: {what}, and generate.kinds is not given; allowed is a method that"
            " generates, such as geneol, the path of its file, or kinds of your own"
        )
    return list(source.layers)


def _of_model(section: Generate, recipe: Recipe, source: JobSource) -> dict[str, Any]:
    """Return the keys that come from the generator's files, and from where it runs."""
    gpus = section.pool.gpus_per_actor
    on_gpu = _gpus(source) if gpus == "auto" else gpus
    auto = "bfloat16" if on_gpu else "float32"
    dtype = auto if section.dtype == "auto" else section.dtype
    named = recipe.model_copy(update={"generate": section})
    generator = generator_recipe(named)
    assert generator is not None, "the model is named"
    try:
        place = pinned(source_of(generator))
        if section.engine == "vllm" and source_kind(place.model) not in ("hub", "directory"):
            raise ConfigError(
                f"generate.model: got {place.model}, allowed with engine: vllm is a hub id or a"
                " directory that every node has"
            )
        directory = materialize(place, tokenizer_only=True)
    except ModelError as error:
        raise ModelError(str(error).replace("encoder.model", "generate.model")) from error
    if not is_causal(config_of(directory)):
        raise ModelError(
            f"generate.model: {section.model} is an encoder, which says nothing; allowed is a"
            " language model that follows instructions"
        )
    chat = _chat(section, directory)
    return {
        "model": place.model,
        "revision": place.revision,
        "dtype": dtype,
        "chat_template": chat.template,
        "chat_tokens": dict(chat.tokens),
        "stop_ids": chat.stops,
    }


def _chat(section: Generate, directory: Any) -> ChatTemplate:
    if section.chat_template is None:
        own = read_chat_template(directory, model=str(section.model))
    else:
        tokens = special_tokens(directory)
        own = ChatTemplate(section.chat_template, tokens, stop_ids(directory, tokens))
    return ChatTemplate(
        own.template,
        own.tokens if section.chat_tokens is None else section.chat_tokens,
        own.stops if section.stop_ids is None else section.stop_ids,
    )


def _gpus(source: JobSource) -> float:
    gpus = source.get("pool.gpus_per_actor")
    return 1 if gpus is None else float(gpus)


def _check_engine(section: Generate, source: JobSource) -> None:
    """Raise ConfigError where vLLM is asked for and cannot generate so."""
    if section.engine != "vllm":
        return
    if find_spec("vllm") is None:
        raise ConfigError(
            "generate.engine: got vllm, which is not installed here; install it on every node (pip"
            " install 'ray[llm]'), or leave engine out: transformers"
        )
    if section.summaries:
        raise ConfigError(
            "generate.summaries: is not available with engine: vllm; leave one of the two out"
        )
    gpus = section.pool.gpus_per_actor
    if (_gpus(source) if gpus == "auto" else gpus) < 1:
        raise ConfigError(
            f"generate.pool.gpus_per_actor: got {gpus}, allowed with engine: vllm is 1 or more"
        )
