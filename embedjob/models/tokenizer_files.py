"""Tokenizer files as transformers reads them: tokenizer.json, and what stands beside it.

`tokenizer_config.json` and its kin may say other than `tokenizer.json`: lower case, tokens to put
around a text, added tokens, a side to cut. What then counts is decided by one of the fifty classes
that transformers chooses from, whatever its version. transformers takes seconds to import and
memory to keep, which workers that only tokenize should not spend: it is asked once per node and
folder, in a process of its own, and its answer is kept as one `tokenizer.json`.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from embedjob.errors import ModelError
from embedjob.models import cache

TOKENIZER = "tokenizer.json"
# What may say other than tokenizer.json; without it, nothing does.
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_READ = frozenset({".json", ".txt", ".model", ".codes", ".tiktoken"})
_FACTS = "read.json"
_LIBRARIES = ("transformers", "tokenizers", "sentencepiece", "tiktoken", "protobuf")
# The parts of a tokenizer that decide ids, as people call them.
_PARTS = {
    "normalizer": "normalizer",
    "pre_tokenizer": "pre-tokenizer",
    "model": "model",
    "post_processor": "tokens around a text",
    "added_tokens": "added tokens",
}
# Of added tokens on which both agree, some thousands in some models, so many are compared.
_SOME_ADDED = 50
_SHOWN = 12
# transformers imports these where they are installed; no tokenizer needs them.
_UNUSED = ("torch", "torchvision", "torchao", "scipy", "sklearn", "PIL", "tensorflow", "jax")
_ANY_TEXT = "a"
# What tokenizers differ in: case, accents, scripts, blanks, digits, marks, and what is no text.
PROBES = (
    "",
    " ",
    "a",
    "A",
    " a",
    "a ",
    "  a  b  ",
    "\n",
    "a\nb\n\n\tc",
    "The Quick BROWN Fox",
    "Éa naïve CAFÉ İstanbul ß ŒUVRE",
    "e\u0301 A\u030a \ufb01 \u2460 \uff21\uff11",
    "日本語の文章、中国的首都。",
    "한국어 문장",
    "Это Ёлка",
    "هذا نص عربي",
    "नमस्ते",
    "1 12 123 1234 12345678 3.14 1,000",
    "don't I'M we'Ll 's",
    "Hello, world! (yes) [no] {x} <y> \"z\" 'q' “r” — …",
    "a_b-c/d\\e@f#g$h%i^j&k*l+m=n|o~p`q",
    "\u00a0a\u2003b\u200bc\u200dd\ufeffe",
    "▁a ▁ b",
    "👩‍👩‍👧 🎉",
    "\x00\x07\x1f\x7f\ufffd",
    "def f(x):\n    return x  # 1",
    "https://a.example/b?c=d",
    "supercalifragilisticexpialidocious" * 4,
    "x" * 120,
)


@dataclass(frozen=True)
class ReadFiles:
    """What transformers makes of a folder's tokenizer files.

    `path` is the tokenizer.json to read; `kind` the class, None where only tokenizer.json was read;
    `cuts_left` whether texts lose their beginning when they are cut; `differs` an example of a text
    with its ids under the folder's tokenizer.json and under `path`, None where all are equal;
    `parts` are the parts of the two that are written differently, and `error` says why transformers
    could not read the files, which leaves tokenizer.json.
    """

    path: Path
    kind: str | None = None
    cuts_left: bool = False
    differs: tuple[str, tuple[int, ...], tuple[int, ...]] | None = None
    parts: tuple[str, ...] = ()
    error: str | None = None


def read_files(directory: Path) -> ReadFiles:
    """Return what transformers makes of the tokenizer files in a directory.

    Raises:
        ModelError: they make no tokenizer of the `tokenizers` library.
    """
    whole = directory / TOKENIZER
    if whole.exists() and not any((directory / name).exists() for name in BESIDE):
        return ReadFiles(whole, cuts_left=_cuts_left(whole))
    made = cache.build_once("tokenizer", [_key(directory)], lambda to: _ask(directory, to))
    facts: dict[str, Any] = json.loads((made / _FACTS).read_text(encoding="utf-8"))
    if facts["refused"]:
        raise ModelError(
            f"encoder.model: no tokenizer can be read in {directory}: {facts['refused']}"
        )
    differs = facts["differs"]
    return ReadFiles(
        path=made / TOKENIZER if (made / TOKENIZER).exists() else whole,
        kind=facts["kind"],
        cuts_left=facts["cuts_left"],
        differs=differs and (differs[0], _tuple(differs[1]), tuple(differs[2])),
        parts=tuple(facts["parts"]),
        error=facts["error"],
    )


def _tuple(ids: list[int] | str) -> tuple[int, ...]:
    return () if isinstance(ids, str) else tuple(ids)


def note(directory: Path) -> str | None:
    """Return a line for people where a folder's tokenizer files disagree, None where they agree."""
    files = read_files(directory)
    if files.error is not None:
        return (
            f"encoder.model: {TOKENIZER} alone is read in {directory}, because transformers cannot"
            f" read the files beside it: {files.error}"
        )
    if files.differs is None:
        return None
    text, alone, ours = files.differs
    there = ", ".join(name for name in BESIDE if (directory / name).exists())
    return (
        f"encoder.model: the tokenizer files in {directory} disagree ({', '.join(files.parts)}):"
        f" {TOKENIZER} alone gives {_shown(alone)} for {text!r}, and with {there} transformers'"
        f" {files.kind} gives {_shown(ours)}; texts are tokenized as transformers does it"
    )


