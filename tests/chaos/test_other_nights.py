"""Nights over tables and of passages, whose driver is killed at any moment, up to three times.

However it went, readers have what a quiet run from nothing makes of the same input, with the
vectors that they had before where there were some, and no committed vector was made again.
"""

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedjob.output.chunk_file import COUNTS_KEY
from embedjob.output.snapshot import newest_snapshot, open_snapshot
from tests import running
from tests.chaos.nights import Nights
from tests.cluster import Cluster
from tests.drivers import chance_of
from tests.input.tables.catalogs import made_catalog
from tests.running import Job, texts

deltalake = pytest.importorskip("deltalake", reason="pip install 'embedjob[lakehouse]'")
pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(900)]
FIRST, EDITED, GONE, NEW = 90, 5, 4, 6


class OtherNights(Nights):
    """Nights that are compared with a quiet run of the same input."""

    def require_as_anew(self, before: dict[bytes, bytes], files: set[str]) -> None:
        """Readers have what a run from nothing gives them, and the vectors that they had."""
        assert running.command("verify", self.out, "--json").summary["problems"] == []
        quiet = replace(self, out=str(self.folder / f"quiet-{self.night}"))
        quiet.run()
        ours, theirs = self._rows(), quiet._rows()
        columns = [name for name in theirs.column_names if name != "embedding"]
        assert ours.select(columns) == theirs.select(columns)
        vectors = [np.stack(table["embedding"].to_pylist()) for table in (ours, theirs)]
        assert np.einsum("rd,rd->r", *vectors).min() >= 0.99999
        old = {one: row for one, row in self.vectors().items() if one in before}
        assert old == {one: before[one] for one in old}
        self._require_nothing_twice(before, files)

    def files(self) -> set[str]:
        """The files that readers have."""
        snapshot = newest_snapshot(self.out)
        assert snapshot is not None
        return {file.path for file in snapshot.files}

    def _rows(self) -> pa.Table:
        table = open_snapshot(self.out).to_table()
        order = [(name, "ascending") for name in ("shard", "row", "part")]
        return table.sort_by([one for one in order if one[0] in table.column_names])

    def _require_nothing_twice(self, before: dict[bytes, bytes], files: set[str]) -> None:
        """Rows whose texts had vectors before count as reused in the files of tonight."""
        known = taken = 0
        dataset = open_snapshot(self.out)
        for fragment in dataset.get_fragments():
            if any(fragment.path.endswith(name) for name in files):
                continue
            with dataset.filesystem.open_input_file(fragment.path) as file:
                table = pq.read_table(file)
            of_row: dict[int, list[bool]] = {}
            for row, one in zip(*(table[n].to_pylist() for n in ("row", "text_hash")), strict=True):
                of_row.setdefault(row, []).append(one in before)
            known += sum(all(lines) for lines in of_row.values())
            taken += json.loads(table.schema.metadata[COUNTS_KEY]).get("reused", 0)
        assert known > 0
        assert taken >= known


class PassageNights(OtherNights):
    """Documents of several passages, in files that are cut anew; a sentence of some is edited."""

    @property
    def document(self) -> Job:
        split = {"max_tokens": 50}
        encoder = {"max_tokens": 72, "long_text": "split", "split": split}
        return {**super().document, "encoder": {**super().document["encoder"], **encoder}}

    def begin(self) -> None:
        some = texts(FIRST * 4, seed=1)
        self.bodies = [
            " ".join(f"{body}." for body in some[start : start + 4])
            for start in range(0, len(some), 4)
        ]
        self.write()


class TableNights(OtherNights, ABC):
    """A table of two files and more, of which some rows are deleted, some edited, and some new."""

    @property
    @abstractmethod
    def table(self) -> Job:
        """The section `input.table`."""

    @property
    def document(self) -> Job:
        whole = super().document
        source = {key: value for key, value in whole["input"].items() if key != "path"}
        return {**whole, "input": {**source, "table": self.table}}

    def begin(self) -> None:
        self.ids = [f"d{number:03}" for number in range(FIRST)]
        bodies = texts(FIRST)
        for half in (slice(0, FIRST // 2), slice(FIRST // 2, FIRST)):
            self.append(self.ids[half], bodies[half])

    def change(self) -> None:
        self.night += 1
        edited, gone = self._drawn(EDITED), self._drawn(GONE)
        self.delete([*edited, *gone])
        new = [f"n{self.night}-{number}" for number in range(NEW)]
        self.append(edited + new, [f"{one} as it is on night {self.night}" for one in edited + new])
        self.ids += edited + new

    def _drawn(self, count: int) -> list[str]:
        drawn = self.chance.sample(self.ids, count)
        self.ids = [one for one in self.ids if one not in drawn]
        return drawn

    def rows(self, ids: list[str], bodies: list[str]) -> pa.Table:
        """Rows of the table as they are appended."""
        kinds = pa.schema([("doc_id", "string"), ("body", "string"), ("night", "int64")])
        return pa.table([ids, bodies, [self.night] * len(ids)], schema=kinds)

    @abstractmethod
    def append(self, ids: list[str], bodies: list[str]) -> None:
        """Append rows, as one more file."""

    @abstractmethod
    def delete(self, ids: list[str]) -> None:
        """Delete these rows; the files that had them are written again."""


class DeltaNights(TableNights):
    """A table of Delta Lake."""

    @property
    def table(self) -> Job:
        return {"format": "delta", "uri": str(self.folder / "table")}

    def append(self, ids: list[str], bodies: list[str]) -> None:
        deltalake.write_deltalake(self.table["uri"], self.rows(ids, bodies), mode="append")

    def delete(self, ids: list[str]) -> None:
        some = ", ".join(f"'{one}'" for one in ids)
        deltalake.DeltaTable(self.table["uri"]).delete(f"doc_id IN ({some})")


class IcebergNights(TableNights):
    """A table of Iceberg in a catalog in SQLite; `catalog` is set by the test."""

    catalog: Any

    @property
    def table(self) -> Job:
        return {"format": "iceberg", "catalog": "tests", "uri": "db.docs"}

    def begin(self) -> None:
        self.catalog.create_table("db.docs", schema=self.rows([], []).schema)
        super().begin()

    def append(self, ids: list[str], bodies: list[str]) -> None:
        self.catalog.load_table("db.docs").append(self.rows(ids, bodies))

    def delete(self, ids: list[str]) -> None:
        from pyiceberg.expressions import In

        self.catalog.load_table("db.docs").delete(In("doc_id", ids))


@pytest.fixture
def nights_in(
    slow_model: Path, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Nights of a kind, whose output is given."""

    def made(kind: Any, out: str, chance: random.Random) -> Any:
        if kind is IcebergNights:
            kind.catalog = made_catalog(tmp_path, monkeypatch, str(tmp_path / "warehouse"))
        return kind(tmp_path, out, slow_model, cluster, chance)

    return made


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", [PassageNights, DeltaNights, IcebergNights])
def test_a_night_over_a_table_or_of_passages_is_made_whole(
    kind: Any, seed: int, place: Callable[[int], str], nights_in: Callable[..., Any]
) -> None:
    nights = nights_in(kind, place(seed), chance_of(seed, kind.__name__))
    nights.begin()
    nights.run()
    for night in range(1 if seed < 2 else 3):
        before, files = nights.vectors(), nights.files()
        nights.night_of_kills(night)
        nights.require_as_anew(before, files)
