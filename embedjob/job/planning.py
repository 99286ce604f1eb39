"""Planning: the chunks of a job and those still to be done, from listings alone; writes nothing."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from itertools import chain

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedjob.config.job import Input, SampledInput
from embedjob.config.job_file import JobSource
from embedjob.errors import RefusedError
from embedjob.input.chunks import Chunk, RowRange, Shard, ranges
from embedjob.input.columns import Standing, agree
from embedjob.input.footers import Footer
from embedjob.input.json_lines import line_ranges
from embedjob.input.listing import check_apart
from embedjob.input.samples import SamplePlace, has_chunk
from embedjob.job.fit_plan import check_planned_fits, settled
from embedjob.job.generation_plan import PlannedGeneration, planned_generation
from embedjob.job.input_listing import InputListing, list_input
from embedjob.job.planned_fits import PlannedFit
from embedjob.job.resolve import IdentifiedJob, identify, input_of, resolve, run_of
from embedjob.models.source import asked_once
from embedjob.output import fingerprint as hashes
from embedjob.output.claim import Claim, read_claims
from embedjob.output.file_names import chunk_name, data_directory, parse_name, parsed
from embedjob.output.fits.records import vectors_place
from embedjob.output.schema import types_from
from embedjob.output.snapshot import Snapshot, newest_snapshot, published, read_snapshot
from embedjob.storage.objects import Stored, absolute, list_files

_NONE: npt.NDArray[np.int64] = np.empty(0, np.int64)


@dataclass(frozen=True)
class InputChunks:
    """An input cut into chunks: `faults` are shards with the reason why they give none.

    `empty` are shards without rows, `types` the column types that the shards agree on; `projection`
    is the canonical text of what decides a file's rows.
    """

    chunks: tuple[Chunk, ...]
    faults: tuple[tuple[str, str], ...]
    empty: tuple[Shard, ...]
    types: Mapping[str, pa.DataType]
    projection: str = ""


@dataclass(frozen=True)
class JobPlan:
    """A job's chunks, those left to be done, and the shards that give none.

    `corpus` is every chunk that there would be without `run.limit`. `served` is the newest
    snapshot as the plan saw it, `files` the committed file of each chunk that has one. `named` is
    the job as it names its `fits`; as long as one of them has made no artefact, the fingerprint of
    `job` is no output's. `refit` is whether they are to be made again, damaged ones too. `claims`
    are those on the output before the artefacts were looked for. `generated_in` are outputs whose
    generations of the same texts the run takes over: those of its fits. `generation` is what is
    left to be generated, None where nothing is. `rows_reusable` are rows whose vectors a run would
    take over; None where they were not counted.
    """

    job: IdentifiedJob
    listing: InputListing
    chunks: tuple[Chunk, ...]
    left: tuple[Chunk, ...]
    faults: tuple[tuple[str, str], ...]
    empty: tuple[Shard, ...]
    types: Mapping[str, pa.DataType]
    corpus: tuple[Chunk, ...]
    projection: str
    served: Snapshot | None = None
    files: Mapping[str, Stored] = field(default_factory=dict)
    named: IdentifiedJob | None = None
    claims: tuple[Claim, ...] = ()
    fits: tuple[PlannedFit, ...] = ()
    refit: bool = False
    generated_in: tuple[str, ...] = ()
    generation: PlannedGeneration | None = None
    rows_reusable: int | None = None

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards of the input as they were listed."""
        return self.listing.shards

    @property
    def footers(self) -> Mapping[str, Footer | str]:
        """Of each shard by URL its footer, or why it has none."""
        return self.listing.footers

    @property
    def unread(self) -> tuple[str, ...]:
        """The files beside the shards that are not read."""
        return self.listing.unread

    @property
    def unfitted(self) -> tuple[str, ...]:
        """Names of the fits that have made no artefact yet: a run makes them first."""
        return tuple(fit.name for fit in self.fits if fit.made is None)

    @property
    def places(self) -> tuple[SamplePlace, ...]:
        """The rows of the corpus, by chunk."""
        return tuple(SamplePlace(one.shard.url, one.start, one.stop) for one in self.corpus)

    @property
    def done(self) -> tuple[str, ...]:
        """Names of the chunks that are committed already."""
        left = {chunk.name for chunk in self.left}
        return tuple(chunk.name for chunk in self.chunks if chunk.name not in left)

    @property
    def until(self) -> datetime | None:
        """The moment by which the run is to be done; None without a deadline."""
        until = self.job.config.run.until
        return None if until is None else datetime.fromisoformat(until)

    @property
    def rows(self) -> int:
        """Rows that all chunks read together."""
        return sum(chunk.rows for chunk in self.chunks)


