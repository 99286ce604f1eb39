"""Iceberg: the files of one snapshot of a table, by its manifests (pyiceberg)."""

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embedjob.config.job import InputTable
from embedjob.errors import InputError, in_one_line
from embedjob.input.chunks import TableColumn
from embedjob.input.tables.versions import DataFile, TableVersion, not_installed
from embedjob.storage.objects import absolute, open_unchanged, read_bytes, stat

Deletes = Mapping[str, npt.NDArray[np.int64]]


def open_iceberg(table: InputTable, needed: Sequence[str]) -> TableVersion:
    """Return a snapshot of a table; rows that position deletes name are among the deleted ones.

    Raises:
        ConfigError: pyiceberg is not installed.
        InputError: there is no such table or snapshot, or it has what cannot be read rightly.
    """
    if importlib.util.find_spec("pyiceberg") is None:
        raise not_installed("iceberg", "pyiceberg")
    found = _opened(table)
    snapshot = _snapshot(table, found)
    # Without a number pyiceberg takes the schema of now, and with it that of the snapshot.
    scan = found.scan(snapshot_id=None if table.version is None else snapshot.snapshot_id)
    try:
        tasks = [*scan.plan_files()]
    except Exception as error:  # what is in a manifest may be anything
        raise InputError(
            f"input.table: {table.uri}, version {snapshot.snapshot_id}: {in_one_line(error)};"
            f" {_advice(error)}"
        ) from error
    fields = scan.projection()
    return TableVersion(
        version=str(snapshot.snapshot_id),
        place=absolute(found.location()),
        schema=_arrow(fields),
        columns=tuple(_columns(table, found, fields, needed)),
        files=tuple(_files(table, found, fields, tasks)),
    )


def _advice(error: Exception) -> str:
    """Return what helps where a snapshot's files cannot be listed."""
    if "equality delete" in str(error):  # how pyiceberg refuses them
        return (
            "equality deletes give no rows: rewrite the table's data files (rewrite_data_files in"
            " Spark), which applies them"
        )
    if isinstance(error, FileNotFoundError):
        return "its manifests are gone, as after expire_snapshots; give a version that is kept"
    return "its manifests cannot be read: give another version, or the table's newest (null)"


def _opened(table: InputTable) -> Any:
    from pyiceberg.catalog import load_catalog
    from pyiceberg.exceptions import NoSuchNamespaceError, NoSuchTableError
    from pyiceberg.table import StaticTable

    try:
        if table.catalog is not None:
            catalog = load_catalog(table.catalog)
            # What the catalog says of its storage comes before what the environment says.
            catalog.properties = {**_properties(), **catalog.properties}
            return catalog.load_table(table.uri)
        return StaticTable.from_metadata(absolute(table.uri), _properties())
    except (NoSuchNamespaceError, NoSuchTableError, ValueError, OSError) as error:
        advice = (
            "give the folder of a table that has metadata/version-hint.text, the .metadata.json of"
            " a version, or the catalog in which it is"
            if table.catalog is None
            else f"give the table's name as {table.catalog} has it, and the catalog in pyiceberg's"
            " configuration (.pyiceberg.yaml, or PYICEBERG_CATALOG__NAME__URI)"
        )
        raise InputError(
            f"input.table: {table.uri} cannot be read as an iceberg table: {in_one_line(error)};"
            f" {advice}"
        ) from error


