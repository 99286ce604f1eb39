"""The architecture: floors, homes of libraries, sizes and names of modules, light imports."""

import ast
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOUSE = ROOT / "embedjob"
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in HOUSE.rglob("*.py"))
PROGRAMS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "jobs").rglob("*.py"))

# From below: a module imports only from floors below its own, and from its own room.
FLOORS = (
    {"errors"},
    {"config"},
    {"storage"},
    {"text", "vectors", "input", "methods"},
    {"output", "models"},
    {"job", "static"},
    {"encoder"},
    {"stages"},
    {"pipeline"},
    {"reports"},
    {"cli", "embedjob"},
    {"jobs"},
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Rooms that import a library when they are imported, and those that do inside functions.
HOMES = {
    "accelerate": {"encoder"},
    "botocore": {"storage"},
    "deltalake": set(),
    "fsspec": {"storage"},
    "gguf": {"models"},
    "huggingface_hub": {"models"},
    "peft": {"encoder"},
    "pyarrow": {"input", "output", "job", "stages", "reports", "jobs"},
    "pydantic": {"config"},
    "pyiceberg": set(),
    "ray": {"stages"},
    "rich": {"reports", "cli", "jobs"},
    "s3fs": {"storage"},
    "safetensors": {"encoder", "output"},
    "sentencex": {"text"},
    "tokenizers": {"text", "models"},
    "torch": {"vectors", "encoder"},
    "torchao": {"encoder"},
    "transformers": {"encoder"},
    "typer": {"cli"},
}
LATE_HOMES = {
    "deltalake": {"input"},
    "pyiceberg": {"input"},
    "ray": {"jobs"},
    "safetensors": {"models"},
    "torch": {"models"},
    "transformers": {"models"},
}
MAX_LINES, MAX_FILES, MAX_NOQA = 400, 15, 10
BANNED_NAMES = {"utils", "util", "common", "base", "core", "helpers", "helper", "misc"}
# Modules of fewer lines are part of their one importer, unless they are an entry of a table.
SMALL = 80
TABLE_ENTRIES = {
    "embedjob/encoder/outputs/decoding.py",
    "embedjob/encoder/outputs/likelihoods.py",
    "embedjob/encoder/outputs/routers.py",
    "embedjob/reports/summary.py",
    "embedjob/storage/fsspec_backend.py",
    "embedjob/vectors/aggregation.py",
}


def _room(module: str) -> str:
    """The room of a module: its folder in the house, or its own name beside the folders."""
    parts = module.removesuffix(".__init__").split(".")
    if parts[0] == "jobs":
        return "jobs"
    if len(parts) == 1 or parts[1] not in FLOOR_OF:
        return "cli" if parts[-1] == "__main__" else "embedjob"
    return parts[1]


def _name(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".")


def _imports(path: str) -> Iterator[tuple[str, int, bool]]:
    """Every module that a file imports, the line, and whether it waits until a function runs."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    late = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, id(node) in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno, id(node) in late


@pytest.mark.parametrize("path", MODULES + PROGRAMS)
def test_imports_lead_only_down(path: str) -> None:
    here = _room(_name(path))
    for module, line, _ in _imports(path):
        there = _room(module) if module.split(".")[0] == "embedjob" else here
        lower = FLOOR_OF[there] < FLOOR_OF[here]
        assert there == here or lower, f"{path}:{line}: {here} imports {module}"


@pytest.mark.parametrize("path", MODULES + PROGRAMS)
def test_heavy_libraries_stay_at_home(path: str) -> None:
    here = _room(_name(path))
    for module, line, late in _imports(path):
        library = module.split(".")[0]
        homes = HOMES.get(library, {here}) | (LATE_HOMES.get(library, set()) if late else set())
        assert here in homes, f"{path}:{line}: {library} is at home in {sorted(homes)}"


@pytest.mark.parametrize("path", MODULES + PROGRAMS)
def test_modules_are_short_and_well_named(path: str) -> None:
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path}: move what belongs together to a module of its own"
    assert not BANNED_NAMES.intersection(Path(path).with_suffix("").parts)


def test_folders_are_small() -> None:
    sizes = Counter(Path(path).parent.as_posix() for path in MODULES if "__init__" not in path)
    full = {folder: size for folder, size in sizes.items() if size > MAX_FILES}
    assert full == {}, "move modules that belong together to a folder of their own"


def test_no_two_modules_share_a_name() -> None:
    names = Counter(Path(path).stem for path in MODULES if not path.endswith("__init__.py"))
    assert [name for name, times in names.items() if times > 1] == []


def _defined(body: Sequence[ast.stmt]) -> Iterator[str]:
    """The public names that statements give a meaning."""
    for node in body:
        names: list[str] = []
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            inside = (one for target in targets for one in ast.walk(target))
            names = [one.id for one in inside if isinstance(one, ast.Name)]
        elif isinstance(node, ast.If | ast.Try):
            yield from _defined([*node.body, *node.orelse])
        yield from (name for name in names if not name.startswith("_"))


def test_no_public_name_has_two_meanings() -> None:
    # A command, and what `import embedjob` offers, is called as what it opens.
    doors = {"embedjob/__init__.py", "embedjob/cli.py"}
    times: Counter[str] = Counter()
    for path in MODULES:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        times.update({*_defined(tree.body)} if path not in doors else ())
    assert [name for name, number in times.items() if number > 1] == []


def test_small_modules_have_several_importers_or_are_entries_of_a_table() -> None:
    importers = Counter(
        target
        for path in MODULES
        for target in {
            name
            for module, _, _ in _imports(path)
            for name in (module, module.rpartition(".")[0])
            if name != _name(path)
        }
    )
    small = [
        path
        for path in MODULES
        if Path(path).stem not in ("__init__", "__main__")
        and len((ROOT / path).read_text(encoding="utf-8").splitlines()) < SMALL
        and importers[_name(path)] == 1
    ]
    assert sorted(set(small) - TABLE_ENTRIES) == []
    assert sorted(TABLE_ENTRIES.difference(MODULES)) == []


def test_package_files_are_empty() -> None:
    full = [path for path in HOUSE.rglob("__init__.py") if path.read_text().strip()]
    assert full == [HOUSE / "__init__.py"]


def test_few_lines_are_excused_and_each_says_why() -> None:
    excused = []
    for folder in ("embedjob", "jobs", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            with path.open("rb") as file:
                for token in tokenize.tokenize(file.readline):
                    if token.type == tokenize.COMMENT and re.search(r"#\s*noqa\b", token.string):
                        excused.append(f"{path.relative_to(ROOT)}:{token.start[0]}: {token.string}")
    explained = re.compile(r"#\s*noqa: [A-Z0-9, ]+\b\W+\w+ \w+")
    assert [line for line in excused if not explained.search(line)] == []
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


HEAVY = ("torch", "ray", "transformers")


@pytest.mark.parametrize(
    ("room", "heavy"),
    [
        ("errors", (*HEAVY, "pyarrow", "pydantic", "s3fs")),
        ("config", (*HEAVY, "pyarrow", "s3fs")),
        ("storage", (*HEAVY, "pyarrow")),
        ("text", (*HEAVY, "pyarrow")),
        ("methods", (*HEAVY, "pyarrow", "s3fs")),
        ("vectors", ("ray", "transformers", "pyarrow")),
        ("input", HEAVY),
        ("output", HEAVY),
        ("models", HEAVY),
        ("job", HEAVY),
        ("static", HEAVY),
        pytest.param("encoder", ("ray",), marks=pytest.mark.slow),
    ],
)
def test_a_light_import_stays_light(room: str, heavy: tuple[str, ...]) -> None:
    modules = [_name(path) for path in MODULES if _room(_name(path)) == room]
    assert modules
    assert _loaded("\n".join(f"import {module}" for module in modules), heavy) == "[]"


def test_the_package_and_its_help_load_nothing_heavy() -> None:
    asks = """
from embedjob.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
"""
    assert _loaded("import embedjob", (*HEAVY, "pyarrow", "s3fs")) == "[]"
    assert _loaded(asks, HEAVY) == "[]"
