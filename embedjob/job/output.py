"""Whether a job may write to its output, and whether anything is left for it to do there."""

import importlib.metadata
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from embedjob.errors import OutputError
from embedjob.input.reading import read_chunk
from embedjob.job.survey import Survey
from embedjob.output.calibration import ENOUGH_VECTORS, sampled
from embedjob.output.claim import Claim, Probes, check, read_claims
from embedjob.output.head_columns import with_head_columns
from embedjob.output.schema import OutputSpec, output_spec_of, schema_text
from embedjob.output.snapshot import Snapshot
from embedjob.stages.calibrating import Calibrate
from embedjob.vectors.quantizing import CALIBRATED

_LIBRARIES = ("embedjob", "ray", "torch", "transformers", "tokenizers", "pyarrow")


def require_own(found: Survey, newest: Snapshot | None, *, new_fingerprint: bool) -> None:
    """OutputError where the output belongs to another recipe, or a trial would replace a corpus."""
    job = found.resolved.job
    recipes = _recipes(found)
    claims = read_claims(found.out)
    check(
        claims,
        fingerprint=found.fingerprint,
        chunk_rows=job.output.chunk_rows,
        recipes=recipes,
        digests=found.digests,
        new_fingerprint=new_fingerprint,
    )
    if newest is None:
        return
    if newest.fingerprint != found.fingerprint and not new_fingerprint:
        # It was claimed once, beside another recipe; readers have since been switched away.
        raise OutputError(
            f"output.path serves fingerprint {newest.fingerprint[:12]} now (snapshot"
            f" {newest.epoch}), this job has {found.fingerprint[:12]}; --new-fingerprint would"
            " switch readers to this job's vectors"
        )
    if job.run.limit is not None and newest.limit is None:
        raise OutputError(
            f"run.limit is for trials, and output.path serves a whole corpus (snapshot"
            f" {newest.epoch}), which {job.run.limit} rows would replace; use another output.path"
        )


def claim_of(found: Survey) -> Claim:
    """The claim that a first run puts, still without its probes: they need the model."""
    return Claim(
        chunk_rows=found.resolved.job.output.chunk_rows,
        fingerprint=found.fingerprint,
        recipes=_recipes(found),
        digests=found.digests,
        schema=schema_text(form(found).data),
        probes=Probes((), (), ()),
        versions=_versions(),
    )


def calibrate_of(found: Survey) -> Calibrate | None:
    """What finds the ranges of int8 and uint8, from all of the corpus also in a trial."""
    job = found.resolved.job
    if job.encoder.vector_dtype not in CALIBRATED:
        return None
    return Calibrate(sampled(found.plan.corpus), partial(read_chunk, job_input=job.input))


def calibration_notes(found: Survey) -> Iterator[str]:
    """What is to be known of the ranges by which this output is quantised."""
    dtype = found.resolved.job.encoder.vector_dtype
    # Of other dtypes there is nothing to be read for.
    for claim in read_claims(found.out) if dtype in CALIBRATED else ():
        made = claim.calibration
        if claim.fingerprint == found.fingerprint and made and made.vectors < ENOUGH_VECTORS:
            yield (
                f"encoder.vector_dtype: the ranges of {dtype} come from {made.vectors} vectors,"
                " and hold for all that is written here; buckets are stable from some"
                f" {ENOUGH_VECTORS} on. For a larger corpus begin a new output"
            )


def form(found: Survey) -> OutputSpec:
    """What all files of this run have in common."""
    job = found.resolved.job
    dense = output_spec_of(
        job.input,
        job.encoder,
        types=found.plan.types,
        width=found.width,
        fingerprint=found.fingerprint,
        compression=job.output.compression,
    )
    return with_head_columns(
        dense, vocabulary=found.beside.vocabulary, routers=found.beside.routers
    )


def is_published(found: Survey, newest: Snapshot) -> bool:
    """Whether the newest snapshot already is what this run would publish."""
    plan = found.plan
    if plan.left or plan.faults or newest.faults:
        return False
    names = {file.path.rsplit("/", 1)[-1] for file in newest.files}
    same = newest.fingerprint == found.fingerprint and newest.limit == found.resolved.job.run.limit
    empty = {(shard["url"], shard["etag"]) for shard in newest.shards if not shard["rows"]}
    same = same and empty == {(shard.url, shard.etag) for shard in plan.empty}
    same = same and names == {chunk.name for chunk in plan.chunks}
    return same and newest.quarantined_share <= found.resolved.job.run.max_quarantined


def _recipes(found: Survey) -> dict[str, Mapping[str, Any]]:
    return {
        role: recipe.model_dump(mode="json", exclude_none=True)
        for role, recipe in found.resolved.recipes.items()
    }


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}
