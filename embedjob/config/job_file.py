"""Job files: YAML and `--set` overrides to a validated job, with the origin of every key."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from embedjob.config.explaining import as_text, explained, unknown_key
from embedjob.config.generation import TrajectorySettings
from embedjob.config.job import PATHS, Job, table_name
from embedjob.config.recipe import PARTIAL, Recipe
from embedjob.config.types import Section
from embedjob.config.url_secrets import ADVICE, names_secret, redacted, refuse_secrets
from embedjob.errors import ConfigError

DEFAULT = "library default"
_SECTIONS = tuple(Job.model_fields)
# Values that are merged key by key, one level further down than others.
_MERGED = ("special_tokens", "split", "actors", "pool", "table")
_AS_TEXT = ("timestamp", "int", "float")
_SectionT = TypeVar("_SectionT", bound=Section)


class _TwiceError(Exception):
    """A key stands in two lines of one mapping: YAML would drop the first without a word."""


class _Loader(yaml.SafeLoader):
    """YAML as it is written: each key once; a day or a time stays text, until it has a column."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # which no section has
            merges = key.tag == "tag:yaml.org,2002:merge"
            name = key.value if merges else self.construct_object(key)
            line = key.start_mark.line + 1
            if name in lines:
                raise _TwiceError(
                    f"{redacted(key.value)} is given twice, in line {lines[name]} and in line"
                    f" {line}; keep one"
                )
            lines[name] = line
        return super().construct_mapping(node, deep)


# Numbers without YAML 1.1's sixties, by which 12:30:00 is 45000; and no dates.
_NUMBERS = {
    "int": r"[-+]?(0b[0-1_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)",
    "float": r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag.rpartition(":")[2] not in _AS_TEXT]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _form in _NUMBERS.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_form})$"), [*"-+0123456789."]
    )
for _name in ("timestamp", "value"):  # a lone `=` is no key, but an operator of filters
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", lambda _, node: str(node.value))


@dataclass(frozen=True)
class Layer:
    """Raw config values from one place, and the name of that place.

    `unexpanded` are the values before `${...}` was replaced in paths, where they differ.
    """

    origin: str
    values: Mapping[str, Any]
    unexpanded: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class JobSource:
    """A job as written: the job file and its overrides, checked for shape, not yet resolved."""

    layers: tuple[Layer, ...]

    def get(self, path: str) -> Any:
        """Return the value at a dotted path, from the last layer that sets it; else None."""
        found = None
        for layer in self.layers:
            value = _lookup(layer.values, path.split("."))
            found = found if value is None else value
        return found

    @property
    def input_paths(self) -> tuple[str, ...]:
        """`input.path` before `${...}` is replaced: a dated folder is one input.

        A table is one input, too, whatever its version.
        """
        layers = [Layer(one.origin, one.unexpanded or one.values) for one in self.layers]
        written = JobSource(tuple(layers))
        table = {key: written.get(f"input.table.{key}") for key in ("format", "catalog", "uri")}
        given = table_name(table) or written.get("input.path") or ()
        return (given,) if isinstance(given, str) else tuple(given)


def read_job(path: str | Path, overrides: Sequence[str] = ()) -> JobSource:
    """Read a job file under `key.path=value` overrides; ConfigError if it cannot be a job."""
    return job_source(read_yaml(path), overrides, origin=str(path))


def job_source(
    document: Mapping[str, Any], overrides: Sequence[str] = (), *, origin: str = "job"
) -> JobSource:
    """Return the sections of a job under `key.path=value` overrides; ConfigError if one is unknown.

    `origin` is what messages call the document.
    """
    unknown = [key for key in document if key not in _SECTIONS]
    if unknown:
        raise ConfigError(f"{origin}: {unknown_key(unknown[0], _SECTIONS)}")
    written = Layer(origin, _expanded(dict(document)), document)
    sets = tuple(_override(text) for text in overrides)
    return JobSource((written, *sets))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; ConfigError if it is missing, broken or no mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text ({error})") from error
    try:
        document = yaml.load(text, _Loader)
    except _TwiceError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not valid YAML: {_without_its_text(error)}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: got {type(document).__name__}, allowed is a mapping of keys")
    return document


def _without_its_text(error: Exception) -> str:
    """Return what is wrong with a YAML text, and where; its lines may hold secrets."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return type(error).__name__
    mark = error.problem_mark
    return f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}"


def merge(layers: Iterable[Layer]) -> tuple[dict[str, Any], dict[str, str]]:
    """Merge layers, last wins; return the sections, and for each `section.key` who set it.

    Lists replace lists; `encoder.special_tokens` is merged key by key, since a method sets its EOS
    and a job may still choose its BOS, and so are the actors of pools.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        for section, values in layer.values.items():
            if not isinstance(values, Mapping):
                merged[section] = values
                origins[section] = layer.origin
                continue
            into = merged.setdefault(section, {})
            if not isinstance(into, dict):
                into = merged[section] = {}
            for key, value in values.items():
                into[key] = _over(into.get(key), value, deep=key in _MERGED)
                origins[f"{section}.{key}"] = layer.origin
    return merged, origins


