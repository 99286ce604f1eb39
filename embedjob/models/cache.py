"""Node cache: materialised models, and values that are slow to compute."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from embedjob.errors import ModelError


def build_once(name: str, key: Sequence[str], make: Callable[[Path], None]) -> Path:
    """Return the directory that `make` fills, in a single process of the node.

    It is filled under another name and then renamed: a reader never sees half of it, and a killed
    process leaves nothing that a later process would trust. ModelError if the cache is read-only.
    """
    slug = re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.")[-60:]
    place = _directory("models") / f"{slug}-{_digest(key)}"
    if place.is_dir():
        return place
    with FileLock(f"{place}.lock"):
        if not place.is_dir():
            aside = place.with_name(f"{place.name}.partial")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            make(aside)
            aside.rename(place)
    return place


def cached_json(key: Sequence[str], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `compute` returns, computed once per key and node; it must survive JSON."""
    place = _directory("facts") / f"{_digest(key)}.json"
    try:
        kept: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        return kept
    except (OSError, ValueError):
        computed = compute()
    handle, aside = tempfile.mkstemp(dir=place.parent, suffix=".partial")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(computed, file)
    os.replace(aside, place)
    return computed


def _directory(name: str) -> Path:
    root = Path(os.environ.get("EMBEDJOB_CACHE") or "~/.cache/embedjob").expanduser()
    try:
        (root / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"the model cache {root} cannot be written ({error.strerror or error}); set"
            " EMBEDJOB_CACHE to a writable directory"
        ) from error
    return root / name


def _digest(key: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(key)).encode()).hexdigest()[:20]
