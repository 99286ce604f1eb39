"""The output of a job: the schema of its files, the claim on it, and whether it is complete."""

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedjob.errors import OutputError, amount
from embedjob.input.chunks import Chunk
from embedjob.job.options import Options, Say
from embedjob.job.planning import JobPlan, relisted
from embedjob.job.resolve import IdentifiedJob, ResolvedJob
from embedjob.job.reusable import check_reuse_from
from embedjob.models.source import transformer_directory
from embedjob.models.tables.static_tables import may_be_static
from embedjob.models.tokenizer_files import note
from embedjob.output.calibration import ENOUGH_VECTORS, Calibration, sampled_chunks
from embedjob.output.chunk_file import file_bytes
from embedjob.output.claim import Claim, Probes, check_claims, read_claims
from embedjob.output.cleanup import damaged, quarantined
from embedjob.output.file_names import data_folder
from embedjob.output.fits.artefacts import read_artefact
from embedjob.output.head_columns import with_head_columns
from embedjob.output.manifest import FILES
from embedjob.output.schema import OutputSpec, output_spec_of, schema_text, types_from, types_text
from embedjob.output.snapshot import Snapshot
from embedjob.storage.objects import Stored
from embedjob.vectors.quantizing import CALIBRATED

_LIBRARIES = ("embedjob", "ray", "torch", "transformers", "tokenizers", "pyarrow")
# As Python's objects, the entries of a million files would take gigabytes.
_AT_ONCE = 10_000


def check_output(plan: JobPlan, options: Options) -> Snapshot | None:
    """Return the newest snapshot where this job may write to its output.

    Raises:
        OutputError: it belongs to another recipe or input, a trial would replace a corpus, or an
            output in `reuse_from` has no vectors of this recipe.
    """
    job, run = plan.job, plan.job.config.run
    # Another run may have made the artefacts since; its claim is looked at under the lease.
    claims = plan.claims if plan.unfitted else read_claims(job.out)
    check_claims(
        claims,
        fingerprint=job.fingerprint,
        chunk_rows=job.config.output.chunk_rows,
        recipes=_recipes(job),
        digests=job.digests,
        new_fingerprint=options.new_fingerprint,
    )
    replaces = options.refit and any(fit.is_step for fit in plan.fits)
    if replaces and claims and not options.new_fingerprint:
        raise OutputError(
            "--refit: this output holds vectors of the artefacts that it would replace; pass"
            " --new-fingerprint as well to write beside them and switch readers at the end"
        )
    if plan.left and not plan.unfitted:
        check_reuse_from(job)
    _check_ranges(plan, claims)
    _check_columns(plan, claims)
    newest = plan.served
    _check_input(job, claims, newest, options)
    if newest is None:
        return None
    if newest.fingerprint != job.fingerprint and not options.new_fingerprint:
        # It was claimed once, beside another recipe; readers have since been switched away.
        raise OutputError(
            f"output.path: serves fingerprint {newest.fingerprint[:12]} now (snapshot"
            f" {newest.epoch}), this job has {job.fingerprint[:12]}; --new-fingerprint would"
            " switch readers to this job's vectors"
        )
    if run.limit is not None and newest.limit is None:
        raise OutputError(
            f"run.limit is for trials, and output.path serves a whole corpus (snapshot"
            f" {newest.epoch}), which {run.limit} rows would replace; use another output.path"
        )
    return newest


def is_published(plan: JobPlan, newest: Snapshot) -> bool:
    """Return whether the newest snapshot already is what this run would publish."""
    if plan.left or plan.faults or newest.faults or newest.left:
        return False
    job = plan.job
    same = newest.fingerprint == job.fingerprint and newest.limit == job.config.run.limit
    # Outputs of earlier releases have no input on record: the next publish adds it.
    same = same and newest.input in (job.input_paths, None)
    same = same and newest.input_version == plan.listing.version
    empty = {(shard["url"], shard["etag"]) for shard in newest.shards if not shard["rows"]}
    same = same and empty == {(shard.url, shard.etag) for shard in plan.empty}
    same = same and _lists(newest, plan)
    return same and newest.quarantined_share <= job.config.run.max_quarantined