def _properties() -> dict[str, str]:
    """Return what the environment says, and pyiceberg does not take from it by itself."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    return {"s3.endpoint": endpoint} if endpoint else {}


def _snapshot(table: InputTable, found: Any) -> Any:
    """Return the snapshot that is asked for; InputError where the table has none."""
    asked = table.version
    if asked is None:
        snapshot = found.current_snapshot()
    elif isinstance(asked, int):
        snapshot = found.snapshot_by_id(asked)
    else:
        snapshot = found.snapshot_by_name(asked)
    if snapshot is None:
        numbers = [one.snapshot_id for one in found.snapshots()]
        shown = ", ".join(map(str, [*numbers[-5:], *found.metadata.refs])) or "none"
        raise InputError(
            f"input.table: {table.uri} has no version {'yet' if asked is None else asked}; the last"
            f" ones, its branches and tags are: {shown}"
        )
    return snapshot


def _arrow(fields: Any) -> pa.Schema:
    from pyiceberg.io.pyarrow import schema_to_pyarrow

    return schema_to_pyarrow(fields, include_field_ids=False)


def _columns(
    table: InputTable, found: Any, fields: Any, needed: Sequence[str]
) -> Iterator[TableColumn]:
    """Yield the needed columns, by the ids that files have and the names that files had."""
    schema = _arrow(fields)
    mapping = found.name_mapping()
    for field in fields.fields:
        if field.name not in needed:
            continue
        kind = schema.field(field.name).type
        every = (one for schema in found.schemas().values() for one in schema.fields)
        past = [one for one in every if one.field_id == field.field_id]
        if pa.types.is_nested(kind) and any(one.field_type != field.field_type for one in past):
            raise InputError(
                f"input.table: column {field.name!r} of {table.uri} is nested, and what is in it"
                " has changed since some files were written; leave it out of the job, or rewrite"
                " the table's data files"
            )
        mapped = tuple(
            name
            for one in (mapping.root if mapping else ())
            if one.field_id == field.field_id
            for name in one.names
        )
        default = getattr(field, "initial_default", None)
        yield TableColumn(
            field.name,
            kind,
            names=tuple(dict.fromkeys([field.name, *(one.name for one in past), *mapped])),
            mapped=mapped,
            id=field.field_id,
            default=None if default is None else pa.scalar(default, kind),
        )


def _files(table: InputTable, found: Any, fields: Any, tasks: Sequence[Any]) -> Iterator[DataFile]:
    from pyiceberg.manifest import FileFormat

    schema = _arrow(fields)
    deletes = cache(lambda url, kind: _position_deletes(table, url, kind))
    for task in tasks:
        file = task.file
        if file.file_format != FileFormat.PARQUET:
            raise InputError(
                f"input.table: {file.file_path} is {file.file_format}; allowed is Parquet; rewrite"
                " the table's data files"
            )
        rows = [
            deletes(one.file_path, one.file_format.name).get(file.file_path)
            for one in task.delete_files
        ]
        named = [positions for positions in rows if positions is not None]
        yield DataFile(
            url=absolute(file.file_path),
            size=file.file_size_in_bytes,
            constants=_constants(found, fields, schema, file),
            deleted=np.unique(np.concatenate([np.empty(0, np.int64), *named])),
        )


def _constants(found: Any, fields: Any, schema: pa.Schema, file: Any) -> dict[str, pa.Scalar]:
    """Return the values by which a file's rows are partitioned, where these are a column's own."""
    from pyiceberg.transforms import IdentityTransform

    constants = {}
    for place, part in enumerate(found.specs()[file.spec_id].fields):
        name = fields.find_column_name(part.source_id)
        if isinstance(part.transform, IdentityTransform) and name in schema.names:
            constants[name] = pa.scalar(file.partition[place], schema.field(name).type)
    return constants


def _position_deletes(table: InputTable, url: str, kind: str) -> Deletes:
    """Return by data file the rows that a file of deletes names."""
    place = absolute(url)
    if kind not in ("PARQUET", "PUFFIN") or (stored := stat(place)) is None:
        raise _unknown(table, url, kind if kind not in ("PARQUET", "PUFFIN") else "missing")
    try:
        if kind == "PUFFIN":
            return _vectors(read_bytes(place))
        with open_unchanged(stored) as source:
            rows = pq.ParquetFile(source).read(columns=["file_path", "pos"])
    except (ValueError, KeyError, pa.ArrowException) as error:
        raise _unknown(table, url, f"damaged ({in_one_line(error)})") from error
    names = rows["file_path"].combine_chunks().cast(pa.string()).dictionary_encode()
    codes = names.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    borders = np.searchsorted(codes[order], np.arange(1, len(names.dictionary)))
    places = np.split(rows["pos"].to_numpy()[order], borders)
    return dict(zip(names.dictionary.to_pylist(), places, strict=True))


def _vectors(puffin: bytes) -> Deletes:
    """Return by data file the rows of its deletion vector; ValueError or KeyError if damaged."""
    from pyiceberg.table.deletion_vector import deletion_vectors_from_puffin_file
    from pyiceberg.table.puffin import PuffinFile

    file = PuffinFile(puffin)
    rows: dict[str, npt.NDArray[np.int64]] = {}
    vectors = deletion_vectors_from_puffin_file(file)
    for blob, vector in zip(file.footer.blobs, vectors, strict=True):
        own = np.concatenate([np.empty(0, np.int64), *map(np.asarray, vector.to_vector().chunks)])
        if len(own) != int(blob.properties["cardinality"]):
            raise ValueError(f"a vector has {len(own)} rows and says {blob.properties}")
        rows[vector.referenced_data_file] = own
    return rows


def _unknown(table: InputTable, url: str, why: str) -> InputError:
    return InputError(
        f"input.table: {table.uri} has rows deleted by {url}, which is {why}, so that it is not"
        " known which; rewrite the table's data files"
    )
