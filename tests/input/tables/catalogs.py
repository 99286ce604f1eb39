"""Catalogs of Iceberg tables, as a user's own configuration names them."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pyiceberg.catalog.sql import SqlCatalog


def made_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warehouse: str) -> "SqlCatalog":
    """A catalog that jobs find by its name, as pyiceberg's own configuration has it."""
    where = {"uri": f"sqlite:///{tmp_path}/catalog.db", "warehouse": warehouse}
    for name, value in {**where, "type": "sql"}.items():
        monkeypatch.setenv(f"PYICEBERG_CATALOG__TESTS__{name.upper()}", value)
    # Here alone: where pyiceberg is not installed, its tests are skipped. It reads the
    # configuration when it is imported: a job's own process has it by then.
    from pyiceberg.catalog.sql import SqlCatalog
    from pyiceberg.utils.config import Config

    monkeypatch.setattr("pyiceberg.catalog._ENV_CONFIG", Config())
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    made = SqlCatalog("tests", **where, **({"s3.endpoint": endpoint} if endpoint else {}))
    made.create_namespace("db")
    return made
