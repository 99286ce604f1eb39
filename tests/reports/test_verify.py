"""Every problem that `verify` can name, provoked for real in an output that was whole."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedjob.cli import main
from embedjob.errors import OutputError
from embedjob.output.chunk_file import CALIBRATION_KEY
from embedjob.output.cleanup import damaged, prune
from embedjob.output.manifest import FileList
from embedjob.output.snapshot import publish, read_snapshot
from embedjob.reports.verify import verify
from tests.outputs import reissue
from tests.reports.published import as_passages, output
from tests.shards import FINGERPRINT, WIDTH, finished, spread

Edit = Callable[[pa.Table], pa.Table]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Two shards of 25 rows in chunks of ten, row 3 of each quarantined."""
    return output(tmp_path)


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """The same, and three lines to a row."""
    return output(tmp_path, lambda rows: spread(finished(rows), 3), aggregation="keep")


@pytest.fixture
def variable(tmp_path: Path) -> Path:
    """The same, in lists of variable length."""
    return output(tmp_path, vector_list="variable")


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """The same as passages of ten characters each, the second of every row 13 quarantined."""
    return output(tmp_path, as_passages, long_text="split")


def data(out: Path) -> list[Path]:
    return sorted((out / "data").rglob("*.parquet"))


def snapshot(out: Path) -> Path:
    return out / "snapshots" / "00000001.json"


def change(
    out: Path, edit: Edit, *, number: int = 1, stamp: dict[bytes, bytes] | None = None
) -> None:
    """Another table in one file, which the snapshot then names as if nothing had happened."""
    path = data(out)[number]
    table = pq.read_table(path)
    changed = edit(table.replace_schema_metadata())
    changed = changed.replace_schema_metadata({**table.schema.metadata, **(stamp or {})})
    pq.write_table(changed, path, write_page_checksum=True)
    reissue(out, snapshot(out))


def swap(name: str, values: Callable[[pa.ChunkedArray], Any]) -> Edit:
    """An edit of one column."""

    def edit(table: pa.Table) -> pa.Table:
        field = table.schema.field(name)
        column = pa.array(values(table[name]), field.type)
        return table.set_column(table.schema.get_field_index(name), field, column)

    return edit


def vectors(of: Callable[[np.ndarray], np.ndarray]) -> Edit:
    def values(column: pa.ChunkedArray) -> list[list[float]]:
        matrix = np.stack(column.to_pylist()).astype(np.float32)
        return of(matrix).tolist()

    return swap("embedding", values)


def test_a_whole_output_has_no_problem(out: Path) -> None:
    report = verify(str(out))
    assert (report.ok, report.problems) == (True, ())
    assert (report.files, report.rows) == (6, 48)
    assert report.as_dict()["ok"] is True


def test_lists_of_variable_length_are_read_as_well(variable: Path) -> None:
    assert verify(str(variable)).problems == ()
    change(variable, swap("embedding", lambda column: [[0.9, 0, 0, 0]] * len(column)))
    assert "norm is off" in " ".join(verify(str(variable)).problems)
    change(variable, swap("embedding", lambda column: [[1.0]] + [[0.6, 0.8]] * (len(column) - 1)))
    assert "of 1 and of 2 numbers" in " ".join(verify(str(variable)).problems)


def test_a_folder_that_is_no_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no _embedjob\.json"):
        verify(str(tmp_path))


def test_an_output_in_which_no_run_has_ended(out: Path) -> None:
    snapshot(out).unlink()
    problems = verify(str(out)).problems
    assert "no snapshot is published" in problems[-1]
    assert sum("orphan" in problem for problem in problems) == 8
    # It would refuse.
    assert not any("prune" in problem for problem in problems)


