"""The methods as a page of the docs, as lines at a terminal, and with their figures.

Covers: embedjob.reports.method_listing, embedjob.reports.method_figures
"""

import json
from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from embedjob.config.job_file import job_source, read_yaml
from embedjob.methods.catalogue import names, read_method
from embedjob.reports.method_figures import FIGURE_VARIANTS
from embedjob.reports.method_listing import resolved_lines, show_method, show_methods
from embedjob.reports.method_pages import page
from tests.fakes import tiny_tokenizer

SMOLLM2 = (read_method("token_prepending").for_models or {})["SmolLM2-135M"].config
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
    for figures in read_yaml(QUALITY).values():
        known = {
            name.removesuffix(next((one for one in FIGURE_VARIANTS if name.endswith(one)), ""))
            for name in figures
        }
        assert known <= {*names(), "all-MiniLM-L6-v2"}


def test_a_figure_stands_beside_what_it_costs(tmp_path: Path) -> None:
    def figure(spearman: float, tokens: float, seconds: float) -> dict[str, float]:
        return {
            "spearman": spearman,
            "tokens": tokens + 3,
            "computed": tokens,
            "cpu_seconds": seconds,
        }

    taken = {
        "stsb.dev": {"mean": {"spearman": 50.0}, "prompteol": {"spearman": 70.0}},
        "sickr.dev": {"mean": figure(55, 10, 2), "prompteol": figure(60.5, 90, 8)},
    }
    quality = tmp_path / "quality.yaml"
    quality.write_text(yaml.safe_dump(taken))
    shown = page(quality)
    assert "| prompteol | 70.00 | 60.50 | 93 | 90 | 9.0 | 4.0 |\n| mean | 50.00 | 55.00 |" in shown
    assert "| prompteol | mean | +20.0 | +5.5 | 9.0 | 4.0 |\n" in shown
    del taken["sickr.dev"]["mean"]
    quality.write_text(yaml.safe_dump(taken))
    assert "| prompteol | 70.00 | 60.50 | - | - | - | - |\n| mean | 50.00 | - |" in page(quality)
    assert "| prompteol | mean |" not in page(quality)


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
    assert (method.differs or "").strip() in shown
    assert all(
        f"{model} alone ({one.because.strip()})" in shown
        for model, one in (method.for_models or {}).items()
    )
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
    table = page(QUALITY).partition("## Figures")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    columns = {cell.strip("| "): number for number, cell in enumerate(rows[0])}
    [row] = [row for row in rows if row[0] == f"| [{name}](#{name})"]
    assert row[columns["Passes"]] == passes
    assert row[columns["Needs"]] == needs
    assert {len(one) for one in rows} == {6}


AUTHORS_DO_NOT_CUT = (
    "contrastive_prompting",
    "cot_ke_mean",
    "knowledge_enhanced",
    "metaeol",
    "moee",
    "pretended_cot",
    "prompteol",
    "prompteol_icl",
    "token_prepending",
)


@pytest.mark.parametrize("name", [*AUTHORS_DO_NOT_CUT, "splade", "bert_first_last"])
def test_a_method_says_that_it_cuts_where_its_authors_do_not(name: str) -> None:
    method = read_method(name)
    assert method.encoder.get("max_tokens", 512) == 512
    assert "512 tokens" in (method.differs or "")


def test_a_job_is_told_which_model_its_method_takes_its_own_for(tmp_path: Path) -> None:
    lines = {}
    for layers in (30, 24):
        tiny = {**SMOLLM2, "num_hidden_layers": layers}
        folder = tmp_path / str(layers)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(tiny))
        tiny_tokenizer("gpt2").save(str(folder / "tokenizer.json"))
        encoder = {"method": "token_prepending", "model": str(folder)}
        job = {"input": {"path": "in", "text": "t"}, "output": {"path": "o"}, "encoder": encoder}
        lines[layers] = resolved_lines(job_source(job))
    assert "takes this model for SmolLM2-135M of those" in lines[30][0]
    assert "takes this model for none of those" in lines[24][0]
    [own], [published] = (
        [line for line in lines[layers] if line.startswith("encoder.interventions:")]
        for layers in (30, 24)
    )
    assert own.endswith("# method token_prepending for SmolLM2-135M")
    assert "'start': 24" in own
    assert published.endswith("# method token_prepending")
    assert "'start': 1," in published
