"""Artefacts: what fits left in an output, in files that are named by their content.

An artefact is a JSON head and its tensors as safetensors. The sha256 of the head names both, since
the head holds that of the tensors: it stands in the recipe, and so in the fingerprint.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.numpy
from safetensors import SafetensorError

from embedjob.config.pooling import FitStep, WordWeights
from embedjob.config.recipe import Recipe
from embedjob.errors import OutputError
from embedjob.output.documents import EVERY, Kind, read_document, require_kinds
from embedjob.output.fingerprint import canonical
from embedjob.storage.objects import create, join, read_bytes, stat
from embedjob.vectors.fits.fit_arithmetic import ARITHMETIC, problem_of, width_after
from embedjob.vectors.fits.fitted import Fitted

FORMAT = 1
_SHA = re.compile("[0-9a-f]{64}")
_HEAD: Kind = {
    "format_version": int,
    "kind": str,
    "encoder": _SHA,
    "parameters": {EVERY: object},
    "rows": int,
    "width": int,
    "width_after": int,
    "facts": {EVERY: object},
    "tensors": {"sha256": _SHA, "bytes": int},
}
ARTEFACTS_FOLDER = "artefacts"
_ADVICE = "restore it from a copy of the output, or delete it and run with --refit to make it again"


@dataclass(frozen=True)
class ArtefactHead:
    """The JSON head of an artefact.

    `encoder` is the fingerprint of the vectors that it was computed from, `width` their width and
    `width_after` that of a vector to which it was applied; `parameters` are those of the fit.
    """

    sha256: str
    kind: str
    encoder: str
    parameters: Mapping[str, Any]
    rows: int
    width: int
    width_after: int
    facts: Mapping[str, Any]
    tensors: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Return the name of the files, without their suffix."""
        return artefact_name(self.kind, self.sha256)


def artefact_name(kind: str, sha256: str) -> str:
    """Return `<kind>-<sha12>`."""
    return f"{kind}-{sha256[:12]}"


def put_artefact(
    out: str, fitted: Fitted, *, encoder: str, parameters: Mapping[str, Any]
) -> ArtefactHead:
    """Put what a fit left, tensors first, and return its head; equal content is put once.

    OutputError where other content has its name.
    """
    tensors = safetensors.numpy.save(
        {name: fitted.tensors[name] for name in sorted(fitted.tensors)}
    )
    document = {
        "format_version": FORMAT,
        "kind": fitted.kind,
        "encoder": encoder,
        "parameters": dict(parameters),
        "rows": fitted.rows,
        "width": fitted.width,
        "width_after": width_after(fitted),
        "facts": dict(fitted.facts),
        "tensors": {"sha256": hashlib.sha256(tensors).hexdigest(), "bytes": len(tensors)},
    }
    text = canonical(document).encode()
    head = _head(document, hashlib.sha256(text).hexdigest())
    _put(_url(out, head.name, "safetensors"), tensors)
    _put(_url(out, head.name, "json"), text)
    return head


def tensors_url(out: str, head: ArtefactHead) -> str:
    """Return the URL of an artefact's tensors."""
    return _url(out, head.name, "safetensors")


def copy_artefacts(source: str, target: str, recipes: Iterable[Recipe]) -> None:
    """Put the artefacts that recipes name, and one output has, into another output."""
    for kind, sha256 in _named(recipes):
        read_artefact(source, kind, sha256)  # what is damaged goes no further
        name = artefact_name(kind, sha256)
        for suffix in ("safetensors", "json"):
            _put(_url(target, name, suffix), read_bytes(_url(source, name, suffix)))


