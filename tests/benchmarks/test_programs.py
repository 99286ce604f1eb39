"""The programs as files: each parses, tells how it is run, and is named where its claim stands."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "benchmarks/gpu").glob("*.py")]
PROGRAMS = sorted(path for path in FILES if "__main__" in path.read_text(encoding="utf-8"))
PAGE = ROOT / "docs" / "performance.md"


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_says_how_it_is_run_and_the_page_names_it(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    command = "python -m " + path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    assert command in (ast.get_docstring(tree) or "")
    assert f"`{command}`" in PAGE.read_text(encoding="utf-8")
