from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from embedjob.config.job_file import read_yaml
from embedjob.methods.catalogue import names, read_method
from embedjob.reports.method_pages import page, show_method, show_methods

DOCS = Path(__file__).parents[2] / "docs"
PAGE, QUALITY = DOCS / "methods.md", DOCS / "quality.yaml"


def test_the_page_is_what_the_files_say() -> None:
    said = (
        "docs/methods.md is not what the method files give; write it anew with python -c 'from"
        ' embedjob.reports.method_pages import page; print(page("docs/quality.yaml"), end="")\''
        " > docs/methods.md"
    )
    assert PAGE.read_text(encoding="utf-8") == page(QUALITY), said


def test_every_figure_is_of_a_method_that_there_is() -> None:
    assert set(read_yaml(QUALITY)) <= {*names(), "all-MiniLM-L6-v2"}


def test_the_list_names_every_method() -> None:
    console = Console(file=StringIO(), width=400)
    show_methods(console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split()[0] for line in lines[1:]] == names()


@pytest.mark.parametrize("name", names())
def test_a_method_is_shown_with_its_paper_and_every_key(name: str) -> None:
    console = Console(file=StringIO(), width=10_000)
    show_method(name, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    method = read_method(name)
    assert method.citation.title in shown
    assert all(f"{key}: " in shown for key in method.encoder)
    assert all(
        f"{role}: {key}: " in shown for role, keys in (method.roles or {}).items() for key in keys
    )


@pytest.mark.parametrize(
    ("name", "passes", "needs"),
    [
        ("prompteol", "1", "-"),
        ("metaeol", "8", "-"),
        ("contrastive_prompting", "1 + 5 blocks", "-"),
        ("promptreps_multi", "1 + up to 9 of one token", "greedy decoding"),
    ],
)
def test_the_table_counts_parts_of_passes_too(name: str, passes: str, needs: str) -> None:
    rows = [line.split(" | ") for line in page(QUALITY).splitlines() if line.startswith("| ")]
    columns = {cell.strip("| "): number for number, cell in enumerate(rows[0])}
    [row] = [row for row in rows if row[0] == f"| [{name}](#{name})"]
    assert row[columns["Passes"]] == passes
    assert row[columns["Needs"]] == needs
    assert {len(one) for one in rows} == {7}