def _shown(ids: tuple[int, ...]) -> str:
    listed = ", ".join(map(str, ids[:_SHOWN]))
    return f"[{listed}{', ...' if len(ids) > _SHOWN else ''}]"


def _cuts_left(path: Path) -> bool:
    there = path.stat()

    def read() -> dict[str, bool]:
        try:
            truncation = json.loads(path.read_text(encoding="utf-8")).get("truncation")
        except (OSError, ValueError, AttributeError):
            return {"left": False}  # who reads the whole file says what is wrong with it
        return {"left": bool(truncation) and truncation.get("direction") == "Left"}

    key = ["cuts left", str(path), str(there.st_size), str(there.st_mtime_ns)]
    return bool(cache.cached_json(key, read)["left"])


@lru_cache(maxsize=8)
def _digest(files: tuple[tuple[str, int, int], ...]) -> str:
    """Return the SHA-256 of files by path; sizes and times are there to read what changed again."""
    total = hashlib.sha256()
    for path, _, _ in files:
        name, content = Path(path).name, hashlib.sha256(Path(path).read_bytes())
        total.update(f"{name} {content.hexdigest()}\n".encode())
    return total.hexdigest()


def _key(directory: Path) -> str:
    """Return a text that changes with the files, the libraries, and the hub's name of the model."""
    files = [
        path for path in sorted(directory.iterdir()) if path.suffix in _READ and path.is_file()
    ]
    read = [path for path in files if not path.name.endswith(".index.json")]
    stats = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in read)
    versions = [f"{name} {_version(name)}" for name in _LIBRARIES]
    return "\n".join(["tokenizer files 2", _digest(stats), *versions, _hub_name(directory) or ""])


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"


def _hub_name(directory: Path) -> str | None:
    """Return the name of a model in the hub's cache, by which transformers knows some models."""
    snapshots = directory.parent
    name = snapshots.parent.name.removeprefix("models--")
    if snapshots.name != "snapshots" or name == snapshots.parent.name:
        return None
    return name.replace("--", "/")


def _ask(directory: Path, to: Path) -> None:
    """Write what transformers makes of the files, in this process if it has transformers anyway."""
    if "transformers" in sys.modules or not sys.executable:
        _write(directory, to)
        return
    # From the empty folder: Python imports from the current one before all others.
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(directory.absolute()), str(to.absolute())],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        cwd=to,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.returncode}"]
        raise ModelError(
            f"encoder.model: the process that reads the tokenizer in {directory} failed: {last[0]}"
        )


def _write(directory: Path, to: Path) -> None:
    """Write the tokenizer that transformers makes, and the facts about it."""
    facts: dict[str, Any] = dict.fromkeys(("kind", "differs", "error", "refused"))
    facts |= {"cuts_left": False, "parts": []}
    whole = directory / TOKENIZER
    alone = _read(whole) if whole.exists() else None
    try:
        theirs = _from_transformers(directory)
    except MemoryError:
        raise  # of this moment, and not of the files
    except Exception as error:  # its classes raise whatever their files make them raise
        facts["error" if alone else "refused"] = str(error) or type(error).__name__
    else:
        kind = type(theirs).__name__
        facts |= {"kind": kind, "cuts_left": theirs.truncation_side == "left"}
        facts["refused"] = _trouble(theirs, kind)
        backend = getattr(theirs, "backend_tokenizer", None)
        if backend is not None:
            backend = bare(Tokenizer.from_str(backend.to_str()))
            backend.save(str(to / TOKENIZER))
        facts |= {} if facts["refused"] else _compared(alone, backend, theirs, kind=kind)
    (to / _FACTS).write_text(json.dumps(facts), encoding="utf-8")


