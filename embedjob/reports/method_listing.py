"""The methods there are, for people at a terminal; what a job makes of one, key by key."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from embedjob.config.job_file import DEFAULT, JobSource
from embedjob.methods.catalogue import names, read_method, setting_for
from embedjob.reports.method_pages import reference


def show_methods(console: Console) -> None:
    """Print a line for each method."""
    table = Table("method", "paper", "forward tokens", "good for", box=None)
    for name in names():
        method = read_method(name)
        cited = method.citation
        first, *others = cited.authors.split(",")
        paper = f"{first}{' et al.' if others else ''} {cited.year}"
        table.add_row(*map(Text, (name, paper, method.forward_tokens, method.good_for.strip())))
    console.print(table)


def show_method(name: str, console: Console) -> None:
    """Print what one method is, where it comes from, and its knobs."""
    method = read_method(name)
    console.print(Text.assemble((name, "bold"), f": {method.summary.strip()}"), highlight=False)
    if method.differs:
        _line(console, f"what differs from the authors' code: {method.differs.strip()}")
    _line(console, reference(method))
    model = f"{method.model or 'none published'} ({method.licence.strip()})"
    _line(console, f"good for: {method.good_for.strip()}; default model: {model}")
    for key, value in [*method.encoder.items(), *(("fit", dict(fit)) for fit in method.fit)]:
        _line(console, f"  {key}: {value!r}")
    for key, value in (method.generate or {}).items():
        # The examples of a kind would fill a page; they are in the file.
        shown = ", ".join(value) if key == "kinds" else repr(value)
        _line(console, f"  generate.{key}: {shown}")
    for line in _role_lines(method.roles or {}):
        _line(console, f"  {line}")
    for known, setting in (method.for_models or {}).items():
        _line(console, f"  for {known} alone ({setting.because.strip()}):")
        for key, value in setting.encoder.items():
            _line(console, f"    {key}: {value!r}")
        for line in _role_lines(setting.roles or {}):
            _line(console, f"    {line}")


def resolved_lines(source: JobSource) -> list[str]:
    """Return every key of the resolved job with its value and who set it, one to a line.

    A method that has settings for some models says first which of them it takes this model for.
    """
    # Jobs need pyarrow, which half of the time of showing a method would be.
    from embedjob.job.resolve import resolve
    from embedjob.models.architecture import config_of

    resolved = resolve(source)
    lines = []
    name = resolved.config.encoder.method
    method = read_method(name) if name else None
    if method and method.for_models:
        model, _ = setting_for(method, config_of(resolved.folder))
        lines.append(
            f"# by its config.json, {name} takes this model for {model or 'none'} of those that it"
            f" has a setting for: {', '.join(method.for_models)}"
        )
    for section, values in resolved.config.model_dump(mode="json").items():
        if not isinstance(values, dict):
            lines.append(f"{section}: {values}  # {resolved.origins.get(section, DEFAULT)}")
            continue
        # What is generated is a section of its own.
        for key, value in ((k, v) for k, v in values.items() if k != "generate"):
            origin = resolved.origins.get(f"{section}.{key}", DEFAULT)
            lines.append(f"{section}.{key}: {value}  # {origin}")
    return lines


def _line(console: Console, text: str) -> None:
    console.print(Text(text), highlight=False)


def _role_lines(roles: Mapping[Any, Mapping[str, Any]]) -> Iterator[str]:
    for role, values in roles.items():
        for key, value in values.items():
            yield f"{role}: {key}: {value!r}"
