"""Verification of what lies beside the embeddings: artefacts of fits, and generations."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from embedjob.config.heads import TokenIds
from embedjob.config.job_file import recipe_from
from embedjob.config.recipe import Recipe
from embedjob.errors import EmbedjobError, OutputError
from embedjob.job.text_fits import before_heads
from embedjob.models.tables.word_tables import is_vocabulary
from embedjob.output.claim import Claim
from embedjob.output.derived.generations import generation_problems
from embedjob.output.fingerprint import fingerprint
from embedjob.output.fits.artefacts import (
    ARTEFACTS_FOLDER,
    artefact_name,
    artefact_problems,
    read_artefact,
    read_head,
)
from embedjob.output.fits.records import Record, read_records
from embedjob.storage.objects import join, list_files, read_bytes
from embedjob.vectors.fits.continuation_ids import continuation_ids

_SAMPLED = "continuations"


class Derived(NamedTuple):
    """What is wrong beside the embeddings, and what is only worth a note."""

    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Sampled(NamedTuple):
    """The continuations of an artefact, and the fingerprint of the views before them."""

    encoder: str
    continuations: tuple[TokenIds, ...]


def derived_problems(out: str, claims: Sequence[Claim]) -> Derived:
    """Return problems of the artefacts that claims and records name, and of generations."""
    problems: list[str] = []
    try:
        # Vocabularies, counts and ranges are no steps, and centroids are for readers alone.
        records = [*read_records(out).values()]
    except OutputError as error:
        problems, records = [str(error)], []
    recorded = [{one.kind: one.artefact} for one in records]
    problems += artefact_problems(out, [*_named(claims), *recorded])
    names = {artefact_name(one.kind, one.artefact) for one in records}
    for claim in claims:
        model = str(claim.recipes["document"].get("model")).rpartition("/")[2]
        if is_vocabulary(model) and model.removesuffix(".safetensors") not in names:
            problems += _replaced_vocabulary(join(out, ARTEFACTS_FOLDER, model), claim)
    lost = [*_without_artefact(out, claims, records)]
    problems += [line for line, is_sampled in lost if is_sampled]
    problems += generation_problems(out)
    return Derived((*problems,), tuple(line for line, is_sampled in lost if not is_sampled))


def _named(claims: Sequence[Claim]) -> Iterator[Mapping[str, Any]]:
    """Yield the artefacts that the recipes of claims name, as finishing steps have them."""
    for claim in claims:
        document = claim.recipes["document"]
        yield from document.get("finish") or ()
        pooling = document.get("pooling")
        if isinstance(pooling, Mapping):
            yield from ({"word_counts": pooling[key]} for key in ("idf", "sif") if key in pooling)


def _replaced_vocabulary(url: str, claim: Claim) -> Iterator[str]:
    """Yield what is wrong with a vocabulary that a claim has, and that --refit has replaced."""
    try:
        sha256 = hashlib.sha256(read_bytes(url)).hexdigest()
    except FileNotFoundError:
        yield f"{url}: is missing, and queries of fingerprint {claim.fingerprint[:12]} need it"
        return
    if sha256 not in claim.digests.values():
        yield f"{url}: is not the file of fingerprint {claim.fingerprint[:12]} (another sha256)"


def _without_artefact(
    out: str, claims: Sequence[Claim], records: Sequence[Record]
) -> Iterator[tuple[str, bool]]:
    """Yield a line for each claim whose continuations no artefact has; whether a fit sampled them.

    A recipe holds its continuations itself, wherever they are from: they may have been written into
    the job. Those are a fit's of which fits here have sampled as many.
    """
    scored = [(claim, recipe) for claim in claims if (recipe := _scoring_ids(claim))]
    sampled = [one.artefact for one in records if one.kind == _SAMPLED]
    if not scored or any(artefact_problems(out, [{_SAMPLED: one}]) for one in sampled):
        return  # what is damaged is named by itself
    kept = [*_kept(out)]
    for claim, recipe in scored:
        own = Sampled(fingerprint(before_heads(recipe), claim.digests), _ids(recipe))
        if own in kept:
            continue
        alike = [one for one in kept if len(one.continuations) == len(own.continuations)]
        which = (
            f"the {len(own.continuations)} continuations of fingerprint {claim.fingerprint[:12]}"
        )
        if not alike:
            yield (
                f"{join(out, ARTEFACTS_FOLDER)}: no artefact has {which}: they were written into"
                " its job, or what a fit has left was deleted, and the next run samples anew",
                False,
            )
            continue
        same = any(one.encoder == own.encoder for one in alike)
        others = "others of the same views" if same else "those of another model or template"
        yield (
            f"{join(out, ARTEFACTS_FOLDER)}: is without {which}, and has {others}; was it copied or"
            " edited? Restore it from a copy of the output",
            True,
        )


def _scoring_ids(claim: Claim) -> Recipe | None:
    """Return the recipe of a claim if it scores token ids; None if not, or if it cannot be read."""
    try:
        recipe = recipe_from(claim.recipes["document"], {})
    except EmbedjobError:
        return None
    some = recipe.continuations
    in_ids = bool(some) and not any(isinstance(one, str) for one in some)
    return recipe if in_ids and recipe.dtype != "auto" else None


def _ids(recipe: Recipe) -> tuple[TokenIds, ...]:
    return tuple(tuple(one) for one in recipe.continuations if not isinstance(one, str))


def _kept(out: str) -> Iterator[Sampled]:
    """Yield the continuations of every whole artefact, also where --refit has replaced it."""
    for file in list_files(join(out, ARTEFACTS_FOLDER)):
        if not (file.name.startswith(f"{_SAMPLED}-") and file.name.endswith(".json")):
            continue
        sha256 = hashlib.sha256(read_bytes(file.url)).hexdigest()
        try:
            head = read_head(out, _SAMPLED, sha256)
            yield Sampled(head.encoder, continuation_ids(read_artefact(out, _SAMPLED, sha256)))
        except OutputError:
            continue
