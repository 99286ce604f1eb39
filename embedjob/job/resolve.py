"""Resolution: from a job as written to its recipes, the digests of its model and the fingerprint.

The one door for `run`, `plan`, `preview`, `methods --resolved` and `Encoder`. `resolve` reads the
config and the small files of the model's folder, `identify` looks at the weights; what an earlier
run resolved is read in `job/recorded.py`. None needs torch or Ray, and none writes to the output.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from embedjob.config.checks import check_rules
from embedjob.config.fits.fit_rules import views_once_fitted
from embedjob.config.interventions import slotted
from embedjob.config.job import Generate, Input, Job, Run, with_headings
from embedjob.config.job_file import (
    JobSource,
    Layer,
    job_source,
    merge,
    read_job,
    recipe_from,
    validate,
    validate_encoder,
    validate_partial,
)
from embedjob.config.pooling import FitStep, WordWeights
from embedjob.config.recipe import HubModel, Recipe, Role
from embedjob.config.tables import FIT_NAME
from embedjob.config.templates import check_slots
from embedjob.config.types import moment_of
from embedjob.errors import ConfigError
from embedjob.job.resolve_generation import resolve_generation
from embedjob.methods.catalogue import (
    check_adapters,
    fits_of,
    merged_encoder,
    on_cpus,
    read_method,
    setting_for,
)
from embedjob.models.architecture import (
    HeadWidths,
    ModelInfo,
    check_model,
    check_quantizer,
    config_of,
    head_widths,
    model_info,
)
from embedjob.models.checkpoint import BASE
from embedjob.models.components import components_of
from embedjob.models.digests import model_digests
from embedjob.models.sentence_transformers import folder_layer, vector_width
from embedjob.models.source import ModelSource, materialize, source_of
from embedjob.models.tables.static_tables import may_be_static
from embedjob.models.tokenizer import load_tokenizer, read_tokenizer
from embedjob.output.fingerprint import fingerprint
from embedjob.storage import objects
from embedjob.text.slots import as_normalized
from embedjob.vectors.finishing import width

ROLES: tuple[Role, ...] = get_args(Role)
AnyJob = str | Path | Mapping[str, Any] | JobSource


@dataclass(frozen=True)
class ResolvedRecipes:
    """The recipe under every role, the job's own role, and who set each key."""

    role: Role
    recipes: Mapping[Role, Recipe]
    origins: Mapping[str, str]
    generate: Generate | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe of the job's own role."""
        return self.recipes[self.role]


@dataclass(frozen=True)
class ResolvedJob:
    """A job with every key set, its recipe under every role, and who set each key.

    `folder` is the local copy of the model's config and tokenizer, `input_paths` is `input.path` as
    the job has it, before `${...}` is replaced.
    """

    config: Job
    recipes: Mapping[Role, Recipe]
    origins: Mapping[str, str]
    folder: Path
    input_paths: tuple[str, ...]

    @property
    def out(self) -> str:
        """The output's URL, the same from every directory."""
        return objects.absolute(self.config.output.path)


@dataclass(frozen=True)
class IdentifiedJob(ResolvedJob):
    """A resolved job whose model is known by its content.

    `width` is the width of a finished embedding, `heads` the sizes of the columns beside it, and
    `digests` the sha256 of every file that affects a vector. `view_width` is the width of one
    view's vector. Where finishing steps name fits, `job/fit_plan.py` settles width and fingerprint.
    """

    model: ModelInfo
    width: int
    heads: HeadWidths
    digests: Mapping[str, str]
    fingerprint: str
    view_width: int = 0


def as_source(job: AnyJob, sets: Sequence[str] = ()) -> JobSource:
    """Return the job source of a job file's path, of a mapping, or of a source as it is.

    `sets` are overrides as `--set` takes them: `key.path=value`.
    """
    if isinstance(job, JobSource):
        return replace(job, layers=(*job.layers, *job_source({}, sets).layers[1:]))
    return job_source(job, sets) if isinstance(job, Mapping) else read_job(job, sets)


def input_of(source: JobSource) -> Input:
    """Return a job's input, once all its keys are checked; opens neither input nor model.

    Raises:
        ConfigError: a key cannot stand in a job, or no model is named.
    """
    validate_partial(source)
    with_default_model(source)
    written, origins = merge(source.layers)
    found: Input = validate(Input, written["input"], at="input", origins=origins)
    split = (written.get("encoder") or {}).get("split") or {}
    return with_headings(found, tuple(split.get("carry") or ()))


