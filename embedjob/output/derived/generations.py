"""Generations: what a generator made of a chunk's texts, one file each, put once and read again.

The files belong to the generator and to the texts, and not to the vectors: a run that goes on, a
later run and another method with the same generator read them.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedjob.config.job_file import recipe_from
from embedjob.errors import ChunkError, ConfigError
from embedjob.input.chunks import Chunk
from embedjob.output.claim import Claim
from embedjob.output.file_names import chunk_name, digest, is_left_by_others
from embedjob.output.fingerprint import generation_fingerprint, version
from embedjob.storage.objects import create, join, list_files, read_bytes, stat
from embedjob.text.conversations import SUMMARY, Variant, text_hash

GENERATIONS_SCHEMA = pa.schema(
    [
        pa.field("text_hash", pa.binary(16), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("index", pa.uint32(), nullable=False),
        # Null where the generator failed or said nothing: the text itself stands for it.
        pa.field("text", pa.large_string()),
        pa.field("tokens", pa.uint32(), nullable=False),
    ]
)
GENERATOR_KEY = b"embedjob.generator"
GENERATIONS_FOLDER = "generations"
_ADVICE = "delete it: the next run that needs it makes it again"
VariantsByHash = Mapping[bytes, Sequence[Variant]]


@dataclass(frozen=True)
class GenerationFiles:
    """Where a run's generations lie: the output, the generator and what decides a chunk's texts.

    `others` are files in other outputs, by their name, which is that of a chunk's own: a fit that
    embeds a sample has had made something of some of the chunk's texts, or a run of all of them.
    """

    out: str
    fingerprint: str
    projection: str
    others: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def name(self, chunk: Chunk) -> str:
        """Return the name of a chunk's file: the memory of what was made."""
        mine = version(chunk.shard.etag, self.fingerprint, self.projection)
        return chunk_name(chunk.shard.url, mine, chunk.start, chunk.stop)

    def url(self, chunk: Chunk) -> str:
        """Return the place of a chunk's generations."""
        return join(self.folder(self.out), self.name(chunk))

    def folder(self, out: str) -> str:
        """Return where an output has what this generator made."""
        return join(out, GENERATIONS_FOLDER, self.fingerprint[:12])

    def of_some(self, chunk: Chunk, texts: Sequence[str]) -> "GenerationFiles":
        """Return where the generations of some of a chunk's texts lie: the others need none."""
        hashes = b"".join(map(text_hash, texts)).hex()
        some = replace(self, projection=f"{self.projection} {digest(hashes)}")
        return replace(some, others={some.name(chunk): self.others.get(self.name(chunk), ())})

    def is_put(self, chunk: Chunk) -> bool:
        """Return whether the generations of a chunk are there."""
        return stat(self.url(chunk)) is not None

    def read(self, chunk: Chunk, texts: Sequence[str]) -> list[Sequence[Variant]] | None:
        """Return what was made of a chunk's texts, None where nothing was put yet.

        ChunkError where the file holds something else.
        """
        url = self.url(chunk)
        try:
            content = read_bytes(url)
        except FileNotFoundError:
            return None
        return _of(texts, _made(content, url), url)

    def known(self, chunk: Chunk) -> dict[bytes, Sequence[Variant]]:
        """Return what the other outputs have of a chunk's texts, by their hashes.

        A file that was pruned meanwhile, or cannot be read, counts for nothing.
        """
        known: dict[bytes, Sequence[Variant]] = {}
        for url in self.others.get(self.name(chunk), ()):
            with suppress(FileNotFoundError, ChunkError):
                known.update(_made(read_bytes(url), url))
        return known

    def put(
        self, chunk: Chunk, texts: Sequence[str], made: Sequence[Sequence[Variant]]
    ) -> list[Sequence[Variant]]:
        """Put what was made of a chunk's texts; return what stands, ours or what was there."""
        hashes = map(text_hash, texts)
        if self.put_by_hash(chunk, dict(zip(hashes, made, strict=True))):
            return list(made)
        standing = self.read(chunk, texts)
        if standing is None:
            raise ChunkError(f"{self.url(chunk)}: was deleted as soon as it was found; run again")
        return standing

    def put_by_hash(self, chunk: Chunk, made: VariantsByHash) -> bool:
        """Put what was made of a chunk's texts, by their hashes; False where a file was there."""
        table = _table(made).replace_schema_metadata({GENERATOR_KEY: self.fingerprint})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        return create(self.url(chunk), memoryview(sink.getvalue()))


