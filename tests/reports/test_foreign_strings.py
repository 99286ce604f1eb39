"""Whatever a path, a title or a column is called, it is printed as it is.

Covers: embedjob.cli
"""

import ast
import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from embedjob.job.result import Outcomes, Result, RunFacts, summarize
from embedjob.reports.method_listing import show_method
from embedjob.reports.summary import show_summary

ROOT = Path(__file__).parents[2]
HOSTILE = ["/data/[x]/o", "/o[/dim]", "[/]", "[bold", "/:smile:/", "a]b[link=x]c", "[red]", "\\[x]"]


def _printed(show: object) -> str:
    console = Console(file=io.StringIO(), width=4000)
    show(console)  # type: ignore[operator]
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_summary_prints_what_it_is_given(text: str) -> None:
    facts = RunFacts(chunks_planned=1, chunks_done_before=1, seconds=1.0, fingerprint="f" * 64)
    summary = replace(summarize(Outcomes(), facts), snapshot=f"snap{text}")
    result = Result(summary, f"out{text}", (), f"verdict{text}", (f"note{text}",))
    said = _printed(lambda console: show_summary(result, console))
    for part in ("out", "snap", "verdict", "note"):
        assert f"{part}{text}" in said


def test_a_long_path_is_printed_whole() -> None:
    facts = RunFacts(chunks_planned=1, chunks_done_before=1, seconds=1.0, fingerprint="f" * 64)
    result = Result(summarize(Outcomes(), facts), "/out" * 60, (), "done")
    console = Console(file=io.StringIO(), width=80)
    show_summary(result, console)
    assert "/out" * 60 in "".join(console.file.getvalue().split())  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_method_of_ones_own_is_printed_as_it_is(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "[x]"
    folder.mkdir()
    path = folder / "mine.yaml"
    path.write_text(
        f"summary: 'about {text}'\n"
        f"citation: {{authors: 'A {text}', title: 'T {text}', year: 2024}}\n"
        f"good_for: 'g {text}'\nlicence: 'l {text}'\nmodel: null\nforward_tokens: text\n"
        "encoder: {pooling: mean}\n"
    )
    said = _printed(lambda console: show_method(str(path), console))
    for part in (str(path), f"about {text}", f"A {text}", f"T {text}", f"g {text}", f"l {text}"):
        assert part in said


def test_rich_gets_no_string_that_is_put_together_outside_of_text() -> None:
    """In what prints with rich, a foreign string goes through Text; formats hold numbers alone."""
    plain = {"cli.py": 2, "preview.py": 1, "demo.py": 6}
    for path in [*ROOT.glob("embedjob/**/*.py"), *ROOT.glob("jobs/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        named = [c for c in calls if isinstance(c.func, ast.Attribute) and c.args]
        rich = [
            c for c in named if ast.unparse(c.func).endswith(("onsole.print", "onsole().print"))
        ]
        made = [c for c in rich if any(isinstance(n, ast.JoinedStr) for n in c.args)]
        assert len(made) <= plain.get(path.name, 0), path


@pytest.mark.parametrize(
    ("before", "said", "code"),
    [
        ("", b"has no _embedjob.json", 2),
        (
            "import embedjob.reports.verify as at; at.verify = None\n",
            b"'NoneType' object is not",
            1,
        ),
    ],
)
def test_the_exit_code_is_what_was_said(
    before: str, said: bytes, code: int, tmp_path: Path
) -> None:
    """Also where a library's thread has the process aborted behind the last line."""
    program = (
        "import ctypes, sys; from embedjob.cli import program\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.__cxa_atexit(ctypes.cast(libc.abort, ctypes.c_void_p), None, None)\n"
        f"{before}program(['verify', sys.argv[1]])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, cwd=ROOT, check=False
    )
    assert said in ended.stderr
    assert ended.returncode == code