def run_of(source: JobSource, now: datetime) -> Run:
    """Return a job's `run` section with its deadline as a moment, counted from `now`.

    ConfigError where the deadline is past: nothing could be embedded before it.
    """
    written, origins = merge(source.layers)
    run = validate(Run, written.get("run", {}), at="run", origins=origins)
    if run.until is None:
        return run
    moment = moment_of(run.until, now)
    if moment <= now:
        raise ConfigError(
            f"run.until: got {run.until}, which is past: it is {now.isoformat(' ', 'seconds')};"
            " give a moment to come, a time of day (06:00) or a duration (90m)"
        )
    return run.model_copy(update={"until": moment.isoformat()})


def resolve(source: JobSource) -> ResolvedJob:
    """Resolve a job: library default < model folder < method < method for it < job file < `--set`.

    Raises:
        ConfigError: a key cannot stand in a job, or fits no other.
        ModelError: there is no such model.
    """
    validate_partial(source)
    source = with_default_model(source)
    folder = materialize(_model_source(source), tokenizer_only=True)
    source = on_cpus(source, is_table=may_be_static(folder))
    layers = _settled(source, folder)
    config = config_around(layers, source)
    return ResolvedJob(config, layers.recipes, layers.origins, folder, source.input_paths)


def resolve_encoder(
    section: Mapping[str, Any], *, on_gpu: bool, generate: Mapping[str, Any] | None = None
) -> ResolvedRecipes:
    """Resolve an `encoder` section alone: it needs neither an input nor an output.

    Args:
        section: the keys of `encoder` in a job file.
        on_gpu: whether `dtype: auto` is bfloat16 (else float32).
        generate: the keys of `generate` in a job file; those of the method if None.
    """
    keys: dict[str, Any] = {"encoder": dict(section), "pool": {"gpus_per_actor": int(on_gpu)}}
    keys |= {} if generate is None else {"generate": dict(generate)}
    source = job_source(keys, origin="the given keys")
    validate_encoder(source)
    source = with_default_model(source)
    folder = materialize(_model_source(source), tokenizer_only=True)
    source = on_cpus(source, is_table=may_be_static(folder), set_gpus=True)
    resolved = _settled(source, folder)
    _require_no_corpus(resolved.recipe)
    return resolved


def _require_no_corpus(recipe: Recipe) -> None:
    """Raise ConfigError where a part of the recipe is made of a corpus, which only a run reads."""
    parts = []
    if recipe.model.startswith(FIT_NAME):
        parts.append(f"model: {recipe.model}")
    if isinstance(recipe.pooling, WordWeights):
        parts.append(f"pooling: {recipe.pooling.name}")
    if recipe.continuations_fit is not None:
        parts.append(f"heads: continuations: {FIT_NAME}{recipe.continuations_fit}")
    parts += [
        f"finish: {one.kind}: {one.name}" for one in recipe.finish if isinstance(one, FitStep)
    ]
    if parts:
        without = "; or set finish without it" if parts[0].startswith("finish") else ""
        raise ConfigError(
            f"encoder.{parts[0]} is fitted on a corpus: run a job that has it, and open its output"
            f" with Encoder.from_output{without}"
        )


def identify(job: ResolvedJob) -> IdentifiedJob:
    """Add the model's size, the digests of its files and the fingerprint; check that they fit.

    Raises:
        ConfigError: a key needs what is not installed, or a width that the vectors do not have.
        ModelError: the model has no weights, or cannot do what the recipe asks.
    """
    recipe = job.config.encoder
    info = model_info(source_of(recipe))
    parts = components_of(recipe).pinned()
    job = _located(job, parts.keys())
    recipe = job.config.encoder
    check_model(recipe, info)
    check_quantizer(recipe)
    wide = vector_width(recipe, info.hidden_size, job.folder)
    heads = head_widths(recipe, config_of(job.folder))
    # Refuses templates without a slot, or without room for a token of text.
    load_tokenizer(recipe)
    digests = model_digests(parts)
    wide += heads.joined
    dimensions = {fit.name: getattr(fit, "dimensions", None) for fit in job.config.fit}
    return IdentifiedJob(
        **vars(job),
        model=info,
        width=width(
            wide,
            views=views_once_fitted(recipe, job.config.fit),
            recipe=recipe,
            fitted=dimensions,
        ),
        heads=heads,
        digests=digests,
        fingerprint=fingerprint(recipe, digests),
        view_width=wide,
    )


