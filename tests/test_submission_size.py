"""What `ray job submit --working-dir .` uploads from a checkout that has been used."""

import os
import shutil
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package
from ray._private.runtime_env.working_dir import upload_working_dir_if_needed

ROOT = Path(__file__).parent.parent
LIMIT = 5 * 2**20
USED = (
    ".venv/lib/python3.11/site-packages/torch/libtorch.so",
    "outputs/quickstart/data/0123456789ab/shard.parquet",
    ".git/objects/pack/pack-1.pack",
    ".mypy_cache/3.11/cache.db",
    ".hypothesis/examples/1",
    "model/model.safetensors",
    "jobs/model.gguf",
)


def _package(checkout: Path, to: Path, *, gitignore: bool) -> zipfile.ZipFile:
    """The archive that Ray's job client would send for this directory."""

    def upload(directory: str, excludes: list[str]) -> None:
        create_package(directory, to, include_gitignore=gitignore, excludes=excludes)

    upload_working_dir_if_needed(
        {"working_dir": str(checkout)}, include_gitignore=gitignore, upload_fn=upload
    )
    return zipfile.ZipFile(to)


@pytest.fixture
def used_checkout(tmp_path: Path) -> Path:
    """A copy of this checkout with what a week of use leaves in it."""
    checkout = tmp_path / "embedjob"
    left_out = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache")

    def ignored(folder: str, names: list[str]) -> set[str]:
        # A folder of this name deeper down is a room of the package.
        written = {"outputs"} if Path(folder) == ROOT else set()
        return {*left_out(folder, names), *written}

    shutil.copytree(ROOT, checkout, ignore=ignored)
    for name in USED:
        path = checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(6 * 2**20))
    (checkout / ".env").write_text("AWS_SECRET_ACCESS_KEY=secret")
    return checkout


@pytest.mark.parametrize("gitignore", [True, False])
def test_a_used_checkout_uploads_little(
    used_checkout: Path, tmp_path: Path, gitignore: bool
) -> None:
    package = _package(used_checkout, tmp_path / "package.zip", gitignore=gitignore)
    assert (tmp_path / "package.zip").stat().st_size < LIMIT
    names = set(package.namelist())
    assert not names.intersection([*USED, ".env"])
    assert not [name for name in names if name.startswith("tests/")]


def test_what_a_job_needs_is_inside(used_checkout: Path, tmp_path: Path) -> None:
    names = set(_package(used_checkout, tmp_path / "package.zip", gitignore=True).namelist())
    needed = [
        path.relative_to(ROOT).as_posix()
        for pattern in ("embedjob/**/*.py", "embedjob/**/*.yaml", "jobs/**/*.py", "jobs/**/*.yaml")
        for path in ROOT.glob(pattern)
    ]
    assert set(needed) <= names
    assert {"embedjob/methods/prompteol.yaml", "jobs/demo/scifact/abstracts-0.parquet"} <= names


def test_this_very_checkout_uploads_little(tmp_path: Path) -> None:
    _package(ROOT, tmp_path / "package.zip", gitignore=True)
    assert (tmp_path / "package.zip").stat().st_size < LIMIT