CHANGED: dict[str, tuple[Edit, str]] = {
    "a row that is there twice": (
        lambda table: pa.concat_tables([table.slice(0, 1), table.slice(0, len(table) - 1)]),
        "its rows are repeated or out of order",
    ),
    "rows in another order": (
        lambda table: table.take(list(reversed(range(len(table))))),
        "its rows are repeated or out of order",
    ),
    "a row of another chunk": (
        swap("row", lambda column: [row + 90 for row in column.to_pylist()]),
        "are not all inside 10 to 20",
    ),
    "rows of another shard": (
        swap("shard", lambda column: ["elsewhere"] * len(column)),
        "it holds rows of another shard",
    ),
    "a row too few": (
        lambda table: table.slice(1),
        "has 9 rows and 0 quarantined, but its footer counts",
    ),
    "a vector that is not finite": (
        vectors(lambda matrix: np.where(np.arange(len(matrix))[:, None] == 2, np.nan, matrix)),
        "a vector is not finite",
    ),
    "a vector that is too long": (vectors(lambda matrix: matrix * 1.5), "norm is off by 0.5"),
    "vectors of another width": (
        lambda table: table.set_column(
            table.schema.get_field_index("embedding"),
            "embedding",
            pa.FixedSizeListArray.from_arrays(np.zeros(len(table) * 2, np.float32), 2),
        ),
        f"not fixed_size_list<element: float>[{WIDTH}]",
    ),
    "a column that is gone": (lambda table: table.drop_columns(["shard"]), "no column shard"),
    "a column too many": (
        lambda table: table.append_column("more", pa.nulls(len(table), pa.int8())),
        "its columns are",
    ),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_changed_table_is_found(what: str, out: Path) -> None:
    edit, words = CHANGED[what]
    change(out, edit)
    report = verify(str(out))
    assert not report.ok
    assert any(data(out)[1].name in one and words in one for one in report.problems), report


LINES: dict[str, tuple[Edit, str]] = {
    "the last line": (lambda table: table.slice(0, len(table) - 1), "10 rows in 29 lines"),
    "a line between": (
        lambda table: pa.concat_tables([table.slice(0, 1), table.slice(2)]),
        "its rows are repeated or out of order",
    ),
    "the first line": (lambda table: table.slice(1), "its rows are repeated or out of order"),
    "a row": (lambda table: table.slice(3), "9 rows in 27 lines"),
    "the parts": (lambda table: table.drop_columns(["part"]), "no column part"),
}


def test_passages_of_which_one_is_bad_are_whole(split: Path) -> None:
    report = verify(str(split))
    assert (report.ok, report.problems) == (True, ())
    assert (report.files, report.rows) == (6, 46)
    assert not damaged(str(split), FINGERPRINT)


LOST: dict[str, tuple[Edit, str]] = {
    "the last passage of a row": (lambda table: table.slice(0, len(table) - 1), "in 28 lines"),
    "a passage between": (
        lambda table: pa.concat_tables([table.slice(0, 1), table.slice(2)]),
        "a row lacks a passage, or has it twice",
    ),
    "the first passage": (lambda table: table.slice(1), "a row lacks a passage"),
    "all of a row": (lambda table: table.slice(3), "passages of 9 rows"),
    "a row's characters": (
        swap("char_start", lambda column: [place + 1 for place in column.to_pylist()]),
        "leave characters out",
    ),
    "characters between": (
        swap("char_stop", lambda column: [place - 1 for place in column.to_pylist()]),
        "leave characters out",
    ),
    "the places": (
        lambda table: table.drop_columns(["char_stop"]),
        "lacks columns of passages, or has them in other types (",
    ),
}


@pytest.mark.parametrize("lost", LOST)
def test_a_passage_that_is_lost_is_found(lost: str, split: Path) -> None:
    """In a chunk whose row 13 has its second passage in the quarantine."""
    edit, words = LOST[lost]
    change(split, edit)
    problems = verify(str(split)).problems
    assert any(data(split)[1].name in one and words in one for one in problems), problems


def test_rows_of_several_lines_are_counted_as_rows(several: Path) -> None:
    report = verify(str(several))
    assert (report.ok, report.problems) == (True, ())
    assert (report.files, report.rows) == (6, 48)
    assert not damaged(str(several), FINGERPRINT)


@pytest.mark.parametrize("lost", LINES)
def test_a_lost_line_is_found(lost: str, several: Path) -> None:
    edit, words = LINES[lost]
    change(several, edit)
    problems = verify(str(several)).problems
    assert any(data(several)[1].name in one and words in one for one in problems), problems


def test_a_file_of_another_fingerprint_is_found(out: Path) -> None:
    change(out, lambda table: table, stamp={b"embedjob.fingerprint": b"0" * 64})
    [problem] = verify(str(out)).problems
    assert "its footer names another fingerprint" in problem


def test_a_parquet_file_of_somebody_else_is_found(out: Path) -> None:
    pq.write_table(pa.table({"row": [1]}), data(out)[1])
    problems = verify(str(out)).problems
    assert any("not the object that was published" in problem for problem in problems)
    assert any("embedjob did not write" in problem for problem in problems)


def test_a_deleted_file_is_found(out: Path) -> None:
    lost = data(out)[4]
    lost.unlink()
    [problem] = verify(str(out)).problems
    assert problem == f"{lost}: is missing"


def test_a_flipped_bit_is_found_by_its_checksum_alone(out: Path) -> None:
    path = data(out)[2]
    group = pq.read_metadata(path).row_group(0)
    [vectors] = [
        c for c in map(group.column, range(group.num_columns)) if "embed" in c.path_in_schema
    ]
    content = bytearray(path.read_bytes())
    # The last byte of the column is a value's: no checksum covers the header that precedes them.
    content[vectors.data_page_offset + vectors.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
    reissue(out, snapshot(out))
    [problem] = verify(str(out)).problems
    assert problem.startswith(f"{path}: cannot be read: ")


def test_a_truncated_file_is_found(out: Path) -> None:
    path = data(out)[2]
    path.write_bytes(path.read_bytes()[:-100])
    problems = verify(str(out)).problems
    assert [word for word in ("not the object", "cannot be read") if word in str(problems)] == [
        "not the object",
        "cannot be read",
    ]


@pytest.mark.parametrize("place", ["data/ffffffffffff", "data/0123456789ab", "quarantine/x"])
def test_an_orphan_is_found_wherever_it_lies(place: str, out: Path) -> None:
    stray = out / place / "stray.parquet"
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(data(out)[0].read_bytes())
    [problem] = verify(str(out)).problems
    assert problem.startswith(f"{stray}: orphan")


@pytest.mark.parametrize(
    "name",
    [
        ".DS_Store",
        "._00000001.json",
        ".nfs00000000123",
        ".~lock.x.parquet#",
        ".Trash-1000/files/x.parquet",
        "@eaDir/x.parquet@SynoEAStream",
        "~$x.xlsx",
        "x.parquet~",
        "Thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "Desktop.ini",
        "$RECYCLE.BIN/x",
        "data_$folder$",
    ],
)
def test_what_file_browsers_and_disks_leave_is_a_note(
    name: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In every folder of an output, which reads and prunes as before."""
    folders = ["data", f"data/{FINGERPRINT[:12]}", "quarantine", "snapshots", "claims", "leases"]
    for folder in folders:
        (out / folder / name).parent.mkdir(parents=True, exist_ok=True)
        (out / folder / name).write_bytes(b"\x00")
    report = verify(str(out))
    assert (report.ok, report.rows) == (True, 48)
    [note] = report.notes
    assert note.startswith("left here by a file browser or a disk: 3, such as")
    assert str(out / "data" / name) in note
    assert prune(str(out), keep=1).files == 0
    assert damaged(str(out), FINGERPRINT) == frozenset()
    assert main(["verify", str(out)]) == 0
    assert f"note: {note}" in capsys.readouterr().err


def test_what_an_older_snapshot_names_is_no_orphan(out: Path) -> None:
    newer = replace(read_snapshot(str(out), 1), epoch=2, files=FileList.of(()), shards=())
    publish(str(out), newer)
    assert verify(str(out)).ok


class TestQuantised:
    @pytest.mark.parametrize("dtype", ["int8", "uint8", "binary", "ubinary"])
    def test_a_whole_output_has_no_problem(self, tmp_path: Path, dtype: str) -> None:
        """Its norms are no longer 1, and none are asked for."""
        report = verify(str(output(tmp_path, vector_dtype=dtype)))
        assert (report.problems, report.rows) == ((), 48)

    def test_files_of_another_width_are_found(self, tmp_path: Path) -> None:
        made = output(tmp_path, vector_dtype="ubinary")
        wide = pa.list_(pa.field("element", pa.uint8()), 2)

        def widened(table: pa.Table) -> pa.Table:
            codes = pa.array([[1, 2]] * len(table), wide)
            return table.set_column(table.column_names.index("embedding"), "embedding", codes)

        change(made, widened)
        assert any("[2], not fixed_size_list" in one for one in verify(str(made)).problems)

    def test_a_file_of_other_ranges_is_found(self, tmp_path: Path) -> None:
        made = output(tmp_path, vector_dtype="int8")
        path = data(made)[1]
        said = pq.read_metadata(path).metadata[CALIBRATION_KEY].decode()
        stamp = {CALIBRATION_KEY: said.replace("-1.0", "-0.5", 1).encode()}
        change(made, lambda table: table, stamp=stamp)
        [problem] = verify(str(made)).problems
        assert problem == f"{path}: its footer has other ranges than the claim"

    @pytest.mark.parametrize("spoiled", [None, [[0.0], [1.0]], [[1.0] * WIDTH, [0.0] * WIDTH]])
    def test_a_claim_without_usable_ranges_is_found(self, tmp_path: Path, spoiled: object) -> None:
        made = output(tmp_path, vector_dtype="uint8")
        claim = made / "_embedjob.json"
        document = json.loads(claim.read_text())
        document["calibration"] = spoiled and {"ranges": spoiled, "vectors": 9}
        claim.write_text(json.dumps(document))
        problems = verify(str(made)).problems
        assert sum("no ranges for vectors of 4 numbers" in problem for problem in problems) == 6


class TestQuarantine:
    def _file(self, out: Path) -> Path:
        return sorted((out / "quarantine").rglob("*.parquet"))[0]

    def test_a_missing_file_is_found(self, out: Path) -> None:
        self._file(out).unlink()
        [problem] = verify(str(out)).problems
        assert problem.endswith(": is missing, and should hold 1 quarantined row")
        [name] = damaged(str(out), FINGERPRINT)
        assert name in {path.name for path in data(out)}

    def test_a_damaged_file_is_found(self, out: Path) -> None:
        path = self._file(out)
        path.write_bytes(path.read_bytes()[:-1])
        [problem] = verify(str(out)).problems
        assert problem.startswith(f"{path}: cannot be read")
        assert damaged(str(out), FINGERPRINT) == {path.name}

    def test_another_number_of_rows_is_found(self, out: Path) -> None:
        path = self._file(out)
        pq.write_table(pq.read_table(path).slice(1), path)
        [problem] = verify(str(out)).problems
        assert problem.endswith(": has 0 rows, and should hold 1 quarantined row")


class TestSnapshot:
    def _edit(self, out: Path, edit: Callable[[dict[str, Any]], None]) -> tuple[str, ...]:
        reissue(out, snapshot(out), edit)
        return verify(str(out)).problems

    def test_rows_that_no_file_holds_are_found(self, out: Path) -> None:
        problems = self._edit(out, lambda document: document["files"].pop(1))
        assert any("no file holds rows 10 to 20" in problem for problem in problems)
        assert any("orphan" in problem for problem in problems)

    def test_the_end_of_a_shard_that_no_file_holds_is_found(self, out: Path) -> None:
        problems = self._edit(out, lambda document: document["files"].pop(2))
        assert any("no file holds rows 20 to 25" in problem for problem in problems)

    def test_rows_that_two_files_hold_are_found(self, out: Path) -> None:
        def overlap(document: dict[str, Any]) -> None:
            document["files"][1]["start"] = 5

        assert any("two files hold rows 5 to 10" in one for one in self._edit(out, overlap))

    def test_a_file_that_was_published_as_another_object_is_found(self, out: Path) -> None:
        def other(document: dict[str, Any]) -> None:
            document["files"][1]["etag"] = "another"

        [problem] = self._edit(out, other)
        assert "is not the object that was published" in problem

    def test_a_fingerprint_that_nobody_claimed_is_found(self, out: Path) -> None:
        def other(document: dict[str, Any]) -> None:
            document["fingerprint"] = "0" * 64

        assert "no claim has fingerprint 000000000000" in self._edit(out, other)[-1]

    def test_one_that_is_not_json_is_refused(self, out: Path) -> None:
        snapshot(out).write_text("{")
        with pytest.raises(OutputError, match="is not JSON"):
            verify(str(out))
        assert json.loads((out / "_embedjob.json").read_text())["chunk_rows"] == 10