def validate(
    model: type[_SectionT],
    document: Mapping[str, Any],
    *,
    at: str = "",
    origins: Mapping[str, str] | None = None,
    partial: bool = False,
) -> _SectionT:
    """Return a document as a frozen section; ConfigError says what was got and allowed."""
    refuse_secrets(document, at)
    try:
        # Strict JSON mode takes YAML's lists for tuples, and still refuses "3" for 3.
        written = json.dumps(document, default=as_text)
        return model.model_validate_json(written, context={PARTIAL: partial})
    except (TypeError, ValueError) as error:
        if not isinstance(error, ValidationError):
            raise ConfigError(f"{at or 'config'}: {error}") from error
        said = explained(error, document, model, at=at, origins=origins or {})
        raise ConfigError(said) from error


def validate_partial(source: JobSource) -> None:
    """Check the keys that a job sets, before its method adds some; ConfigError if one is wrong."""
    document, origins = merge(source.layers)
    _check_place(document)
    encoder = document.get("encoder")
    if isinstance(encoder, dict) and "model" not in encoder and "method" in encoder:
        document["encoder"] = {**encoder, "model": "-"}
    validate(Job, document, origins=origins, partial=True)


def validate_encoder(source: JobSource) -> None:
    """Check every key of an `encoder` section that stands alone; ConfigError if one is wrong."""
    document, origins = merge(source.layers)
    _check_place(document)
    encoder = document["encoder"]
    named = {"model": "-"} if "method" in encoder else {}
    validate(Recipe, {**named, **encoder}, at="encoder", origins=origins, partial=True)


def _check_place(document: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that only resolved recipes have."""
    encoder = document.get("encoder")
    if isinstance(encoder, dict) and encoder.get("generate") is not None:
        raise ConfigError(
            "encoder.generate: generate is a section of its own; write it beside encoder"
        )


def recipe_from(values: Mapping[str, Any], origins: Mapping[str, str]) -> Recipe:
    """Return an `encoder` section as a resolved recipe."""
    return validate(Recipe, values, at="encoder", origins=origins)


def trajectory_settings(overrides: Sequence[str]) -> TrajectorySettings:
    """Return the settings that `key=value` overrides make; ConfigError if one is wrong."""
    written: dict[str, Any] = {}
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: allowed is KEY=VALUE, such as count=20")
        written[key.strip()] = yaml.load(raw, _Loader)
    return validate(TrajectorySettings, written, at="--set")


def _over(old: Any, new: Any, *, deep: bool) -> Any:
    if deep and isinstance(old, Mapping) and isinstance(new, Mapping):
        return {**old, **new}
    return new


def _override(text: str) -> Layer:
    path, equals, raw = text.partition("=")
    keys = path.strip().split(".")
    if not equals or len(keys) < 2 or keys[0] not in _SECTIONS:
        raise ConfigError(
            f"--set {redacted(path)}: allowed is SECTION.KEY=VALUE with a section of"
            f" {', '.join(_SECTIONS)}"
        )
    try:
        value: Any = yaml.load(raw, _Loader)
    except _TwiceError as error:
        raise ConfigError(f"--set {path}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        what = _without_its_text(error)
        raise ConfigError(f"--set {path}: the value is not valid YAML: {what}") from None
    for key in reversed(keys):
        value = {key: value}
    return Layer(f"--set {path.strip()}", _expanded(value), value)


def _lookup(values: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _expanded(document: dict[str, Any]) -> dict[str, Any]:
    # Once more than at validation: a message about a variable shows what stands around it.
    refuse_secrets(document)
    for path in PATHS:
        section, key = path.split(".")
        values = document.get(section)
        if isinstance(values, dict) and key in values:
            document = {**document, section: {**values, key: _expand(values[key], path)}}
    if (fits := document.get("fit", ())) is None:
        document = {key: value for key, value in document.items() if key != "fit"}
    elif isinstance(fits, list):
        document = {**document, "fit": (fits := [*fits])}
        for at, fit in enumerate(fits):
            if isinstance(fit, dict) and "from" in fit:
                fits[at] = {**fit, "from": _expand(fit["from"], f"fit.{at}.from")}
    return document


def _expand(value: Any, path: str) -> Any:
    if isinstance(value, list):
        return [_expand(item, path) for item in value]
    if isinstance(value, dict) and path == "input.table":
        return {key: _expand(item, f"{path}.{key}") for key, item in value.items()}
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        name = match[1]
        if name not in os.environ:
            raise ConfigError(f"{path}: the environment variable {name} is not set; got {value!r}")
        if names_secret(name):
            raise ConfigError(
                f"{path}: got the variable {name}, whose name is a secret's, {ADVICE}"
            )
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", variable, value)
