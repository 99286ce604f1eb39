"""Claim: the recipes that may write to an output, and the vectors that they must reproduce."""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from embedjob.errors import OutputError
from embedjob.output.calibration import Calibration
from embedjob.output.changes import ComparedSide, reasons
from embedjob.output.documents import EVERY, NONE, Kind, read_document, require_kinds
from embedjob.output.file_names import is_left_by_others
from embedjob.output.fingerprint import NOT_HASHED
from embedjob.output.schema import FORMAT_VERSION, types_from, types_text
from embedjob.storage.objects import absolute, create_json, join, list_files

# The least cosine between a probe's vectors, by the precision in which the model runs.
COSINES: Mapping[str, float] = {"float32": 0.9999, "bfloat16": 0.999, "float16": 0.999}


_NUMBERS = [[float]]
_KINDS: Kind = {
    "chunk_rows": int,
    "fingerprint": re.compile("[0-9a-f]{64}"),
    "recipes": {EVERY: {"finish": [{EVERY: object}], EVERY: object}},
    "digests": {EVERY: str},
    "schema": {EVERY: str},
    "probes": {"texts": [str], "ids": [[int]], "vectors": _NUMBERS},
    "versions": {EVERY: str},
    "calibration": (NONE, {"ranges": _NUMBERS, "vectors": int}),
    "input": (NONE, [str]),
    "columns": (NONE, str),
    "token": str,
}


@dataclass(frozen=True)
class Probes:
    """Texts, their token ids and their vectors, as the claiming run computed them."""

    texts: Sequence[str]
    ids: Sequence[Sequence[int]]
    vectors: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Claim:
    """One recipe's right to write here; `recipes` are resolved, by role.

    `input` are the paths of the corpus as the first job had them, `columns` the exact types of the
    columns that it carried; None in earlier releases.
    """

    chunk_rows: int
    fingerprint: str
    recipes: Mapping[str, Mapping[str, Any]]
    digests: Mapping[str, str]
    schema: Mapping[str, str]
    probes: Probes
    versions: Mapping[str, str]
    calibration: Calibration | None = None
    input: tuple[str, ...] | None = None
    columns: str | None = None
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    format_version: int = FORMAT_VERSION


def read_claims(out: str) -> tuple[Claim, ...]:
    """Read the first claim on the output, then the claims that `--new-fingerprint` added."""
    first = _read(_first(out))
    if first is None:
        return ()
    folder = join(absolute(out), "claims")
    urls = [file.url for file in list_files(folder)]
    later = [_read(url) for url in urls if not is_left_by_others(url.removeprefix(f"{folder}/"))]
    return (first, *(claim for claim in later if claim is not None))


def check_claims(
    claims: Sequence[Claim],
    *,
    fingerprint: str,
    chunk_rows: int,
    recipes: Mapping[str, Mapping[str, Any]],
    digests: Mapping[str, str],
    new_fingerprint: bool = False,
) -> Claim | None:
    """Return the claim under which this job may write, None if it is yet to be put.

    OutputError where the output belongs to another recipe or has other chunk_rows.
    """
    if not claims:
        return None
    first = claims[0]
    if first.chunk_rows != chunk_rows:
        raise OutputError(
            f"output.chunk_rows: got {chunk_rows}, but this output was started with"
            f" {first.chunk_rows}; files are named by their rows, so every chunk would be embedded"
            f" and stored again. Set chunk_rows: {first.chunk_rows}, or another output.path"
        )
    for claim in claims:
        if claim.fingerprint == fingerprint:
            return claim
    if new_fingerprint:
        return None
    raise OutputError(
        f"output.path: holds embeddings of another recipe (fingerprint {first.fingerprint[:12]};"
        f" this job has {fingerprint[:12]}):\n{_side_by_side(first, recipes, digests)}\n"
        f"{changed_since(first, recipes, digests)}"
        "Set another output.path, or pass --new-fingerprint to write beside the old files and"
        " switch readers at the end"
    )


def put_claim(out: str, claim: Claim, *, new_fingerprint: bool = False) -> Claim:
    """Put a claim; return the claim that stands, ours or that of an earlier run of the same recipe.

    The first claim is never rewritten; a further fingerprint is a further file beside it.
    """
    checked = partial(
        check_claims,
        fingerprint=claim.fingerprint,
        chunk_rows=claim.chunk_rows,
        recipes=claim.recipes,
        digests=claim.digests,
        new_fingerprint=new_fingerprint,
    )
    standing = checked(read_claims(out))
    if standing is None:
        # Another run may have put its claim since then.
        standing = checked([_put(_first(out), claim)])
    return standing or _put(_later(out, claim.fingerprint), claim)