def _table(made: VariantsByHash) -> pa.Table:
    rows = [
        (of, one.kind, one.number, one.text, one.tokens)
        for of, variants in made.items()
        for one in variants
    ]
    columns = list(zip(*rows, strict=True)) or [()] * len(GENERATIONS_SCHEMA)
    arrays = [
        pa.array(list(column), field.type)
        for column, field in zip(columns, GENERATIONS_SCHEMA, strict=True)
    ]
    return pa.table(arrays, schema=GENERATIONS_SCHEMA)


def used_generators(claims: Iterable[Claim], kept: Collection[str]) -> frozenset[str] | None:
    """Return the folders of the generators that the recipes of kept fingerprints have.

    None where they cannot all be known: a claim was deleted, or is that of a later release.
    """
    by_fingerprint = {claim.fingerprint: claim for claim in claims}
    used = set()
    for fingerprint in kept:
        claim = by_fingerprint.get(fingerprint)
        if claim is None:
            return None
        for values in claim.recipes.values():
            try:
                made = recipe_from(values, {}).generate
            except ConfigError:
                return None
            if made is not None:
                used.add(generation_fingerprint(made, claim.digests)[:12])
    return frozenset(used)


def generation_problems(out: str) -> Iterator[str]:
    """Yield what is wrong with the generations that an output holds, file by file."""
    root = join(out, GENERATIONS_FOLDER)
    for file in list_files(root):
        place = file.url.removeprefix(f"{root}/")
        if not is_left_by_others(place):
            try:
                content = read_bytes(file.url)
                problem = _problem(_read_table(content, file.url), place.split("/")[0])
            except (ChunkError, OSError) as error:
                yield str(error)
                continue
            if problem:
                yield f"{file.url}: {problem}; {_ADVICE}"


def _problem(table: pa.Table, folder: str) -> str | None:
    """Return why a table is not the generations of a chunk by a folder's generator."""
    made_by = ((table.schema.metadata or {}).get(GENERATOR_KEY) or b"").decode(errors="replace")
    if made_by[:12] != folder:
        named = f"the generator {made_by[:12]}" if made_by else "no generator"
        return f"its footer names {named}, and its folder names {folder}"
    answers = table.select(["text_hash", "kind", "index"])
    if len(answers.group_by(answers.column_names).aggregate([])) != len(answers):
        return "it has an answer twice"
    # Of a summary there may be none: where there is no answer, nothing is summed up.
    first = answers.filter(pc.invert(pc.ends_with(answers["kind"], SUMMARY)))
    each = first.group_by("text_hash").aggregate([([], "count_all")])["count_all"]
    if len(pc.unique(each)) > 1:
        return f"its texts have {pc.min(each)} to {pc.max(each)} answers, and not all as many"
    return None


def _read_table(content: bytes, url: str) -> pa.Table:
    try:
        source = pa.BufferReader(content)
        table = pq.read_table(source, page_checksum_verification=True)
        return table.cast(GENERATIONS_SCHEMA.with_metadata(table.schema.metadata))
    except (pa.ArrowException, ValueError, OSError) as error:
        raise ChunkError(f"{url}: cannot be read ({error}); delete it, and run again") from error


def _made(content: bytes, url: str) -> VariantsByHash:
    table = _read_table(content, url)
    made: dict[bytes, list[Variant]] = defaultdict(list)
    for of, *variant in zip(*(column.to_pylist() for column in table.columns), strict=True):
        made[of].append(Variant(*variant))
    return made


def _of(texts: Sequence[str], made: VariantsByHash, url: str) -> list[Sequence[Variant]]:
    hashes = [text_hash(text) for text in texts]
    # Nothing is asked about a blank text.
    asked = [one for one, text in zip(hashes, texts, strict=True) if text.strip()]
    if lacking := sum(one not in made for one in asked):
        raise ChunkError(
            f"{url}: has no generations for {lacking} of the chunk's {len(texts)} texts; was it"
            " copied from another output? Delete it, and run again"
        )
    return [made.get(one, ()) for one in hashes]
