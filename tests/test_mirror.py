"""The mirror: each module of the package has a test file of its name, or is named in one.

A test file that covers modules of other names lists them at the end of its docstring:

    Covers: embedjob.room.module, embedjob.room.other
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "embedjob"
MODULES = sorted(
    ".".join(path.relative_to(TESTS.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if not path.stem.startswith("__")
)
FILES = sorted(path for path in TESTS.rglob("test_*.py") if path != Path(__file__))


def own_file(module: str) -> Path:
    """Return where the test file of a module's own name lies."""
    *rooms, name = module.split(".")[1:]
    return TESTS.joinpath(*rooms, f"test_{name}.py")


def covered(path: Path) -> Iterator[str]:
    """Yield the modules that a test file's docstring names, up to the docstring's end."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    for names in re.findall(r"^Covers: (.*?)(?:\n\n|\Z)", docstring, re.DOTALL | re.MULTILINE):
        yield from re.split(r",\s+", names.strip().removesuffix("."))


COVERED = {path: set(covered(path)) for path in FILES}


def test_each_module_has_a_test_file_of_its_name_or_is_named_in_one() -> None:
    named = set().union(*COVERED.values())
    lacking = {
        module: f"add {own_file(module).relative_to(TESTS.parent)}, or name it after `Covers:`"
        for module in MODULES
        if not own_file(module).exists() and module not in named
    }
    assert lacking == {}


def test_what_test_files_cover_exists() -> None:
    unknown = {str(path): modules - set(MODULES) for path, modules in COVERED.items()}
    assert {path: modules for path, modules in unknown.items() if modules} == {}


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_test_file_is_imported_by_another() -> None:
    """What several of them need is in a module that is no test."""
    imports = {
        f"{path.relative_to(TESTS)}: {name}"
        for path in TESTS.rglob("*.py")
        for name in _imported(path)
        if re.match(r"tests\..*\btest_", name)
    }
    assert imports == set()
