"""Tables as input: a table's own list of Parquet files at one version, as shards.

What the table says is right, whatever lies in its folder: files that it does not list are not read,
rows that it has deleted are left out, and columns have its names, types and values, which are not
always those of the files.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedjob.config.job import InputTable
from embedjob.errors import InputError
from embedjob.input.chunks import Shard, TableColumn, TableShard, printable
from embedjob.input.column_types import in_type, read_type
from embedjob.input.columns import Columns
from embedjob.input.footers import Footer, Wanted
from embedjob.input.tables.delta import open_delta
from embedjob.input.tables.iceberg import open_iceberg
from embedjob.input.tables.versions import TableVersion
from embedjob.storage.objects import Stored, absolute, list_files, stat

_FIELD_ID = b"PARQUET:field_id"
OPENERS: Mapping[str, Callable[[InputTable, Sequence[str]], TableVersion]] = {
    "delta": open_delta,
    "iceberg": open_iceberg,
}


@dataclass(frozen=True)
class TableListing:
    """The files of a table at one version, as shards.

    `place` is the table's folder, `deleted` the rows of each shard, by url, that the table has no
    more, and `wanted` the columns under all names that they have in files.
    """

    version: str
    place: str
    shards: tuple[Shard, ...]
    deleted: Mapping[str, npt.NDArray[np.int64]]
    schema: pa.Schema
    wanted: Wanted

    def footer(self, footer: Footer | str) -> Footer | str:
        """Return a file's footer with the columns that the table has."""
        if isinstance(footer, str):
            return footer
        return replace(footer, schema=self.schema, fine_schema=None)


def list_table(table: InputTable, columns: Columns) -> TableListing:
    """Return the files of a table, with the columns that a job needs.

    Raises:
        ConfigError: the library that reads such tables is not installed.
        InputError: there is no such table or version, or it has what cannot be read rightly.
    """
    found = OPENERS[table.format](table, columns.needed)
    if not found.files:
        raise InputError(f"input.table: {table.uri} has no file in version {found.version}")
    absent = [name for name in columns.needed if name not in found.schema.names]
    if absent:
        raise InputError(
            f"input.table: {table.uri} has no column {absent[0]!r} in version {found.version};"
            f" there are: {', '.join(found.schema.names)}"
        )
    stored = _stored(found)
    twice = [url for url, times in Counter(one.url for one in stored).items() if times > 1]
    if twice:
        raise InputError(
            f"input.table: {table.uri} lists {twice[0]} twice in version {found.version}, so that"
            " it is not known which of its rows it has; repair the table"
        )
    schema = pa.schema([found.schema.field(name) for name in columns.needed])
    shards = [
        Shard(
            url=printable(one.url),
            size=one.size,
            etag=one.etag,
            raw=None if printable(one.url) == one.url else one.url,
            modified=one.modified,
            table=TableShard(found.columns, tuple(file.constants.items())),
        )
        for file, one in zip(found.files, stored, strict=True)
    ]
    deleted = {
        shard.url: file.deleted
        for shard, file in zip(shards, found.files, strict=True)
        if len(file.deleted)
    }
    return TableListing(
        found.version,
        found.place,
        tuple(sorted(shards, key=lambda shard: shard.url)),
        deleted,
        schema,
        _wanted(columns, found.columns),
    )


def _stored(found: TableVersion) -> list[Stored]:
    """Return the table's files as they lie there now.

    A file that is gone has an etag that no file has, and so is a fault of its shard.
    """
    listed = {file.url: file for file in list_files(found.place, links=True)}
    urls = [absolute(file.url) for file in found.files]
    with ThreadPoolExecutor(32) as pool:
        looked = dict(zip(urls, pool.map(_looked(listed), urls), strict=True))
    files = zip(urls, found.files, strict=True)
    return [looked[url] or Stored(url, file.size, "gone") for url, file in files]


def _looked(listed: Mapping[str, Stored]) -> Callable[[str], Stored | None]:
    return lambda url: listed.get(url) or stat(url)


def _wanted(columns: Columns, places: Sequence[TableColumn]) -> Wanted:
    names = {one.name: one.names for one in places}

    def under_all_names(some: Sequence[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for one in some for name in names[one]))

    # Bounds of row groups are not looked at: types and names may have changed since then.
    wanted = columns.wanted
    return Wanted(text=under_all_names(wanted.text), needed=under_all_names(wanted.needed))


def file_columns(table: TableShard, schema: pa.Schema) -> dict[str, str]:
    """Return by column its name in a file of this schema; none of a column that it has not.

    pa.ArrowInvalid where it cannot be known which is which.
    """
    ids = {
        int(field.metadata[_FIELD_ID]): field.name
        for field in schema
        if _FIELD_ID in (field.metadata or {})
    }
    found: dict[str, str] = {}
    for column in table.columns:
        if column.id is None or not ids:
            names = [name for name in column.mapped if name in schema.names]
        else:
            names = [ids[column.id]] if column.id in ids else []
        if column.id is not None and not ids and not column.mapped:
            raise pa.ArrowInvalid(
                "the columns of this file have no ids, and its table has no"
                " schema.name-mapping.default to know them by"
            )
        if names:
            found[column.name] = names[0]
    return found


def table_columns(
    table: TableShard, given: Mapping[str, pa.ChunkedArray], rows: int
) -> dict[str, pa.Array | pa.ChunkedArray]:
    """Return the table's columns in their types: as given, or the value that the table has."""
    constants = dict(table.constants)
    columns: dict[str, pa.Array | pa.ChunkedArray] = {}
    for column in table.columns:
        kind = read_type(column.type)
        value = constants.get(column.name, column.default)
        if column.name in given:
            columns[column.name] = in_type(given[column.name], kind)
        elif value is None or not value.is_valid:
            columns[column.name] = pa.nulls(rows, kind)
        else:
            columns[column.name] = pa.repeat(value.cast(kind), rows)
    return columns