def plan_job(source: JobSource, *, refit: bool = False) -> JobPlan:
    """Resolve a job, list its input and output and plan what is left; nothing is written.

    The cheapest comes first: config, input, model, output. A model may have to be fetched, and an
    input that is missing is known before. With `refit` an artefact of a fit that is damaged counts
    as one that is not made yet.

    Raises:
        InputError: there is no input, or none of it has what the job asks for.
        ConfigError, ModelError: see `run_of`, `resolve` and `identify`.
        FitError, OutputError: a fit has too few rows, or its artefact is damaged.
        AccessError: the input or the output cannot be listed.
    """
    job_input = input_of(source)
    run, served = run_of(source, datetime.now().astimezone()), _served(source)
    listing = list_input(job_input, served)
    with asked_once():
        resolved = resolve(source)
        config = resolved.config.model_copy(update={"run": run})
        identified = identify(replace(resolved, config=config))
    check_apart(listing.place or job_input.path, identified.out, listing.shards)
    return plan_settled(identified, listing, served=served, refit=refit)


def plan_settled(
    named: IdentifiedJob,
    listing: InputListing,
    *,
    served: Snapshot | None = None,
    refit: bool = False,
) -> JobPlan:
    """Plan an identified job with the artefacts that its fits have made by now.

    `served` is the newest snapshot of its output, read here if None; `refit` as in `plan_job`.
    """
    # Before the artefacts: of a run that goes on meanwhile, the claim comes after these.
    claims, served = read_claims(named.out), served or newest_snapshot(named.out)
    job, fits = settled(named, refit=refit)
    standing = standing_types(claims, served, job.fingerprint)
    made = plan(job, listing, listed=_listed(job), served=served, standing=standing)
    check_planned_fits(fits, made.places, job)
    samples = tuple(vectors_place(job.out, fit.vectors) for fit in fits if fit.vectors)
    return replace(made, named=named, claims=claims, fits=fits, refit=refit, generated_in=samples)


def plan(
    job: IdentifiedJob,
    listing: InputListing,
    *,
    listed: Sequence[Stored],
    served: Snapshot | None = None,
    standing: Standing | None = None,
) -> JobPlan:
    """Plan a job; `listed` are the files under its fingerprint, `served` the newest snapshot.

    The files that are `standing` keep their columns' types.

    InputError when shards can be read and not one of them has what the job asks for; when none
    can be read, there are only faults, and the caller decides.
    """
    config = job.config
    cut = cut_input(
        config.input,
        listing,
        chunk_rows=config.output.chunk_rows,
        fingerprint=job.fingerprint,
        standing=standing,
    )
    chunks = cut.chunks
    if config.run.limit is not None:
        chunks = tuple(first_chunks(chunks, config.run.limit))
    files = committed_files(listed, served, chunks)
    left = tuple(chunk for chunk in chunks if chunk.name not in files)
    return JobPlan(
        job=job,
        listing=listing,
        chunks=chunks,
        left=left,
        faults=cut.faults,
        empty=cut.empty,
        types=cut.types,
        corpus=cut.chunks,
        projection=cut.projection,
        served=served,
        files=files,
        generation=planned_generation(job, left),
    )


def relisted(plan: JobPlan, *, epoch: int, redo: Collection[str] = ()) -> JobPlan:
    """Plan again from what the output holds now, for the run that holds the lease of `epoch`.

    What was made before gets a new file name, and so do the chunks named in `redo`: a name never
    holds two contents, and what readers see stays until the next snapshot replaces it.
    """
    listed = _listed(plan.job)
    served = plan.served
    if (last := published(plan.job.out)[-1:]) and (served is None or served.epoch != last[0]):
        served = read_snapshot(plan.job.out, last[0])
    files = committed_files(listed, served, plan.chunks)
    wanted = {
        chunk.name: chunk for chunk in plan.chunks if chunk.name not in files or chunk.name in redo
    }
    made = chain((file.name for file in listed), served.names if served and wanted else ())
    taken = {name for file in made if (name := _chunk_of(file)) in wanted} | {*redo}
    pruned = served is not None and served.pruned is not None
    left = tuple(
        replace(chunk, generation=epoch if pruned or name in taken else 0)
        for name, chunk in wanted.items()
    )
    generation = planned_generation(plan.job, left)
    return replace(plan, left=left, served=served, files=files, generation=generation)


def committed_files(
    listed: Iterable[Stored], served: Snapshot | None, chunks: Iterable[Chunk]
) -> dict[str, Stored]:
    """Return by name the chunks that are committed, each with its file that counts: the last made.

    After a prune, files that were made before it count only if the newest snapshot names them: a
    prune that was suspended may still delete the others.
    """
    line = -1 if served is None or served.pruned is None else served.pruned
    named = frozenset() if served is None or line < 0 else served.names
    # The plan's own strings: a million further ones would take 0.2 GiB.
    planned = {chunk.name: chunk.name for chunk in chunks}
    last: dict[str, Stored] = {}
    for file in listed:
        name = parsed(file.name)
        if name is None or not (name.generation > line or file.name in named):
            continue
        if (chunk := planned.get(name.chunk)) is None:
            continue
        other = last.get(chunk)
        if other is None or name.generation >= parse_name(other.name).generation:
            last[chunk] = file
    return last