def read_head(out: str, kind: str, sha256: str) -> ArtefactHead:
    """Read the head of an artefact; OutputError where it, or its tensors, are not there whole."""
    if not _SHA.fullmatch(sha256):
        raise OutputError(f"{out}: {kind}: {sha256[:80]} is no sha256 of an artefact; {_ADVICE}")
    name = artefact_name(kind, sha256)
    url = _url(out, name, "json")
    try:
        text = read_bytes(url)
    except FileNotFoundError as error:
        raise OutputError(f"{url}: is missing; {_ADVICE}") from error
    if hashlib.sha256(text).hexdigest() != sha256:
        raise OutputError(f"{url}: is not the file that was put there (another sha256); {_ADVICE}")
    head = _head(read_document(url), sha256, url=url)
    if head.kind != kind:
        raise OutputError(f"{url}: is a {head.kind}, and not a {kind}; {_ADVICE}")
    tensors = _url(out, name, "safetensors")
    here = stat(tensors)
    if here is None or here.size != head.tensors["bytes"]:
        state = "is missing" if here is None else "is another file (another size)"
        raise OutputError(f"{tensors}: {state}; {_ADVICE}")
    return head


def read_artefact(out: str, kind: str, sha256: str) -> Fitted:
    """Read what a fit left; OutputError where a byte of it is another."""
    head = read_head(out, kind, sha256)
    url = _url(out, head.name, "safetensors")
    data = read_bytes(url)
    if hashlib.sha256(data).hexdigest() != head.tensors["sha256"]:
        raise OutputError(f"{url}: is not the file that was put there (another sha256); {_ADVICE}")
    try:
        tensors = safetensors.numpy.load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise OutputError(f"{url}: is not a whole safetensors file ({error}); {_ADVICE}") from error
    fitted = Fitted(head.kind, head.rows, head.width, tensors, head.facts)
    if problem := problem_of(fitted):
        raise OutputError(f"{url}: is not a {kind} of this release: {problem}; {_ADVICE}")
    return fitted


def read_fitted(out: str, recipes: Iterable[Recipe]) -> dict[str, Fitted]:
    """Read all artefacts that recipes name, by their sha256."""
    return {sha256: read_artefact(out, kind, sha256) for kind, sha256 in _named(recipes)}


def artefact_problems(out: str, steps: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return what is wrong with the artefacts that finishing steps of recorded recipes name."""
    problems: dict[str, None] = {}
    named = {(kind, str(name)) for step in steps for kind, name in step.items()}
    for kind, sha256 in sorted(named):
        if kind in ARITHMETIC:
            try:
                read_artefact(out, kind, sha256)
            except OutputError as error:
                problems[str(error)] = None
    return [*problems]


def _named(recipes: Iterable[Recipe]) -> list[tuple[str, str]]:
    named: dict[tuple[str, str], None] = {}
    for recipe in recipes:
        if isinstance(recipe.pooling, WordWeights):
            named["word_counts", recipe.pooling.name] = None
        for step in recipe.finish:
            if isinstance(step, FitStep):
                named[step.kind, step.name] = None
    return [*named]


def _put(url: str, data: bytes) -> None:
    if not create(url, data) and read_bytes(url) != data:
        raise OutputError(f"{url}: has other content than its name says; {_ADVICE}")


def _url(out: str, name: str, suffix: str) -> str:
    return join(out, ARTEFACTS_FOLDER, f"{name}.{suffix}")


def _head(document: dict[str, Any], sha256: str, *, url: str = "") -> ArtefactHead:
    require_kinds(document, {EVERY: object}, url=url, what="an artefact")
    if document.get("format_version") != FORMAT or document.get("kind") not in ARITHMETIC:
        raise OutputError(
            f"{url}: got format version {document.get('format_version')} and kind"
            f" {document.get('kind')}, this release reads {FORMAT} and {', '.join(ARITHMETIC)}; use"
            " the release that wrote it"
        )
    require_kinds(document, _HEAD, url=url, what="an artefact")
    try:
        fields = {key: document[key] for key in _HEAD if key != "format_version"}
    except KeyError as error:
        raise OutputError(f"{url}: is not an artefact of embedjob ({error} is missing)") from error
    return ArtefactHead(sha256=sha256, **fields)
