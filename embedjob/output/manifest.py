"""Manifest: the file entries and shards of a snapshot, as Parquet parts beside its JSON head."""

import io
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, overload

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedjob.errors import OutputError
from embedjob.input.column_types import units_in
from embedjob.input.footers import Footer, Wanted
from embedjob.output.file_names import parsed
from embedjob.output.schema import decoded_schema, encoded_schema
from embedjob.storage.objects import create, join, read_bytes

COUNTS = (
    "rows",
    "embedded",
    "reused",
    "deduplicated",
    "quarantined",
    "nulls",
    "tokens",
    "truncated",
)
FILES = pa.schema(
    [
        ("path", pa.string()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("etag", pa.string()),
        ("shard", pa.string()),
        ("shard_etag", pa.string()),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("counts", pa.struct([(name, pa.int64()) for name in COUNTS])),
    ]
)
# The last four are what the shard's footer says: as long as its etag stays, nobody opens it again.
SHARDS = pa.schema(
    [
        ("url", pa.string()),
        ("etag", pa.string()),
        ("rows", pa.int64()),
        ("complete", pa.bool_()),
        ("group_rows", pa.list_(pa.int64())),
        ("group_text_bytes", pa.list_(pa.int64())),
        ("footer_bytes", pa.int64()),
        ("schema", pa.int32()),
    ]
)
# Columns that every row has a value in.
_NEEDED = frozenset({*FILES.names, "url", "complete"})
# A footer's schema and fine schema.
Layout = tuple[pa.Schema, pa.Schema | None]
PART_ROWS = 1_000_000
_BATCH_ROWS = 10_000
# Neighbours share most of a path, and their digests share nothing.
_ENCODINGS = {"path": "DELTA_BYTE_ARRAY", "etag": "DELTA_LENGTH_BYTE_ARRAY"}


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """An embedding file, relative to the output, and the rows of its shard that it holds.

    `rows` is Parquet's count: of lines, where a row of the shard has several.
    """

    path: str
    rows: int
    bytes: int
    etag: str
    shard: str
    shard_etag: str
    start: int
    stop: int
    counts: Mapping[str, int]

    @property
    def name(self) -> str:
        """Return the last part of the path."""
        return self.path.rsplit("/", 1)[-1]


class FileList(Sequence[SnapshotFile]):
    """File entries kept as columns: a million take some 300 MB, and as objects ten times that."""

    def __init__(self, table: pa.Table) -> None:
        """Keep a table of the schema FILES."""
        self.table = table

    @classmethod
    def of(cls, files: Iterable[SnapshotFile]) -> "FileList":
        """Build from entries."""
        tables = [FILES.empty_table()]
        entries = iter(files)
        while batch := [*islice(entries, _BATCH_ROWS)]:
            tables.append(as_table(batch, FILES))
        return cls(pa.concat_tables(tables).combine_chunks())

    def __len__(self) -> int:
        """Return the number of entries."""
        return int(self.table.num_rows)

    def __iter__(self) -> Iterator[SnapshotFile]:
        """Yield the entries, of which few are in memory at a time."""
        for batch in self.table.to_batches(max_chunksize=_BATCH_ROWS):
            yield from map(_entry, batch.to_pylist())

    @overload
    def __getitem__(self, place: int) -> SnapshotFile: ...
    @overload
    def __getitem__(self, place: slice) -> "FileList": ...
    def __getitem__(self, place: int | slice) -> "SnapshotFile | FileList":
        """Return an entry, or a list of some."""
        if isinstance(place, slice):
            start, stop, _ = place.indices(len(self))
            return FileList(self.table.slice(start, max(0, stop - start)))
        return _entry(self.table.slice(range(len(self))[place], 1).to_pylist()[0])

    def __eq__(self, other: object) -> bool:
        """Return whether the entries are equal, in the same order."""
        return isinstance(other, FileList) and self.table.equals(other.table)

    __hash__ = None  # type: ignore[assignment]

    @property
    def names(self) -> frozenset[str]:
        """Return the entries' file names, without their folders."""
        return frozenset(path.rsplit("/", 1)[-1] for path in self.table["path"].to_pylist())

    @property
    def counts(self) -> dict[str, int]:
        """Sum all entries' rows by what became of them, and their tokens."""
        return sums_of(self.table["counts"])

    def of_shards(self, urls: Collection[str]) -> "FileList":
        """Return the entries of these shards."""
        shards = self.table["shard"]
        # Only those that are here: the name of another may be no UTF-8, which Arrow refuses.
        wanted = pa.array([url for url in shards.unique().to_pylist() if url in urls], pa.string())
        return FileList(self.table.filter(pc.is_in(shards, value_set=wanted)))

    def with_bad_rows(self) -> "FileList":
        """Return the entries of chunks that have quarantined rows."""
        bad = self.table["counts"].combine_chunks().field("quarantined")
        return FileList(self.table.filter(pc.greater(pc.fill_null(bad, 0), 0)))


def as_table(files: Sequence[Any], schema: pa.Schema) -> pa.Table:
    """Return values that have the attributes that `schema`, some fields of FILES, names."""
    arrays = [
        _counts([file.counts for file in files])
        if field.name == "counts"
        else pa.array([getattr(file, field.name) for file in files], field.type)
        for field in schema
    ]
    return pa.table(arrays, schema=schema)


def _counts(counts: Sequence[Mapping[str, int]]) -> pa.StructArray:
    arrays = [pa.array([one.get(name) for one in counts], pa.int64()) for name in COUNTS]
    return pa.StructArray.from_arrays(arrays, fields=[*FILES.field("counts").type])


def sums_of(counts: pa.ChunkedArray) -> dict[str, int]:
    """Return the sum of each of the COUNTS in a column of them; none where no entry has it."""
    parts = dict(zip(COUNTS, counts.combine_chunks().flatten(), strict=True))
    sums = {name: pc.sum(part).as_py() for name, part in parts.items()}
    return {name: value for name, value in sums.items() if value is not None}


def put_parts(
    folder: str, files: FileList, shards: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Put the Parquet parts of a manifest in a folder; return their names, rows and bytes."""
    tables = [
        (f"files-{number:05d}", files.table.slice(start, PART_ROWS))
        for number, start in enumerate(range(0, max(1, len(files)), PART_ROWS))
    ]
    tables.append(("shards", pa.Table.from_pylist([*shards], schema=SHARDS)))
    parts = []
    for name, table in tables:
        data = _to_parquet(table)
        # A name that is taken holds this very part: an epoch has one publisher.
        create(join(folder, f"{name}.parquet"), data)
        parts.append({"name": f"{name}.parquet", "rows": table.num_rows, "bytes": len(data)})
    return parts


def read_parts(
    folder: str, parts: Sequence[Mapping[str, Any]]
) -> tuple[FileList, tuple[dict[str, Any], ...]]:
    """Read the parts that a head names; OutputError where one is missing or not as it says."""
    files: list[pa.Table] = []
    shards: list[pa.Table] = []
    for part in parts:
        # The last segment alone: a head that was edited reaches no other folder.
        url = join(folder, part["name"].rsplit("/", 1)[-1])
        try:
            table = pq.read_table(io.BytesIO(read_bytes(url)), page_checksum_verification=True)
        except FileNotFoundError as error:
            raise OutputError(f"{url}: is missing; its snapshot cannot be read") from error
        except (pa.ArrowException, OSError) as error:
            raise OutputError(f"{url}: is not a whole Parquet file ({error})") from error
        if table.num_rows != part["rows"]:
            raise OutputError(f"{url}: has {table.num_rows} rows, its snapshot says {part['rows']}")
        (shards if part["name"] == "shards.parquet" else files).append(table)
    listed = FileList(_cast(files, FILES, folder))
    rows = _cast(shards, SHARDS, folder).to_pylist()
    return listed, tuple({k: v for k, v in row.items() if v is not None} for row in rows)


@dataclass(frozen=True)
class Footers:
    """The distinct schemas of an input's shards, and the columns that its footers were read for.

    `fine_schemas` are those of `Footer.fine_schema`, in the same places; `exact` says whether int96
    was read as it is read now.
    """

    wanted: Wanted
    schemas: tuple[pa.Schema, ...]
    fine_schemas: tuple[pa.Schema | None, ...] = ()
    exact: bool = True

    @classmethod
    def of(cls, wanted: Wanted, layouts: Iterable[Layout]) -> "Footers":
        """Build from the layouts that `described` has gathered."""
        both = [*layouts]
        return cls(wanted, tuple(one for one, _ in both), tuple(fine for _, fine in both))

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "wanted": self.wanted._asdict(),
            "schemas": [*map(encoded_schema, self.schemas)],
            "fine_schemas": [
                None if fine is None else encoded_schema(fine) for fine in self.fine_schemas
            ],
            "exact": self.exact,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Footers":
        """Read what `as_dict` gave; ValueError where a schema cannot be decoded."""
        wanted = {name: tuple(columns) for name, columns in document["wanted"].items()}
        schemas = tuple(map(decoded_schema, document["schemas"]))
        # Without them, the values of int96 were not looked at.
        fine = document.get("fine_schemas")
        exact = bool(document.get("exact")) and fine is not None
        fine_schemas = tuple(
            None if coded is None else decoded_schema(coded) for coded in fine or ()
        )
        return cls(Wanted(**wanted), schemas, fine_schemas, exact)

    def layout(self, place: int) -> Layout:
        """Return the schemas in that place."""
        fine = self.fine_schemas[place] if place < len(self.fine_schemas) else None
        return self.schemas[place], fine


def described(footer: Footer | str | None, layouts: dict[Layout, int]) -> dict[str, Any]:
    """Return a shard's footer as columns of SHARDS; a layout that is new is added to `layouts`."""
    if not isinstance(footer, Footer):
        return {}
    return {
        "group_rows": [*footer.group_rows],
        "group_text_bytes": [*footer.group_text_bytes],
        "footer_bytes": footer.length,
        "schema": layouts.setdefault((footer.schema, footer.fine_schema), len(layouts)),
    }


def remembered(
    shards: Iterable[Mapping[str, Any]], footers: Footers | None, wanted: Wanted
) -> dict[tuple[str, str], Footer]:
    """Return by url and etag the footers of shards; none if other columns are wanted now."""
    if footers is None or footers.wanted != wanted:
        return {}
    usable = {place for place, schema in enumerate(footers.schemas) if _is_exact(footers, schema)}
    return {
        (shard["url"], shard["etag"]): Footer(
            tuple(shard["group_rows"]),
            tuple(shard["group_text_bytes"]),
            schema,
            shard["footer_bytes"],
            fine_schema,
        )
        for shard in shards
        if shard.get("schema") in usable and _has_groups(shard)
        for schema, fine_schema in [footers.layout(shard["schema"])]
    }


def _is_exact(footers: Footers, schema: pa.Schema) -> bool:
    """Tell whether a schema is what its shard's footer gives now.

    Earlier releases read int96 as nanoseconds, or as microseconds whatever it held.
    """
    return footers.exact or not any({"us", "ns"} & units_in(field.type) for field in schema)


def _has_groups(shard: Mapping[str, Any]) -> bool:
    """Tell whether each row group of a shard has its numbers; a list that was edited may not."""
    rows, text_bytes = shard.get("group_rows", ()), shard.get("group_text_bytes", ())
    numbers = (*rows, *text_bytes, shard.get("footer_bytes"))
    return len(rows) == len(text_bytes) and all(n is not None and n >= 0 for n in numbers)


def inside(path: str) -> str:
    """Return the path of an embedding file below an output.

    OutputError where it could lead elsewhere: opening an output reaches nothing outside it.
    """
    folder, _, name = path.rpartition("/")
    kind, _, fingerprint = folder.partition("/")
    if kind not in ("data", "quarantine") or "/" in fingerprint or parsed(name) is None:
        raise OutputError(f"{path}: is not a place of embeddings in an output; was it edited?")
    return path


def _entry(row: dict[str, Any]) -> SnapshotFile:
    counts = {name: count for name, count in row.pop("counts").items() if count is not None}
    return SnapshotFile(**row, counts=counts)


def _to_parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    delta = {name: kind for name, kind in _ENCODINGS.items() if name in table.column_names}
    plain = [name for name in table.column_names if name not in delta and name != "counts"]
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=plain,
        column_encoding=delta or None,
        write_page_checksum=True,
    )
    return sink.getvalue()


def _cast(tables: Sequence[pa.Table], schema: pa.Schema, folder: str) -> pa.Table:
    try:
        whole = pa.concat_tables([table.select(schema.names).cast(schema) for table in tables])
    except (KeyError, pa.ArrowException) as error:
        raise OutputError(f"{folder}: a part has other columns ({error})") from error
    needed = [name for name in schema.names if name in _NEEDED]
    if empty := [name for name in needed if whole[name].null_count]:
        raise OutputError(f"{folder}: a part has no value in some {empty[0]}; was it edited?")
    return whole
