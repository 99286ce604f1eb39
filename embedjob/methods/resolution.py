"""From a draft, a method file and what the model folder says, to the recipe that will run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from embedjob.config.job import Job
from embedjob.config.job_file import JobSource, Layer, merge, recipe_from, validate
from embedjob.config.recipe import Recipe, Role
from embedjob.errors import ConfigError
from embedjob.methods.catalogue import MethodFile, over_each_other, read_method
from embedjob.methods.unused import require_slots_for, require_weights_read

ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Resolved:
    """A job, its recipe under every role, and who set each key."""

    job: Job
    recipes: Mapping[Role, Recipe]
    origins: Mapping[str, str]

    def on(self, place: Mapping[str, Any]) -> "Resolved":
        """The same job with its model named so that every node and every day finds the same."""
        recipes = {role: one.model_copy(update=place) for role, one in self.recipes.items()}
        job = self.job.model_copy(update={"encoder": recipes[self.job.encoder.role]})
        return replace(self, job=job, recipes=recipes)


def resolve(draft: JobSource, folder: Mapping[str, Any]) -> Resolved:
    """The job that `draft` means.

    Precedence: library default < model folder < method file < job file < `--set`.

    Args:
        draft: the job file and its overrides.
        folder: {"encoder": keys, "roles": {role: keys}} as the model's own folder gives them.
    """
    name = draft.get("encoder.method")
    method = read_method(name) if name else None
    if method:
        _require_own_adapters(method, draft)
    below = [_under("model folder", folder.get("encoder", {}), folder.get("roles", {}))]
    if method:
        below.append(_under(f"method {name}", method.encoder, method.roles or {}))
    role: Role = draft.get("encoder.role") or "document"
    document, origins = merge([*(layers[role] for layers in below), *draft.layers])
    job = validate(Job, with_dtype(document), origins=origins)
    recipes: dict[Role, Recipe] = {role: job.encoder}
    for other in (r for r in ROLES if r != role):
        layers = [*(layer[other] for layer in below), *draft.layers]
        merged = with_dtype(merge(layers)[0])["encoder"]
        recipes[other] = recipe_from({**merged, "role": other}, origins)
    require_slots_for(draft, recipes.values())
    for one in recipes.values():
        require_weights_read(one)
    return Resolved(job, recipes, origins)


def _require_own_adapters(method: MethodFile, draft: JobSource) -> None:
    """Models of one size look alike: an adapter of another would be merged, and spoil it."""
    adapters = method.encoder.get("adapters")
    if not adapters or draft.get("encoder.adapters") is not None:
        return
    if (model := draft.get("encoder.model")) not in (None, method.model):
        raise ConfigError(
            f"encoder.adapters: is required with encoder.model: {model}, because the method's own"
            f" ({', '.join(map(str, adapters))}) belong to {method.model}; give those of your"
            " model, or [] if they are merged already"
        )


def default_model(draft: JobSource) -> JobSource:
    """The draft with its method's default model where the job names none; ConfigError if none."""
    if draft.get("encoder.model"):
        return draft
    name = draft.get("encoder.method")
    if not name:
        raise ConfigError("encoder.model: is required and was not given; a method would name one")
    model = read_method(name).model
    if model is None:
        raise ConfigError(
            f"encoder.model: is required, because no weights were published for {name}; give the"
            " path of a model that was trained for it"
        )
    layer = Layer(f"method {name}", {"encoder": {"model": model}})
    return JobSource((layer, *draft.layers))


def with_dtype(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with `dtype: auto` settled: it decides vectors, so the fingerprint needs it."""
    encoder, pool = document.get("encoder"), document.get("pool") or {}
    if not isinstance(encoder, Mapping) or encoder.get("dtype", "auto") != "auto":
        return dict(document)
    on_gpu = pool.get("gpus_per_actor", 1) if isinstance(pool, Mapping) else 1
    return {**document, "encoder": {**encoder, "dtype": "bfloat16" if on_gpu else "float32"}}


def _under(
    origin: str, encoder: Mapping[str, Any], roles: Mapping[Any, Mapping[str, Any]]
) -> dict[Role, Layer]:
    return {
        role: Layer(origin, over_each_other(encoder, roles.get(role, {}), origin=origin))
        for role in ROLES
    }
