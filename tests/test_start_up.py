"""What a command imports before it answers: seconds that each newcomer, trial and test pays."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests import running
from tests.cluster import ROOT

# Each takes from a fifth of a second to several seconds to import.
HEAVY = (
    "torch",
    "ray",
    "transformers",
    "torchao",
    "peft",
    "accelerate",
    "s3fs",
    "fsspec",
    "botocore",
    "huggingface_hub",
    "pyarrow.dataset",
)
# What shows a text alone needs neither of these, a half of a second.
ARRAYS = ("pyarrow", "numpy")
TEXTS_ALONE = (["--help"], ["run", "--help"], ["methods"], ["methods", "prompteol"])

PROGRAM = f"""
import contextlib, io, json, sys
from embedjob.cli import main
out, err = io.StringIO(), io.StringIO()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = main(sys.argv[1:])
names = {HEAVY!r} + ({ARRAYS!r} if sys.argv[1:] in {TEXTS_ALONE!r} else ())
heavy = [name for name in names if name in sys.modules]
print(json.dumps([code, heavy, out.getvalue() + err.getvalue()]))
"""


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that would run, a job whose file is wrong, and an output without files."""
    made = tmp_path_factory.mktemp("start-up")
    running.write_shard(made / "in" / "a.parquet", running.texts(5))
    job = running.job(made / "in", made / "out", model)
    running.job_file(job, made)
    (made / "wrong").mkdir()
    running.job_file({**job, "encoder": {"pooling": "mene"}}, made / "wrong")
    (made / "no-input").mkdir()
    nothing = running.job(made / "nothing", made / "out", made / "no-model")
    running.job_file(nothing, made / "no-input")
    (made / "no-column").mkdir()
    column = {**job, "input": {"path": str(made / "in"), "text": "bdoy"}}
    running.job_file(column, made / "no-column")
    return made


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "verify"),
        (["run", "--help"], 0, "--takeover"),
        (["methods"], 0, "prompteol"),
        (["methods", "prompteol"], 0, "templates"),
        (["methods", "prompteol", "--resolved", "{folder}/job.yaml"], 0, "encoder.pooling"),
        (["methods", "promteol"], 2, "prompteol"),
        (["preview", "{folder}/job.yaml"], 0, "row 0 view 0"),
        (["verify", "{folder}/in"], 2, "_embedjob.json"),
        (["prune", "{folder}/in"], 2, "no snapshot"),
        (["run", "{folder}/wrong/job.yaml"], 2, "encoder.pooling"),
        (["run", "{folder}/missing.yaml"], 2, "cannot be read"),
        # Its model is missing, too: the input is looked at first, for it is the cheaper to list.
        (["run", "{folder}/no-input/job.yaml"], 2, "input.path"),
        (["run", "{folder}/no-column/job.yaml"], 2, "bdoy"),
    ],
)
def test_a_command_that_embeds_nothing_imports_nothing_heavy(
    arguments: list[str], code: int, said: str, folder: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *(one.format(folder=folder) for one in arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    ended, heavy, printed = json.loads(done.stdout.splitlines()[-1])
    assert (ended, said in printed, heavy) == (code, True, []), printed


ACTOR = """
import sys
from embedjob.config.recipe import Recipe
from embedjob.stages.engine import RecipeEngine
recipe = Recipe.model_validate({"model": sys.argv[1], "dtype": "float32", "max_tokens": 64})
RecipeEngine(recipe.model_dump_json()).load_encoder()
print([name for name in ("scipy", "sklearn", "torchao") if name in sys.modules])
import scipy, torchao
"""


@pytest.mark.slow
def test_an_encoder_loads_without_the_packages_of_other_tasks(model: Path) -> None:
    """They are installed here, and can be imported after it; torchao prints nothing then."""
    ended = subprocess.run(
        [sys.executable, "-c", ACTOR, str(model)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.splitlines() == ["[]"]
    assert ended.stderr == ""


@pytest.mark.parametrize("program", ["embed.py", "demo.py"])
def test_a_python_without_our_packages_is_named_with_the_two_ways_out(
    program: str, tmp_path: Path
) -> None:
    """As on a cluster whose Ray was started from another environment."""
    venv.create(tmp_path, symlinks=True, with_pip=False)
    bare = str(tmp_path / "bin" / "python")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [bare, str(ROOT / "jobs" / program), "job.yaml"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    [said] = done.stderr.splitlines()
    assert done.returncode != 0
    assert said.startswith(f"embedjob: {bare} has no module ")
    assert "start Ray from that environment" in said
    assert "runtime_env" in said