def cut_input(
    job_input: Input,
    listing: InputListing,
    *,
    chunk_rows: int,
    fingerprint: str,
    standing: Standing | None = None,
) -> InputChunks:
    """Cut every shard that can be read into chunks, named by content, recipe and columns.

    InputError when shards can be read and not one of them has what the job asks for.
    """
    readable: dict[str, Footer] = {}
    faults: dict[str, str] = {}
    for shard in listing.shards:
        footer = listing.footers[shard.url]
        if isinstance(footer, Footer):
            readable[shard.url] = footer
        else:
            faults[shard.url] = footer
    if not readable:
        return InputChunks((), tuple(sorted(faults.items())), (), {})
    own = [shard for shard in listing.shards if shard.url in readable]
    empty = tuple(shard for shard in own if not readable[shard.url].rows)
    full = [shard for shard in own if readable[shard.url].rows]
    agreement = agree(full or empty, readable, job_input, standing)
    faults |= agreement.faults
    projection = hashes.projection(
        job_input, {name: str(kind) for name, kind in agreement.types.items()}
    )
    chunks: list[Chunk] = []
    for shard in full:
        if shard.url not in faults:
            deleted = listing.deleted.get(shard.url, _NONE)
            version = partial(_version, shard.etag, fingerprint, projection)
            made = _chunks(shard, readable[shard.url], version, chunk_rows, deleted)
            chunks += (chunk for chunk in made if _is_read(chunk, job_input))
    return InputChunks(
        tuple(chunks), tuple(sorted(faults.items())), empty, agreement.types, projection
    )


def standing_types(claims: Sequence[Claim], served: Snapshot | None, fingerprint: str) -> Standing:
    """Return the types of the columns that an output's files of this fingerprint carry.

    Those of the claim are exact; of columns that a later job added, and in outputs of earlier
    releases, the types' names alone are on record.
    """
    claim = next((one for one in claims if one.fingerprint == fingerprint), None)
    names = dict(claim.schema) if claim else {}
    if served is not None and served.fingerprint == fingerprint:
        names |= hashes.projected_types(served.projection or "")
    types = types_from(claim.columns) if claim and claim.columns else {}
    return Standing(types, names)


def first_chunks(chunks: Sequence[Chunk], rows: int) -> Iterator[Chunk]:
    """Yield the first chunks that read `rows` rows together; the last one is cut, and named so."""
    for chunk in chunks:
        if rows <= 0:
            return
        yield chunk if chunk.rows <= rows else _cut(chunk, rows)
        rows -= chunk.rows


def _served(source: JobSource) -> Snapshot | None:
    """Return the newest snapshot where it can be read; why it cannot is said in its turn."""
    with suppress(RefusedError, OSError):
        return newest_snapshot(absolute(source.get("output.path") or ""))
    return None


def _listed(job: IdentifiedJob) -> list[Stored]:
    return list_files(data_directory(job.out, job.fingerprint))


def _chunk_of(name: str) -> str | None:
    fields = parsed(name)
    return fields.chunk if fields else None


def _cut(chunk: Chunk, rows: int) -> Chunk:
    stop = chunk.start + rows
    name = chunk_name(chunk.shard.url, parse_name(chunk.name).version, chunk.start, stop)
    return replace(chunk, stop=stop, name=name, text_bytes=chunk.text_bytes * rows // chunk.rows)


def _version(etag: str, fingerprint: str, projection: str, deleted: bytes) -> str:
    """Return the version of a chunk: without the rows that its table has deleted, it is another."""
    content = f"{etag} without {hashlib.sha256(deleted).hexdigest()}" if deleted else etag
    return hashes.version(content, fingerprint, projection)


def _chunks(
    shard: Shard,
    footer: Footer,
    version: Callable[[bytes], str],
    chunk_rows: int,
    deleted: npt.NDArray[np.int64],
) -> Iterator[Chunk]:
    parts = ranges(footer.group_rows, footer.group_text_bytes, chunk_rows=chunk_rows)
    for part, lines in zip(parts, line_ranges(shard, footer, parts), strict=True):
        first, last = np.searchsorted(deleted, (part.start, part.stop))
        gone = deleted[first:last].astype(np.uint32).tobytes()
        yield Chunk(
            shard=shard,
            start=part.start,
            stop=part.stop,
            groups=(part.first_group, part.stop_group),
            first_row=part.first_row,
            name=chunk_name(shard.url, version(gone), part.start, part.stop),
            text_bytes=_text_bytes(footer, part),
            footer_bytes=footer.length,
            lines=lines,
            deleted=gone,
        )


def _is_read(chunk: Chunk, job_input: Input) -> bool:
    if not isinstance(job_input, SampledInput):
        return True
    return has_chunk(job_input.sample, chunk.shard.url, chunk.start)


def _text_bytes(footer: Footer, part: RowRange) -> int:
    groups = slice(part.first_group, part.stop_group)
    rows = sum(footer.group_rows[groups])
    return sum(footer.group_text_bytes[groups]) * (part.stop - part.start) // rows