def layer_recipes(
    source: JobSource, folder: Mapping[str, Any], config: Mapping[str, Any] | None = None
) -> ResolvedRecipes:
    """Layer a job's keys over the keys of its method and model folder, for every role.

    Args:
        source: the job file and its overrides.
        folder: {"encoder": keys, "roles": {role: keys}} as the model's own folder gives them.
        config: the model's config.json, by which a method may know it; None knows no model.
    """
    name = source.get("encoder.method")
    method = read_method(name) if name else None
    if method:
        check_adapters(method, source)
    below = [_by_role("model folder", folder.get("encoder", {}), folder.get("roles", {}))]
    if method:
        below.append(_by_role(f"method {name}", method.encoder, method.roles or {}))
        model, setting = setting_for(method, config or {})
        if setting:
            origin = f"method {name} for {model}"
            below.append(_by_role(origin, setting.encoder, setting.roles or {}))
    role: Role = source.get("encoder.role") or "document"
    document, origins = merge([*(layers[role] for layers in below), *source.layers])
    recipes = {role: recipe_from(_with_dtype(document), origins)}
    for other in (r for r in ROLES if r != role):
        merged, _ = merge([*(layers[other] for layers in below), *source.layers])
        recipes[other] = recipe_from({**_with_dtype(merged), "role": other}, origins)
    check_slots(source, recipes.values())
    for recipe in recipes.values():
        check_rules(recipe, "in a job")
    return ResolvedRecipes(role, recipes, origins)


def _settled(source: JobSource, folder: Path) -> ResolvedRecipes:
    """Layer a job's keys over its model folder's; settle slots, and what is generated."""
    layers = layer_recipes(source, folder_layer(folder), config_of(folder))
    if made := resolve_generation(source, layers.recipe):
        recipes = {role: made.put_into(recipe) for role, recipe in layers.recipes.items()}
        origins = {**layers.origins, **made.origins}
        layers = replace(layers, recipes=recipes, origins=origins, generate=made.section)
    if not any(slotted(recipe.interventions) for recipe in layers.recipes.values()):
        return layers
    tokenizer = read_tokenizer(folder)
    recipes = {role: as_normalized(recipe, tokenizer) for role, recipe in layers.recipes.items()}
    return replace(layers, recipes=recipes)


def config_around(layers: ResolvedRecipes, source: JobSource) -> Job:
    """Return the whole config of a job, with its recipe as the `encoder` section."""
    written, _ = merge(source.layers)
    name = source.get("encoder.method")
    made = layers.generate and layers.generate.model_dump(mode="json")
    document = {**written, "encoder": layers.recipe.model_dump(mode="json"), "generate": made}
    if name and "fit" not in written:
        document["fit"] = fits_of(read_method(name), layers.recipe)
    config: Job = validate(Job, document, origins=layers.origins)
    read = with_headings(config.input, layers.recipe.headings)
    return config.model_copy(update={"encoder": layers.recipe, "input": read})


def with_default_model(source: JobSource) -> JobSource:
    """Return the source, with its method's model if it names none; ConfigError if neither does."""
    if source.get("encoder.model"):
        return source
    name = source.get("encoder.method")
    if not name:
        raise ConfigError("encoder.model: is required and was not given; a method would name one")
    model = read_method(name).model
    if model is None:
        raise ConfigError(
            f"encoder.model: is required, because no weights were published for {name}; give the"
            " path of a model that was trained for it"
        )
    layer = Layer(f"method {name}", {"encoder": {"model": model}})
    return JobSource((layer, *source.layers))


def _model_source(source: JobSource) -> ModelSource:
    """Return where the job's model comes from, before its other keys are resolved."""
    model = ModelSource(
        model=source.get("encoder.model"),
        revision=source.get("encoder.revision"),
        trust_remote_code=bool(source.get("encoder.trust_remote_code")),
        allow_pickle=bool(source.get("encoder.allow_pickle")),
    )
    base = source.get("encoder.base")
    named = HubModel(**base) if isinstance(base, dict) else base
    return replace(model, base=model.derive(named, BASE)) if named else model


def _located(job: ResolvedJob, place: Mapping[str, Any]) -> ResolvedJob:
    """Return the same job with its model named so that every node and every day finds the same."""
    recipes = {role: recipe.model_copy(update=place) for role, recipe in job.recipes.items()}
    config = job.config.model_copy(update={"encoder": recipes[job.config.encoder.role]})
    return replace(job, config=config, recipes=recipes)


def _with_dtype(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `encoder` keys with `dtype: auto` settled: it decides vectors, so it is hashed."""
    encoder, pool = dict(document["encoder"]), document.get("pool") or {}
    if encoder.get("dtype", "auto") == "auto":
        on_gpu = pool.get("gpus_per_actor", 1) if isinstance(pool, Mapping) else 1
        encoder["dtype"] = "bfloat16" if on_gpu else "float32"
    return encoder


def _by_role(
    origin: str, encoder: Mapping[str, Any], roles: Mapping[Any, Mapping[str, Any]]
) -> dict[Role, Layer]:
    return {
        role: Layer(origin, merged_encoder(encoder, roles.get(role, {}), origin=origin))
        for role in ROLES
    }