def entries(chunks: Sequence[Chunk], files: Mapping[str, Stored], fingerprint: str) -> pa.Table:
    """Return the columns of FILES that need no footer, of the chunks' committed files by name."""
    folder, parts = data_folder(fingerprint), []
    for start in range(0, max(1, len(chunks)), _AT_ONCE):
        batch = chunks[start : start + _AT_ONCE]
        stored = [files[chunk.name] for chunk in batch]
        columns = {
            "path": [f"{folder}/{file.name}" for file in stored],
            "bytes": [file.size for file in stored],
            "etag": [file.etag for file in stored],
            "shard": [chunk.shard.url for chunk in batch],
            "shard_etag": [chunk.shard.etag for chunk in batch],
            "start": [chunk.start for chunk in batch],
            "stop": [chunk.stop for chunk in batch],
        }
        schema = pa.schema([FILES.field(name) for name in columns])
        parts.append(pa.table(columns, schema=schema))
    return pa.concat_tables(parts)


def _lists(newest: Snapshot, plan: JobPlan) -> bool:
    """Tell whether a snapshot's files are those of the plan's chunks, under the same etags."""
    listed = newest.files.table
    if len(listed) != len(plan.chunks):
        return False
    planned = entries(plan.chunks, plan.files, plan.job.fingerprint)
    place = pc.index_in(planned["path"], value_set=listed["path"])
    return not place.null_count and bool(planned["etag"].equals(listed["etag"].take(place)))


def _check_ranges(plan: JobPlan, claims: Sequence[Claim]) -> None:
    """Raise OutputError where a fit has other ranges than the output was begun with."""
    if not any(fit.section.kind == "calibrate" for fit in plan.fits):
        return
    ranges = calibration_of(plan)
    for claim in claims:
        stands = claim.calibration if claim.fingerprint == plan.job.fingerprint else None
        if stands and (ranges is None or not np.array_equal(stands.array, ranges.array)):
            raise OutputError(
                "fit: calibrate: this output was begun with other ranges, which hold for all its"
                " files; leave the fit out, or set another output.path"
            )


def calibration_of(plan: JobPlan) -> Calibration | None:
    """Return the ranges that a fit of the job has made; None where none has."""
    for fit in plan.fits:
        if fit.section.kind == "calibrate" and fit.made is not None:
            fitted = read_artefact(plan.job.out, fit.made.kind, fit.made.sha256)
            ranges = fitted.tensors["ranges"].astype(np.float32)
            return Calibration.of(ranges, vectors=fitted.rows)
    return None


def _check_columns(plan: JobPlan, claims: Sequence[Claim]) -> None:
    """Raise OutputError where this run's files could not be written, or not beside those there."""
    for claim in claims:
        if claim.fingerprint == plan.job.fingerprint:
            _check_claimed(plan, claim)
    for chunk in plan.left[:1]:  # all have the same columns
        spec = output_spec(plan)
        for schema in (spec.stored, spec.quarantine):
            try:
                file_bytes(schema.empty_table(), chunk.shard, spec=spec, counts={})
            except (pa.ArrowException, ValueError, TypeError) as error:
                kinds = ", ".join(f"{name}: {kind}" for name, kind in plan.types.items())
                raise OutputError(
                    f"input.keep: the output cannot hold these columns ({kinds}): {error}"
                ) from error


def _check_claimed(plan: JobPlan, claim: Claim) -> None:
    """Raise OutputError where the claim of this recipe has other columns than this run."""
    wanted = plan.job.config.output.vector_list
    is_variable = claim.schema.get("embedding", "").startswith("list<")
    stands = "variable" if is_variable else "fixed"
    if stands != wanted:
        raise OutputError(
            f"output.vector_list: got {wanted}, but this output was started with {stands}, and all"
            f" its files have the same columns. Set vector_list: {stands}, or another output.path"
        )
    claimed = types_from(claim.columns) if claim.columns else {}
    if any(plan.types[name] != claimed.get(name, plan.types[name]) for name in plan.types):
        raise OutputError(
            "output.path: another run claimed it meanwhile, with other types of kept"
            " columns; run again"
        )