def check_probes(
    claim: Claim,
    *,
    ids: Sequence[Sequence[int]],
    vectors: Sequence[Sequence[float]],
    dtype: str,
) -> None:
    """Raise OutputError unless this run reproduces the token ids and vectors of the claim."""
    for text, before, now in zip(claim.probes.texts, claim.probes.ids, ids, strict=True):
        if list(before) != list(now):
            raise OutputError(
                f"output.path: the tokenizer gives {list(now)} for {text!r}, but gave"
                f" {list(before)} when this output was started. {_started_with(claim)}"
            )
    for text, then, got in zip(claim.probes.texts, claim.probes.vectors, vectors, strict=True):
        cosine = _cosine(then, got)
        if not cosine >= COSINES[dtype]:
            raise OutputError(
                "output.path: the model gives other vectors than when this output was started:"
                f" got a cosine of {cosine:.6f} for {text!r}, allowed is at least"
                f" {COSINES[dtype]} in {dtype}. {_started_with(claim)}"
            )


def changed_since(
    claim: Claim, recipes: Mapping[str, Mapping[str, Any]], digests: Mapping[str, str]
) -> str:
    """Return a line for each change between releases that makes recipes differ from a claim's."""
    then, now = ComparedSide(claim.recipes, claim.digests), ComparedSide(recipes, digests)
    return "".join(
        f"Changed in a release since then (see CHANGELOG.md): {reason}.\n"
        for reason in reasons(then, now)
    )


def _cosine(left: Sequence[float], right: Sequence[float]) -> float:
    a, b = np.asarray(left, np.float64), np.asarray(right, np.float64)
    if a.shape != b.shape:
        return 0.0
    if not (a.any() and b.any()):
        return float(a.any() == b.any())
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _started_with(claim: Claim) -> str:
    then = ", ".join(f"{name} {version}" for name, version in sorted(claim.versions.items()))
    versions = then or "unknown versions"
    return f"It was started with {versions}; install these, or set another output.path"


def _side_by_side(
    claim: Claim, recipes: Mapping[str, Mapping[str, Any]], digests: Mapping[str, str]
) -> str:
    """List only what differs, one knob to a line; a difference in every role is listed once."""
    pairs = [(claim.recipes.get(role, {}), recipe) for role, recipe in recipes.items()]
    pairs.append(
        (
            {f"sha256 of {name}": value for name, value in claim.digests.items()},
            {f"sha256 of {name}": value for name, value in digests.items()},
        )
    )
    lines: dict[str, None] = {}
    for then, now in pairs:
        for knob in sorted({*then, *now} - NOT_HASHED):
            before, after = (json.dumps(side.get(knob), default=str) for side in (then, now))
            if before != after:
                lines[f"  {knob}: the output has {before}, this job has {after}"] = None
    return "\n".join(lines)


def _first(out: str) -> str:
    return join(out, "_embedjob.json")


def _later(out: str, fingerprint: str) -> str:
    return join(out, "claims", f"{fingerprint[:12]}.json")


def _put(url: str, claim: Claim) -> Claim:
    """Put the claim; return the claim that stands under this name."""
    return _claim(create_json(url, asdict(claim)), url)


def _read(url: str) -> Claim | None:
    try:
        document = read_document(url)
    except FileNotFoundError:
        return None
    return _claim(document, url)


def _claim(document: dict[str, Any], url: str) -> Claim:
    require_kinds(document, {EVERY: object}, url=url, what="a claim")
    if document.get("format_version") != FORMAT_VERSION:
        raise OutputError(
            f"{url}: got format version {document.get('format_version')}, this release reads"
            f" {FORMAT_VERSION}; use the release that wrote it, or set another output.path"
        )
    require_kinds(document, _KINDS, url=url, what="a claim")
    try:
        calibration = document.get("calibration")
        nested = {
            "probes": Probes(**document["probes"]),
            "calibration": calibration and Calibration(**calibration),
            "input": tuple(paths) if (paths := document.get("input")) else None,
        }
        document["recipes"]["document"]  # what all readers ask for
        types_from(document.get("columns") or types_text({}))
        return Claim(**{**document, **nested})
    except (TypeError, KeyError, ValueError) as error:
        raise OutputError(f"{url}: is not a claim of embedjob ({error})") from error
