"""Planning: the chunks of a job and those still to be done, from listings alone; writes nothing."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from embedjob.config.job import Input
from embedjob.config.job_file import JobSource
from embedjob.errors import InputError
from embedjob.input.chunks import Chunk, RowRange, Shard, ranges
from embedjob.input.columns import agree, columns_of
from embedjob.input.footers import Footer
from embedjob.input.listing import find_shards, read_footers
from embedjob.job.resolve import IdentifiedJob, identify, input_of, resolve
from embedjob.models.source import asked_once
from embedjob.output import fingerprint as hashes
from embedjob.output.file_names import chunk_name, data_directory, parse
from embedjob.storage.objects import list_files


@dataclass(frozen=True)
class InputListing:
    """The shards of an input, and of each by URL its footer, or why it has none."""

    shards: tuple[Shard, ...]
    footers: Mapping[str, Footer | str]


@dataclass(frozen=True)
class InputChunks:
    """An input cut into chunks: `faults` are shards with the reason why they give none.

    `empty` are shards without rows, `types` the column types that the shards agree on.
    """

    chunks: tuple[Chunk, ...]
    faults: tuple[tuple[str, str], ...]
    empty: tuple[Shard, ...]
    types: Mapping[str, pa.DataType]


@dataclass(frozen=True)
class JobPlan:
    """A job's chunks, those left to be done, and the shards that give none.

    `corpus` is every chunk that there would be without `run.limit`; `redo` are the names of
    committed chunks that are to be deleted and made again.
    """

    job: IdentifiedJob
    shards: tuple[Shard, ...]
    chunks: tuple[Chunk, ...]
    left: tuple[Chunk, ...]
    faults: tuple[tuple[str, str], ...]
    empty: tuple[Shard, ...]
    types: Mapping[str, pa.DataType]
    corpus: tuple[Chunk, ...]
    redo: frozenset[str] = frozenset()

    @property
    def done(self) -> tuple[str, ...]:
        """Names of the chunks that are committed already."""
        left = {chunk.name for chunk in self.left}
        return tuple(chunk.name for chunk in self.chunks if chunk.name not in left)

    @property
    def rows(self) -> int:
        """Rows that all chunks read together."""
        return sum(chunk.rows for chunk in self.chunks)


def plan_job(source: JobSource) -> JobPlan:
    """Resolve a job, list its input and output and plan what is left; nothing is written.

    The cheapest comes first: config, input, model, output. A model may have to be fetched, and an
    input that is missing is known before.

    Raises:
        InputError: there is no input, or none of it has what the job asks for.
        ConfigError, ModelError: see `resolve` and `identify`.
        AccessError: the input or the output cannot be listed.
    """
    listing = list_input(input_of(source))
    with asked_once():
        identified = identify(resolve(source))
    return plan(identified, listing, listed=_committed(identified))


def list_input(job_input: Input) -> InputListing:
    """Find the shards and read their footers; InputError where not one shard can be read."""
    shards = find_shards(job_input.path)
    footers = read_footers([shard.stored for shard in shards], columns_of(job_input).wanted)
    problems = [footer for footer in footers.values() if isinstance(footer, str)]
    if problems and len(problems) == len(footers):
        raise InputError(f"input.path: {shards[0].url} is {problems[0]}; no shard can be read")
    return InputListing(tuple(shards), footers)


def plan(job: IdentifiedJob, listing: InputListing, *, listed: Collection[str]) -> JobPlan:
    """Plan a job; `listed` are the names (or URLs) of the files under its fingerprint.

    InputError when shards can be read and not one of them has what the job asks for; when none
    can be read, there are only faults, and the caller decides.
    """
    config = job.config
    cut = cut_input(
        config.input, listing, chunk_rows=config.output.chunk_rows, fingerprint=job.fingerprint
    )
    chunks = cut.chunks
    if config.run.limit is not None:
        chunks = tuple(limited(chunks, config.run.limit))
    return JobPlan(
        job=job,
        shards=listing.shards,
        chunks=chunks,
        left=_left(chunks, {name.rsplit("/", 1)[-1] for name in listed}),
        faults=cut.faults,
        empty=cut.empty,
        types=cut.types,
        corpus=cut.chunks,
    )


def relisted(plan: JobPlan, *, redo: frozenset[str] = frozenset()) -> JobPlan:
    """List the output once more: the chunks there are done, apart from those to be made again."""
    return replace(plan, left=_left(plan.chunks, _committed(plan.job) - redo), redo=redo)


def cut_input(
    job_input: Input, listing: InputListing, *, chunk_rows: int, fingerprint: str
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
    agreement = agree(full or empty, readable, job_input)
    faults |= agreement.faults
    projection = hashes.projection(
        job_input, {name: str(kind) for name, kind in agreement.types.items()}
    )
    chunks: list[Chunk] = []
    for shard in full:
        if shard.url not in faults:
            version = hashes.version(shard.etag, fingerprint, projection)
            chunks += _chunks(shard, readable[shard.url], version, chunk_rows)
    return InputChunks(tuple(chunks), tuple(sorted(faults.items())), empty, agreement.types)


def largest_first(chunks: Sequence[Chunk]) -> tuple[Chunk, ...]:
    """Return the chunks in the order to be embedded: a large one at the end would be waited for."""
    return tuple(sorted(chunks, key=lambda chunk: -chunk.text_bytes))


def limited(chunks: Sequence[Chunk], rows: int) -> Iterator[Chunk]:
    """Yield the first chunks that read `rows` rows together; the last one is cut, and named so."""
    for chunk in chunks:
        if rows <= 0:
            return
        yield chunk if chunk.rows <= rows else _cut(chunk, rows)
        rows -= chunk.rows


def _committed(job: IdentifiedJob) -> set[str]:
    return {file.name for file in list_files(data_directory(job.out, job.fingerprint))}


def _left(chunks: Sequence[Chunk], committed: Collection[str]) -> tuple[Chunk, ...]:
    return tuple(chunk for chunk in chunks if chunk.name not in committed)


def _cut(chunk: Chunk, rows: int) -> Chunk:
    stop = chunk.start + rows
    name = chunk_name(chunk.shard.url, parse(chunk.name).version, chunk.start, stop)
    return replace(chunk, stop=stop, name=name, text_bytes=chunk.text_bytes * rows // chunk.rows)


def _chunks(shard: Shard, footer: Footer, version: str, chunk_rows: int) -> Iterator[Chunk]:
    for part in ranges(footer.group_rows, chunk_rows=chunk_rows):
        yield Chunk(
            shard=shard,
            start=part.start,
            stop=part.stop,
            groups=(part.first_group, part.stop_group),
            first_row=part.first_row,
            name=chunk_name(shard.url, version, part.start, part.stop),
            text_bytes=_text_bytes(footer, part),
            footer_bytes=footer.length,
        )


def _text_bytes(footer: Footer, part: RowRange) -> int:
    groups = slice(part.first_group, part.stop_group)
    rows = sum(footer.group_rows[groups])
    return sum(footer.group_text_bytes[groups]) * (part.stop - part.start) // rows
