"""The methods of the literature that come with the library, one YAML file each."""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from embedjob.config.checks import check_rules
from embedjob.config.fits.fit_kinds import Fits
from embedjob.config.fits.fit_rules import check_fits
from embedjob.config.job import Generate
from embedjob.config.job_file import (
    JobSource,
    Layer,
    merge,
    read_yaml,
    recipe_from,
    validate,
)
from embedjob.config.pooling import FitStep, WordWeights
from embedjob.config.recipe import Recipe, Role
from embedjob.config.tables import FIT_NAME
from embedjob.config.templates import templates, tokenized_alone
from embedjob.config.types import Section
from embedjob.errors import ConfigError

_OF_A_JOB = frozenset({"method", "role", "generate"})
_OF_A_METHOD = frozenset({"model", "base", "adapters"})
_TELLS_MODELS_APART = ("model_type", "num_hidden_layers", "hidden_size")


class Citation(Section):
    """Where a method was published."""

    authors: str
    title: str
    year: int
    arxiv: str | None = None


class ModelSetting(Section):
    """The knobs that a method has for one model alone.

    `config` holds the values of the model's config.json that tell it from all others, wherever it
    lies and whatever it is called; a further training that keeps them counts as that model.
    `because` says who chose the knobs, and on what.
    """

    config: dict[str, Any]
    because: str
    encoder: dict[str, Any]
    roles: dict[Role, dict[str, Any]] | None = None


class MethodFile(Section):
    """One recipe of the literature: what it is, and the knobs that make it.

    `encoder` and `roles` are the paper's own; what was chosen for one model is in `for_models`,
    under the name of that model. `differs` says where the authors' code does something else. `fit`
    is the job's section of that name, for the steps that `encoder.finish` has of fits.
    `licence` is that of the default model's weights; `model` is null where none were published. A
    `static` method takes a table of vectors as its model, and runs no transformer.
    `generate` are the keys of that section of a job, where the method embeds generated texts too.
    """

    summary: str
    differs: str | None = None
    citation: Citation
    good_for: str
    licence: str
    model: str | None
    forward_tokens: str
    encoder: dict[str, Any]
    generate: dict[str, Any] | None = None
    roles: dict[Role, dict[str, Any]] | None = None
    for_models: dict[str, ModelSetting] | None = None
    fit: Fits = ()
    static: bool = False


def names() -> list[str]:
    """Return the methods that come with the library, in alphabetical order."""
    files = resources.files("embedjob.methods").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def read_method(method: str) -> MethodFile:
    """Return the method of this name, or in the file at this path.

    Raises:
        ConfigError: there is none, or it is malformed.
    """
    if method in names():
        path = Path(str(resources.files("embedjob.methods") / f"{method}.yaml"))
    elif method.endswith((".yaml", ".yml")):
        path = Path(method)
    else:
        raise ConfigError(
            f"encoder.method: got {method!r}, allowed are {', '.join(names())}, or the path of a"
            " .yaml file"
        )
    file = validate(MethodFile, read_yaml(path), at=str(path))
    _require_sound(file, str(path), file.encoder, _OF_A_JOB | {"model"})
    for role, values in (file.roles or {}).items():
        _require_sound(file, f"{path}: roles.{role}", values, _OF_A_JOB | _OF_A_METHOD)
    for name, setting in (file.for_models or {}).items():
        _require_sound_setting(file, setting, f"{path}: for_models.{name}")
    if file.generate is not None:
        _require_sound_generation(file.generate, f"{path}: generate")
    return file


def fits_of(method: MethodFile, recipe: Recipe) -> list[dict[str, Any]]:
    """Return a method's fits that a recipe names, as a job writes them."""
    return [fit.model_dump(mode="json", by_alias=True) for fit in _named(method.fit, recipe)]


def setting_for(
    method: MethodFile, config: Mapping[str, Any]
) -> tuple[str, ModelSetting] | tuple[None, None]:
    """Return the name and the setting of the model with this config.json; None twice without one.

    A value that the config does not have is another value: a model that cannot be told gets the
    paper's own setting.

    Raises:
        ConfigError: it is the config of several.
    """
    values = {**config, **(config.get("text_config") or {})}
    matches = [
        (name, setting)
        for name, setting in (method.for_models or {}).items()
        if all(key in values and values[key] == value for key, value in setting.config.items())
    ]
    if len(matches) > 1:
        alike = " and ".join(name for name, _ in matches)
        raise ConfigError(f"for_models: {alike} are one model by their config; tell them apart")
    return matches[0] if matches else (None, None)


