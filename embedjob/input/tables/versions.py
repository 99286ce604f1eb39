"""Table versions: what a table format says of one version, before its files are looked at."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedjob.errors import ConfigError
from embedjob.input.chunks import TableColumn

NO_DELETED_ROWS: npt.NDArray[np.int64] = np.empty(0, np.int64)


@dataclass(frozen=True)
class DataFile:
    """A file of a table: its place, size, columns that it need not hold, and rows that are gone.

    `deleted` are the numbers of rows in the file, ascending.
    """

    url: str
    size: int
    constants: Mapping[str, pa.Scalar] = field(default_factory=dict)
    deleted: npt.NDArray[np.int64] = field(default_factory=lambda: NO_DELETED_ROWS)


@dataclass(frozen=True)
class TableVersion:
    """One version of a table: its folder, all its columns, where files have those, its files."""

    version: str
    place: str
    schema: pa.Schema
    columns: tuple[TableColumn, ...]
    files: tuple[DataFile, ...]


def not_installed(format: str, package: str) -> ConfigError:
    """Return the error where the library that reads a format is missing."""
    return ConfigError(
        f"input.table: reading a table of {format} needs {package};"
        " pip install 'embedjob[lakehouse]' (on the machine that starts the job)"
    )
