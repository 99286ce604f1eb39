"""The architecture: floors, rooms, homes of heavy libraries, module length, a light import."""

import ast
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOUSE = ROOT / "embedjob"
MODULES = sorted(HOUSE.rglob("*.py"))
PROGRAMS = sorted((ROOT / "jobs").rglob("*.py"))
TESTED = [path.relative_to(ROOT).as_posix() for path in MODULES + PROGRAMS]

FLOORS = {
    "errors": 0,
    "config": 1,
    "storage": 2,
    "text": 3,
    "vectors": 3,
    "shards": 3,
    "methods": 3,
    "encoder": 4,
    "stages": 5,
    "survey": 5,
    "ownership": 6,
    "conclusion": 6,
    "pipeline": 7,
    "inspect": 7,
    "cli": 8,
    "jobs": 8,
    "embedjob": 9,
}
# What shares a room with the file it serves.
SHARED_ROOMS = {
    "jobfile": "config",
    "segments": "config",
    "interventions": "config",
    "recipe": "config",
    "readout": "config",
    "pieces": "config",
    "fillings": "config",
    "braces": "config",
    "beside": "config",
    "backends": "storage",
    "patterns": "storage",
    "create_only": "storage",
    "__main__": "cli",
    "__init__": "embedjob",
}
HOMES = {
    "fsspec": {"storage"},
    "s3fs": {"storage"},
    "botocore": {"storage"},
    "pydantic": {"config"},
    "tokenizers": {"text", "encoder"},
    "torch": {"vectors", "encoder"},
    "transformers": {"encoder"},
    "peft": {"encoder"},
    "accelerate": {"encoder"},
    "torchao": {"encoder"},
    "safetensors": {"encoder"},
    "gguf": {"encoder"},
    "huggingface_hub": {"encoder"},
    "pyarrow": {"shards", "stages", "inspect"},
    "ray": {"stages", "cli", "jobs"},
    "typer": {"cli"},
    "rich": {"inspect", "cli", "jobs"},
}
# jobs/ holds programs: the demo reads the output back as any reader would.
PROGRAMS_MAY_IMPORT = {"pyarrow"}
BANNED_NAMES = {"utils", "util", "common", "base", "core", "helpers", "helper", "misc"}
MAX_LINES = 250
MAX_NOQA = 10


def _room(path: str) -> str:
    """The room that a file lives in: its folder, or its own name on the ground of the house."""
    parts = Path(path).with_suffix("").parts
    if parts[0] == "jobs":
        return "jobs"
    return SHARED_ROOMS.get(parts[1], parts[1])


def _imports(path: str) -> Iterator[tuple[str, int]]:
    """Every module imported anywhere in a file, inside functions too, with its line."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def _room_of_import(module: str) -> str | None:
    """The room an import leads to; None outside the house."""
    parts = module.split(".")
    if parts[0] != "embedjob":
        return None
    if len(parts) == 1:
        return "embedjob"
    return SHARED_ROOMS.get(parts[1], parts[1] if parts[1] in FLOORS else "embedjob")


@pytest.mark.parametrize("path", TESTED)
def test_every_file_has_a_floor(path: str) -> None:
    assert _room(path) in FLOORS


@pytest.mark.parametrize("path", TESTED)
def test_imports_lead_only_down(path: str) -> None:
    here = _room(path)
    for module, line in _imports(path):
        there = _room_of_import(module)
        if there in (None, here) or (here == "jobs" and there in ("cli", "embedjob")):
            continue
        assert FLOORS[there] < FLOORS[here], f"{path}:{line}: {here} imports {module}"


@pytest.mark.parametrize("path", TESTED)
def test_heavy_libraries_stay_at_home(path: str) -> None:
    here = _room(path)
    for module, line in _imports(path):
        library = module.split(".")[0]
        if here == "jobs" and library in PROGRAMS_MAY_IMPORT:
            continue
        allowed = HOMES.get(library, {here})
        assert here in allowed, f"{path}:{line}: {library} is at home in {sorted(allowed)}"


@pytest.mark.parametrize("path", TESTED)
def test_modules_are_short_and_well_named(path: str) -> None:
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= MAX_LINES
    assert not BANNED_NAMES.intersection(Path(path).with_suffix("").parts)


def test_package_files_are_empty() -> None:
    full = [path for path in HOUSE.rglob("__init__.py") if path.read_text().strip()]
    assert [path for path in full if path.parent != HOUSE] == []


def test_few_lines_are_excused_and_each_says_why() -> None:
    excused = []
    for path in sorted(ROOT.glob("*/**/*.py")):
        if path.relative_to(ROOT).parts[0] not in ("embedjob", "jobs", "tests", "benchmarks"):
            continue
        with path.open("rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type == tokenize.COMMENT and re.search(r"#\s*noqa\b", token.string):
                    excused.append(f"{path.relative_to(ROOT)}:{token.start[0]}: {token.string}")
    unexplained = [
        line for line in excused if not re.search(r"#\s*noqa: [A-Z0-9, ]+\b\W+\w+ \w+", line)
    ]
    assert unexplained == []
    assert len(excused) <= MAX_NOQA, excused


def _loaded(program: str, heavy: tuple[str, ...]) -> str:
    """Which of the heavy libraries a fresh interpreter has loaded after `program`."""
    report = f"\nimport sys\nprint([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program + report],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


HEAVY = ("torch", "ray", "transformers", "pyarrow")


@pytest.mark.parametrize(
    ("room", "heavy"),
    [
        ("errors", (*HEAVY, "pydantic", "s3fs")),
        ("config", (*HEAVY, "s3fs")),
        ("storage", HEAVY),
        ("text", HEAVY),
        ("methods", (*HEAVY, "s3fs")),
        ("vectors", ("ray", "transformers", "pyarrow")),
        ("shards", ("torch", "ray", "transformers")),
        ("encoder", ("ray",)),
    ],
)
def test_a_light_import_stays_light(room: str, heavy: tuple[str, ...]) -> None:
    files = [path for path in TESTED if _room(path) == room]
    assert files
    modules = [path.removesuffix(".py").replace("/", ".") for path in files]
    assert _loaded("\n".join(f"import {module}" for module in modules), heavy) == "[]"


def test_planning_a_model_needs_no_torch() -> None:
    assert _loaded("import embedjob.models.source", ("torch", "ray")) == "[]"


def test_the_package_and_its_help_load_nothing_heavy() -> None:
    asks = """
from embedjob.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
"""
    assert _loaded("import embedjob", (*HEAVY, "s3fs")) == "[]"
    assert _loaded(asks, ("torch", "ray", "transformers")) == "[]"