def check_adapters(method: MethodFile, source: JobSource) -> None:
    """Raise ConfigError where a method's adapters would be merged into a model of the job's own.

    Models of one size look alike: an adapter of another would be merged, and spoil it.
    """
    adapters = method.encoder.get("adapters")
    if not adapters or source.get("encoder.adapters") is not None:
        return
    if (model := source.get("encoder.model")) not in (None, method.model):
        raise ConfigError(
            f"encoder.adapters: is required with encoder.model: {model}, because the method's own"
            f" ({', '.join(map(str, adapters))}) belong to {method.model}; give those of your"
            " model, or [] if they are merged already"
        )


def on_cpus(source: JobSource, *, is_table: bool, set_gpus: bool = False) -> JobSource:
    """Return the source, without a GPU for each actor where its model is a static table.

    With `set_gpus` whatever it says of GPUs is replaced.

    Raises:
        ConfigError: the job asks for a GPU all the same, which would be paid for and not used; or
            its method needs a table, and the model is none.
    """
    name, model = source.get("encoder.method"), source.get("encoder.model")
    if not is_table:
        if name and read_method(name).static:
            raise ConfigError(
                f"encoder.model: got {model}, but {name} looks words up in a table of vectors; give"
                " a table, or choose another method"
            )
        return source
    gpus = source.get("pool.gpus_per_actor")
    if gpus and not set_gpus:
        raise ConfigError(
            f"pool.gpus_per_actor: got {gpus}, but {model} is a table of vectors, which is looked"
            " up on CPUs; set it to 0, or leave it out"
        )
    without = Layer("static table", {"pool": {"gpus_per_actor": 0}})
    return JobSource((*source.layers, without) if set_gpus else (without, *source.layers))


def merged_encoder(*encoders: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Merge `encoder` keys of one place; later ones win."""
    return merge([Layer(origin, {"encoder": encoder}) for encoder in encoders])[0]


def _named(fits: Sequence[Any], recipe: Recipe) -> list[Any]:
    steps = {step.name for step in recipe.finish if isinstance(step, FitStep)}
    steps.add(recipe.model.removeprefix(FIT_NAME))
    steps.add(recipe.continuations_fit or "")
    if isinstance(recipe.pooling, WordWeights):
        steps.add(recipe.pooling.name)
    return [fit for fit in fits if fit.name in steps]


def _require_sound_setting(file: MethodFile, setting: ModelSetting, place: str) -> None:
    """Raise ConfigError naming the place if it tells no model apart, or makes no recipe."""
    if lacking := [key for key in _TELLS_MODELS_APART if key not in setting.config]:
        raise ConfigError(f"{place}.config: needs {', '.join(lacking)} to tell models apart")
    roles = setting.roles or {}
    for role, keys in (file.roles or {}).items():
        own = setting.encoder.keys() & keys.keys() - roles.get(role, {}).keys()
        if own:
            raise ConfigError(
                f"{place}: sets {', '.join(sorted(own))}, which the method has for {role} as well;"
                f" set it in {place}.roles.{role} too"
            )
    for keys in ({}, *roles.values()):
        both = merged_encoder(setting.encoder, keys, origin=place)["encoder"]
        _require_sound(file, place, both, _OF_A_JOB | _OF_A_METHOD)


def _require_sound_generation(values: Mapping[str, Any], place: str) -> None:
    """Raise ConfigError naming the place in the file if the keys make no `generate` section."""
    if wrong := sorted({"method", "pool"} & values.keys()):
        raise ConfigError(f"{place}: a method cannot set {', '.join(wrong)} there; remove it")
    if not validate(Generate, values, at=place).kinds:
        raise ConfigError(f"{place}.kinds: is required and was not given")


def _require_sound(
    file: MethodFile, place: str, values: Mapping[str, Any], forbidden: frozenset[str]
) -> None:
    """Raise ConfigError naming the place if these keys, over the file's own, make no recipe."""
    if wrong := sorted(forbidden & values.keys()):
        raise ConfigError(f"{place}: a method cannot set {', '.join(wrong)} there; remove it")
    merged = merged_encoder({"model": file.model or "-"}, file.encoder, values, origin=place)
    try:
        recipe = recipe_from(merged["encoder"], {})
        check_rules(recipe, "in a job")
        # The instruction may be left to the job.
        given = recipe.model_copy(update={"instruction": recipe.instruction or ""})
        templates(given)
        tokenized_alone(given)
        check_fits(_named(file.fit, recipe), recipe)
    except (ConfigError, ValueError) as error:  # the latter of `check_fits`
        raise ConfigError(f"{place}: {error}") from error
