"""The methods of the literature that come with the library, one YAML file each."""

from importlib import resources
from pathlib import Path
from typing import Any

from embedjob.errors import ConfigError
from embedjob.jobfile import read_yaml, recipe_from, validate
from embedjob.recipe import Role
from embedjob.segments import Section


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
    found = validate(MethodFile, read_yaml(path), at=str(path))
    for values in (found.encoder, *(found.roles or {}).values()):
        shared = set() if values is found.encoder else {"model", "base", "adapters"}
        forbidden = sorted(({"method", "role"} | shared) & values.keys())
        if forbidden:
            raise ConfigError(
                f"{path}: a method cannot set {', '.join(forbidden)} there; remove it"
            )
        try:
            recipe_from({"model": found.model or "-", **found.encoder, **values}, {})
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    return found
