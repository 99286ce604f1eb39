"""The methods of the literature that come with the library, one YAML file each."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from embedjob.config.checks import check
from embedjob.config.job_file import Layer, merge, read_yaml, recipe_from, validate
from embedjob.config.recipe import Role
from embedjob.config.templates import templates, tokenized_alone
from embedjob.config.types import Section
from embedjob.errors import ConfigError

_OF_A_JOB = frozenset({"method", "role"})
_OF_A_METHOD = frozenset({"model", "base", "adapters"})


class Citation(Section):
    """Where a method was published."""

    authors: str
    title: str
    year: int
    arxiv: str | None = None


class MethodFile(Section):
    """One recipe of the literature: what it is, and the knobs that make it.

    `licence` is of the default model's weights; `model` is null where none were published.
    """

    summary: str
    citation: Citation
    good_for: str
    licence: str
    model: str | None
    forward_tokens: str
    encoder: dict[str, Any]
    roles: dict[Role, dict[str, Any]] | None = None


def names() -> list[str]:
    """The methods that come with the library, in alphabetical order."""
    files = resources.files("embedjob.methods").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def read_method(method: str) -> MethodFile:
    """The method of this name, or of this path; ConfigError if there is none or it is malformed."""
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
    return file


def over_each_other(*encoders: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """What of the `encoder` section the keys of one place make together, last wins."""
    return merge([Layer(origin, {"encoder": encoder}) for encoder in encoders])[0]


def _require_sound(
    found: MethodFile, place: str, values: Mapping[str, Any], forbidden: frozenset[str]
) -> None:
    """ConfigError naming the place in the file if these keys, over its own, make no recipe."""
    if wrong := sorted(forbidden & values.keys()):
        raise ConfigError(f"{place}: a method cannot set {', '.join(wrong)} there; remove it")
    merged = over_each_other({"model": found.model or "-"}, found.encoder, values, origin=place)
    try:
        recipe = recipe_from(merged["encoder"], {})
        check(recipe, "in a job")
        # The instruction may be left to the job.
        given = recipe.model_copy(update={"instruction": recipe.instruction or ""})
        templates(given)
        tokenized_alone(given)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
