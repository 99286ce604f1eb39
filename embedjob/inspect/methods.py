"""The methods there are, and what a job makes of one."""

from rich.console import Console
from rich.table import Table

from embedjob.encoder.folder import folder_layer
from embedjob.encoder.source import materialize
from embedjob.jobfile import DEFAULT, Draft, validate_partial
from embedjob.methods.catalogue import names, read_method
from embedjob.methods.resolution import default_model, resolve
from embedjob.survey import source_in


def show_methods(console: Console) -> None:
    """Prints a line for each method."""
    table = Table("method", "paper", "forward tokens", "good for", box=None)
    for name in names():
        method = read_method(name)
        paper = f"{method.citation.authors.split(',')[0]} et al. {method.citation.year}"
        table.add_row(name, paper, method.forward_tokens, method.good_for)
    console.print(table)


def show_method(name: str, console: Console) -> None:
    """Prints what one method is, where it comes from, and its knobs."""
    method = read_method(name)
    cited = method.citation
    arxiv = f", arXiv:{cited.arxiv}" if cited.arxiv else ""
    console.print(f"[bold]{name}[/]: {method.summary.strip()}", highlight=False)
    console.print(f"{cited.authors}. {cited.title}. {cited.year}{arxiv}", highlight=False)
    console.print(f"good for: {method.good_for}; default model: {method.model}", highlight=False)
    for key, value in method.encoder.items():
        console.print(f"  {key}: {value!r}", highlight=False, markup=False)


def resolved_lines(draft: Draft) -> list[str]:
    """Every key of the resolved job, its value, and who set it."""
    validate_partial(draft)
    draft = default_model(draft)
    resolved = resolve(draft, folder_layer(materialize(source_in(draft), tokenizer_only=True)))
    lines = []
    for section, values in resolved.job.model_dump(mode="json").items():
        if not isinstance(values, dict):
            lines.append(f"{section}: {values}  # {resolved.origins.get(section, DEFAULT)}")
            continue
        for key, value in values.items():
            origin = resolved.origins.get(f"{section}.{key}", DEFAULT)
            lines.append(f"{section}.{key}: {value}  # {origin}")
    return lines
