"""What is to be done, and what is left of it: a pure function of two listings and the footers."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from embedjob.config.job import Input
from embedjob.input.chunks import Chunk, RowRange, Shard, ranges
from embedjob.input.columns import agree
from embedjob.input.listing import Footer
from embedjob.output import fingerprint as hashes
from embedjob.output.file_names import chunk_name, parse


@dataclass(frozen=True)
class Request:
    """What the job asks of the plan."""

    input: Input
    fingerprint: str
    chunk_rows: int
    limit: int | None = None


@dataclass(frozen=True)
class Plan:
    """Every chunk, those still to be done, and the shards that give none.

    `corpus` is every chunk that there would be without a limit.
    """

    chunks: tuple[Chunk, ...]
    left: tuple[Chunk, ...]
    faults: tuple[tuple[str, str], ...]
    empty: tuple[Shard, ...]
    types: Mapping[str, pa.DataType]
    corpus: tuple[Chunk, ...] = ()

    @property
    def done(self) -> tuple[str, ...]:
        """Names of the chunks that were found committed."""
        left = {chunk.name for chunk in self.left}
        return tuple(chunk.name for chunk in self.chunks if chunk.name not in left)

    @property
    def rows(self) -> int:
        """Rows that all chunks read together."""
        return sum(chunk.rows for chunk in self.chunks)


def plan(
    shards: Sequence[Shard],
    footers: Mapping[str, Footer | str],
    *,
    listed: Collection[str],
    request: Request,
) -> Plan:
    """The plan; `listed` are the names (or urls) of the files under this fingerprint.

    InputError when shards can be read and not one of them has what the job asks for; when none
    can be read, there are only faults, and the caller decides.
    """
    readable: dict[str, Footer] = {}
    faults: dict[str, str] = {}
    for shard in shards:
        footer = footers[shard.url]
        if isinstance(footer, Footer):
            readable[shard.url] = footer
        else:
            faults[shard.url] = footer
    if not readable:
        return Plan((), (), tuple(sorted(faults.items())), (), {})
    empty = tuple(s for s in shards if s.url in readable and not readable[s.url].rows)
    full = [shard for shard in shards if shard.url in readable and readable[shard.url].rows]
    agreement = agree(full or empty, readable, request.input)
    faults |= agreement.faults
    projection = hashes.projection(
        request.input, {name: str(kind) for name, kind in agreement.types.items()}
    )
    chunks: list[Chunk] = []
    for shard in full:
        if shard.url not in faults:
            version = hashes.version(shard.etag, request.fingerprint, projection)
            chunks += _chunks(shard, readable[shard.url], version, request.chunk_rows)
    corpus = tuple(chunks)
    kept = corpus if request.limit is None else tuple(limited(corpus, request.limit))
    names = {name.rsplit("/", 1)[-1] for name in listed}
    left = tuple(chunk for chunk in kept if chunk.name not in names)
    return Plan(kept, left, tuple(sorted(faults.items())), empty, agreement.types, corpus)


def largest_first(chunks: Sequence[Chunk]) -> tuple[Chunk, ...]:
    """The chunks in the order to be embedded: a large one that came last would be waited for."""
    return tuple(sorted(chunks, key=lambda chunk: -chunk.text_bytes))


def limited(chunks: Sequence[Chunk], rows: int) -> Iterator[Chunk]:
    """The first chunks that read `rows` rows together; the last one is cut, and named so."""
    for chunk in chunks:
        if rows <= 0:
            return
        yield chunk if chunk.rows <= rows else _cut(chunk, rows)
        rows -= chunk.rows


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
