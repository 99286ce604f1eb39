"""Generations: what a generator made of a chunk's texts, one file each, put once and read again.

The files belong to the generator and to the texts, and not to the vectors: a run that goes on, a
later run and another method with the same generator read them.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from embedjob.errors import ChunkError
from embedjob.input.chunks import Chunk
from embedjob.output.file_names import chunk_name
from embedjob.output.fingerprint import version
from embedjob.storage.objects import create, join, read_bytes, stat
from embedjob.text.conversations import Variant, text_hash

SCHEMA = pa.schema(
    [
        pa.field("text_hash", pa.binary(16), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("index", pa.uint32(), nullable=False),
        # Null where the generator failed or said nothing: the text itself stands for it.
        pa.field("text", pa.large_string()),
        pa.field("tokens", pa.uint32(), nullable=False),
    ]
)
FINGERPRINT = b"embedjob.generator"
Made = Mapping[bytes, Sequence[Variant]]


@dataclass(frozen=True)
class GenerationFiles:
    """Where a run's generations lie: the output, the generator and what decides a chunk's texts."""

    out: str
    fingerprint: str
    projection: str

    def url(self, chunk: Chunk) -> str:
        """Return the place of a chunk's generations: the name is the memory of what was made."""
        shard = chunk.shard
        mine = version(shard.etag, self.fingerprint, self.projection)
        name = chunk_name(shard.url, mine, chunk.start, chunk.stop)
        return join(self.out, "generations", self.fingerprint[:12], name)

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

    def put(
        self, chunk: Chunk, texts: Sequence[str], made: Sequence[Sequence[Variant]]
    ) -> list[Sequence[Variant]]:
        """Put what was made of a chunk's texts; return what stands, ours or what was there."""
        table = _table(texts, made).replace_schema_metadata({FINGERPRINT: self.fingerprint})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        if create(self.url(chunk), memoryview(sink.getvalue())):
            return list(made)
        standing = self.read(chunk, texts)
        if standing is None:
            raise ChunkError(f"{self.url(chunk)}: was deleted as soon as it was found; run again")
        return standing


def _table(texts: Sequence[str], made: Sequence[Sequence[Variant]]) -> pa.Table:
    rows = [
        (text_hash(text), one.kind, one.number, one.text, one.tokens)
        for text, variants in zip(texts, made, strict=True)
        for one in variants
    ]
    columns = list(zip(*rows, strict=True)) or [()] * len(SCHEMA)
    arrays = [
        pa.array(list(column), field.type) for column, field in zip(columns, SCHEMA, strict=True)
    ]
    return pa.table(arrays, schema=SCHEMA)


def _made(content: bytes, url: str) -> Made:
    try:
        source = pa.BufferReader(content)
        table = pq.read_table(source, page_checksum_verification=True).cast(SCHEMA)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise ChunkError(f"{url}: cannot be read ({error}); delete it, and run again") from error
    made: dict[bytes, list[Variant]] = defaultdict(list)
    for of, *variant in zip(*(column.to_pylist() for column in table.columns), strict=True):
        made[of].append(Variant(*variant))
    return made


def _of(texts: Sequence[str], made: Made, url: str) -> list[Sequence[Variant]]:
    hashes = [text_hash(text) for text in texts]
    # Nothing is asked about a blank text.
    asked = [one for one, text in zip(hashes, texts, strict=True) if text.strip()]
    if lacking := sum(one not in made for one in asked):
        raise ChunkError(
            f"{url}: has no generations for {lacking} of the chunk's {len(texts)} texts; was it"
            " copied from another output? Delete it, and run again"
        )
    return [made.get(one, ()) for one in hashes]
