"""Delta Lake: the files of one version of a table, by its log (deltalake)."""

import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedjob.config.job import InputTable
from embedjob.errors import InputError, in_one_line
from embedjob.input.chunks import TableColumn
from embedjob.input.tables.versions import NO_DELETED_ROWS, DataFile, TableVersion, not_installed
from embedjob.storage.objects import absolute, join

# What a reader must know of the protocol, and this one does. https://github.com/delta-io/delta,
# PROTOCOL.md, "Reader features".
_FEATURES = frozenset(
    {
        "columnMapping",
        "deletionVectors",
        "timestampNtz",
        "typeWidening",
        "typeWidening-preview",
        "v2Checkpoint",
        "vacuumProtocolCheck",
    }
)
_MAPPED = "delta.columnMapping.physicalName"


def open_delta(table: InputTable, needed: Sequence[str]) -> TableVersion:
    """Return a version of a table; rows of deletion vectors are among the deleted ones.

    Raises:
        ConfigError: deltalake is not installed.
        InputError: there is no such table or version, or it has a feature that is not known here.
    """
    try:
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError
    except ImportError as error:
        raise not_installed("delta", "deltalake") from error
    place = absolute(table.uri)
    try:
        found = DeltaTable(place, storage_options=_options(place))
        if table.version is not None:
            found.load_as_version(table.version)
        _check_features(table, found)
        actions = pa.table(found.get_add_actions(flatten=True))
        schema = pa.schema(found.schema().to_arrow())
    except (DeltaError, OSError, ValueError) as error:
        asked = "" if table.version is None else f", version {table.version}"
        raise InputError(
            f"input.table: {table.uri}{asked} cannot be read as a delta table:"
            f" {in_one_line(error)}; give its folder, which has _delta_log in it, and a version"
            " that its log still has"
        ) from error
    partitions = _partitions(table, found, actions)
    return TableVersion(
        version=str(found.version()),
        place=place,
        schema=schema,
        columns=tuple(_columns(table, found, schema, needed, [*partitions])),
        files=tuple(_files(place, actions, schema, partitions, _deleted(table, found))),
    )


def _options(place: str) -> dict[str, str]:
    """Return what the environment says, and deltalake does not take from it by itself."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    plain = place.startswith("s3://") and endpoint.startswith("http://")
    return {"AWS_ALLOW_HTTP": "true"} if plain else {}


def _check_features(table: InputTable, found: Any) -> None:
    protocol = found.protocol()
    unknown = sorted({*(protocol.reader_features or ())} - _FEATURES)
    mode = found.metadata().configuration.get("delta.columnMapping.mode", "none")
    if mode not in ("none", "name"):
        unknown.append(f"columnMapping by {mode}")
    if unknown:
        raise InputError(
            f"input.table: {table.uri} needs a reader that knows {', '.join(unknown)}, which is not"
            " supported; write a table without it, or give its files as input.path of a copy"
        )


def _partitions(table: InputTable, found: Any, actions: pa.Table) -> dict[str, pa.ChunkedArray]:
    """Return the values of each partition column, of all files; InputError where one has none."""
    physical = {field.name: field.metadata.get(_MAPPED) for field in found.schema().fields}
    values = {}
    for name in found.metadata().partition_columns:
        names = [f"partition.{one}" for one in (name, physical.get(name))]
        if not (held := [one for one in names if one in actions.column_names]):
            raise InputError(
                f"input.table: the log of {table.uri} does not say which values of {name!r}, by"
                " which it is partitioned, its files have; write the table again"
            )
        values[name] = actions[held[0]]
    return values


def _columns(
    table: InputTable,
    found: Any,
    schema: pa.Schema,
    needed: Sequence[str],
    partitions: Sequence[str],
) -> list[TableColumn]:
    """Return the needed columns, under the names that they have in files; InputError for others."""
    mapped = {field.name: field.metadata.get(_MAPPED) for field in found.schema().fields}
    columns = []
    for name in needed:
        if name not in schema.names:
            continue  # which is said later, with those that are there
        kind, physical = schema.field(name).type, mapped.get(name)
        if physical and pa.types.is_nested(kind):
            raise InputError(
                f"input.table: column {name!r} of {table.uri} is nested, and the table maps its"
                " columns to other names in its files, which is not supported inside of columns;"
                " leave it out of the job"
            )
        names = () if name in partitions else (str(physical or name),)
        columns.append(TableColumn(name, kind, names=names, mapped=names))
    return columns


def _files(
    place: str,
    actions: pa.Table,
    schema: pa.Schema,
    partitions: Mapping[str, pa.ChunkedArray],
    deleted: Mapping[str, npt.NDArray[np.int64]],
) -> list[DataFile]:
    constants = {name: values.cast(schema.field(name).type) for name, values in partitions.items()}
    files = []
    for row, (path, size) in enumerate(
        zip(actions["path"].to_pylist(), actions["size_bytes"].to_pylist(), strict=True)
    ):
        path = unquote(path)  # the log has URLs
        url = path if "://" in path or path.startswith("/") else join(place, path)
        files.append(
            DataFile(
                url=url,
                size=size,
                constants={name: values[row] for name, values in constants.items()},
                deleted=deleted.get(_key(url), NO_DELETED_ROWS),
            )
        )
    return files


def _deleted(table: InputTable, found: Any) -> dict[str, npt.NDArray[np.int64]]:
    """Return by file the rows that its deletion vector marks; InputError where one is lost."""
    from deltalake.exceptions import DeltaError

    if "deletionVectors" not in (found.protocol().reader_features or ()):
        return {}
    rows = {}
    try:
        for batch in pa.RecordBatchReader.from_stream(found.deletion_vectors()):
            pairs = zip(batch["filepath"].to_pylist(), batch["selection_vector"], strict=True)
            for url, kept in pairs:
                rows[_key(url)] = np.flatnonzero(~kept.values.to_numpy(zero_copy_only=False))
    except (DeltaError, OSError, ValueError) as error:
        raise InputError(
            f"input.table: {table.uri}: a deletion vector cannot be read: {in_one_line(error)};"
            " so it is not known which rows are deleted; give a version that is whole"
        ) from error
    return rows


def _key(url: str) -> str:
    """Return one spelling of a file's place: as a URL some of its characters are escaped."""
    return unquote(url.removeprefix("file://"))