def _check_input(
    job: IdentifiedJob, claims: Sequence[Claim], newest: Snapshot | None, options: Options
) -> None:
    """Raise OutputError where the output serves, or was begun with, the corpus of another input."""
    begun = claims[0].input if claims else None
    served = begun if newest is None else newest.input
    if served is None or served == job.input_paths or options.new_input:
        return
    raise OutputError(
        f"input.path: got {', '.join(job.input_paths)}, but this output holds the corpus of"
        f" {', '.join(served)}, which this run would replace for its readers; use another"
        " output.path, or pass --new-input if that is meant"
    )


def planned_under_lease(plan: JobPlan, options: Options, *, epoch: int, say: Say) -> JobPlan:
    """Plan again, for the run that holds the lease of `epoch`, and check the output again.

    Another run, or a prune, may have ended while this one waited for the lease.
    """
    plan = relisted(plan, epoch=epoch, redo=chunks_to_redo(plan, options, say))
    check_output(plan, options)
    return plan


def chunks_to_redo(plan: JobPlan, options: Options, say: Say) -> frozenset[str]:
    """Return the names of this plan's committed chunks that the options send back."""
    job = plan.job
    redo: frozenset[str] = frozenset()
    for option, asked, find in (
        ("repair", options.repair, damaged),
        ("retry-quarantined", options.retry_quarantined, quarantined),
    ):
        if asked:
            names = find(job.out, job.fingerprint) & {chunk.name for chunk in plan.chunks}
            say(f"{option}: to be made again: {amount(len(names), 'chunk')}")
            redo |= names
    return redo


def output_spec(plan: JobPlan) -> OutputSpec:
    """Return what all files of this run have in common."""
    job = plan.job
    dense = output_spec_of(
        job.config.input,
        job.config.encoder,
        types=plan.types,
        width=job.width,
        fingerprint=job.fingerprint,
        output=job.config.output,
    )
    return with_head_columns(dense, vocabulary=job.heads.vocabulary, routers=job.heads.routers)


def claim_of(plan: JobPlan) -> Claim:
    """Return the claim that a first run puts, still without its probes: they need the model."""
    job = plan.job
    return Claim(
        chunk_rows=job.config.output.chunk_rows,
        fingerprint=job.fingerprint,
        recipes=_recipes(job),
        digests=job.digests,
        schema=schema_text(output_spec(plan).stored),
        columns=types_text(plan.types),
        probes=Probes((), (), ()),
        calibration=calibration_of(plan),
        input=job.input_paths,
        versions={name: importlib.metadata.version(name) for name in _libraries(job)},
    )


def _libraries(job: IdentifiedJob) -> tuple[str, ...]:
    """Return the packages that decide vectors, whose versions a claim keeps."""
    split = job.config.encoder.long_text == "split"
    return (*_LIBRARIES, "sentencex") if split else _LIBRARIES


def calibration_sample(plan: JobPlan) -> tuple[Chunk, ...] | None:
    """Return the chunks that int8 and uint8 take their ranges from; None for other dtypes.

    None also where a fit of the job makes the ranges. They are a sample of the whole corpus also in
    a trial.
    """
    dtype = plan.job.config.encoder.vector_dtype
    fitted = any(fit.section.kind == "calibrate" for fit in plan.fits)
    return sampled_chunks(plan.corpus) if dtype in CALIBRATED and not fitted else None


def tokenizer_notes(job: ResolvedJob) -> Iterator[str]:
    """Yield a warning where the tokenizer files of the model's folder disagree."""
    if may_be_static(job.folder):
        return
    if disagreement := note(transformer_directory(job.folder)):
        yield disagreement


def calibration_notes(job: IdentifiedJob) -> Iterator[str]:
    """Yield a warning where the ranges of this output come from few vectors."""
    dtype = job.config.encoder.vector_dtype
    # Outputs of other dtypes have no ranges.
    for claim in read_claims(job.out) if dtype in CALIBRATED else ():
        made = claim.calibration
        if claim.fingerprint == job.fingerprint and made and made.vectors < ENOUGH_VECTORS:
            yield (
                f"encoder.vector_dtype: the ranges of {dtype} come from {made.vectors} vectors,"
                " and hold for all that is written here; buckets are stable from some"
                f" {ENOUGH_VECTORS} on. For a larger corpus begin a new output"
            )


def _recipes(job: IdentifiedJob) -> dict[str, Mapping[str, Any]]:
    return {
        role: recipe.model_dump(mode="json", exclude_none=True)
        for role, recipe in job.recipes.items()
    }