def _trouble(theirs: Any, kind: str) -> str | None:
    """Return why a text cannot be tokenized, such as that a class takes words and their places.

    Some classes put a language's tokens around texts from their first call on.
    """
    try:
        theirs(_ANY_TEXT)
    except Exception as error:  # whatever a class raises
        return f"{kind} cannot tokenize {_ANY_TEXT!r}: {' '.join(str(error).split())}"
    return None


def _read(path: Path) -> Tokenizer | None:
    try:
        return bare(Tokenizer.from_file(str(path)))
    except Exception:  # the library raises bare Exception; who reads the file says so
        return None


def bare(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer without truncation and padding, which are ours to do."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _from_transformers(directory: Path) -> Any:
    from transformers import AutoConfig, AutoTokenizer

    from embedjob.models.quiet import quiet

    # Not refused, transformers asks on the terminal whether code of the folder may run.
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    with quiet():
        if (name := _hub_name(directory)) is not None:
            try:
                options["config"] = AutoConfig.from_pretrained(directory, **options)
                options["config"]._name_or_path = name
            except (OSError, ValueError):
                pass  # a model of its own code; AutoTokenizer reads the rest of its config
        return AutoTokenizer.from_pretrained(directory, **options)


def _compared(
    alone: Tokenizer | None, backend: Tokenizer | None, theirs: Any, *, kind: str
) -> dict[str, Any]:
    """Return where ids differ; a refusal where transformers' own are those of no such tokenizer."""
    if backend is None and alone is None:
        return {"refused": _no_fast_version(kind)}
    if alone is None:
        return {}
    example: dict[str, Any] = {}
    for text in _probes(alone, backend):
        then = _ids(alone, text)
        now = theirs(text)["input_ids"] if backend is None else _ids(backend, text)
        if then != now and backend is None:
            return {"refused": f"{_no_fast_version(kind)}; its {TOKENIZER} gives other ids"}
        if then != now and isinstance(now, str):
            return {"refused": f"{kind} cannot tokenize {text!r}: {now}"}
        if then != now and not example:
            example = {"differs": [text, then, now], "parts": _parts(alone, backend)}
    return example


def _ids(tokenizer: Tokenizer, text: str) -> list[int] | str:
    """Return a text's ids, or why it has none: an unknown word, of a model that knows no such."""
    try:
        return list(tokenizer.encode(text).ids)
    except Exception as error:  # the library raises bare Exception
        return str(error)


def _no_fast_version(kind: str) -> str:
    return (
        f"{kind} is written in Python, and only tokenizers that transformers loads from a"
        f" {TOKENIZER} are available in this version; use a model with another tokenizer"
    )


def _probes(*tokenizers: Tokenizer | None) -> Iterator[str]:
    """Yield the texts to compare tokenizers by, those with their added tokens last."""
    yield from PROBES
    added = [
        {(number, repr(entry)): entry.content for number, entry in decoder.items()}
        for decoder in (one.get_added_tokens_decoder() for one in tokenizers if one is not None)
    ]
    common = set.intersection(*map(set, added))
    contents = {content for one in added for key, content in one.items() if key not in common}
    shared = sorted({content for one in added for content in one.values()})[:_SOME_ADDED]
    for content in (*sorted(contents), *shared):
        yield f"a {content} b"
        yield f"a{content}b"


def _parts(alone: Tokenizer, backend: Tokenizer | None) -> list[str]:
    """Return the parts of two tokenizers that are not written alike."""
    assert backend is not None
    left, right = (json.loads(one.to_str()) for one in (alone, backend))
    return [name for part, name in _PARTS.items() if left.get(part) != right.get(part)]


if __name__ == "__main__":
    sys.modules.update(dict.fromkeys(_UNUSED))  # type: ignore[arg-type]  # None: not importable
    _write(Path(sys.argv[1]), Path(sys.argv[2]))
