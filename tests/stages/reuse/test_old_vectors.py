"""Old files as they may be found: whole, damaged, gone, another's; each is read once.

Covers: embedjob.job.reusable
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedjob.config.job import Input
from embedjob.errors import OutputError
from embedjob.input.reading import read_chunk
from embedjob.job.output import output_spec
from embedjob.job.planning import JobPlan
from embedjob.job.reusable import OldFile, OldFiles, check_reuse_from, old_files
from embedjob.output.calibration import Calibration
from embedjob.output.committing import commit
from embedjob.output.manifest import FileList, SnapshotFile
from embedjob.output.schema import OutputSpec
from embedjob.output.snapshot import Snapshot, publish, read_snapshot
from embedjob.stages.reuse import old_vectors
from embedjob.stages.reuse.old_vectors import Carried, carried_of, gathered, old_keys
from embedjob.stages.reuse.text_keys import (
    Places,
    TextKeys,
    hashes_of,
    in_order,
    join_partition,
    numbers_of,
)
from embedjob.storage.objects import Stored, join, stat
from embedjob.text.conversations import text_hash
from tests.output.worlds import vector_of
from tests.shards import FINGERPRINT, WIDTH, finished, plan_of, write_shard

TEXTS = [f"text {number}" for number in range(20)]
INPUT = {"text": "t", "id": "n"}


def plan_in(folder: Path, texts: list[str | None], **given: Any) -> JobPlan:
    """A plan over one shard of these texts, whose output lies in the folder."""
    columns = {"t": pa.array(texts, pa.string()), "n": [str(n) for n in range(len(texts))]}
    write_shard(folder / "in" / "a.parquet", columns, group_rows=5)
    plan = plan_of(Input(path=str(folder / "in"), **INPUT, **given))
    output = plan.job.config.output.model_copy(update={"path": str(folder / "out")})
    job = replace(plan.job, config=plan.job.config.model_copy(update={"output": output}))
    return replace(plan, job=job)


def by_text(table: pa.Table) -> pa.Table:
    """Finished rows whose vectors say which text they are of."""
    place = table.schema.get_field_index("embedding")
    rows = zip(table["text_hash"].to_pylist(), table["reason"].to_pylist(), strict=True)
    vectors = [None if reason else vector_of(one) for one, reason in rows]
    return table.set_column(place, "embedding", pa.array(vectors, pa.list_(pa.float32(), WIDTH)))


def published(plan: JobPlan, spec: OutputSpec | None = None, *, epoch: int = 1) -> list[Stored]:
    """Embed and publish a plan, without a model; the files."""
    spec, entries, files = spec or output_spec(plan), [], []
    for chunk in plan.chunks:
        rows = read_chunk(chunk, plan.job.config.input)
        done = commit(plan.job.out, chunk, by_text(finished(rows)), rows_in=len(rows), spec=spec)
        path = f"data/{spec.fingerprint[:12]}/{done.name}"
        entries.append(
            SnapshotFile(
                path,
                done.rows,
                done.bytes,
                done.etag,
                chunk.shard.url,
                chunk.shard.etag,
                chunk.start,
                chunk.stop,
                done.counts,
            )
        )
        files.append(stat(join(plan.job.out, path)))
    snapshot = Snapshot(
        epoch=epoch, fingerprint=spec.fingerprint, files=FileList.of(entries), shards=()
    )
    publish(plan.job.out, snapshot)
    assert all(file is not None for file in files)
    return files


def found(files: OldFiles, carried: Carried, texts: list[str]) -> dict[bytes, list[float]]:
    """The vectors of these texts in old files, by hash."""
    high, low = numbers_of(b"".join(text_hash(text) for text in texts))
    keys = in_order(TextKeys(high, low, np.zeros(len(texts), np.uint32)))
    every = files.take(range(len(files)))
    places, _ = join_partition(0, 1, [keys], [old_keys(every, carried)])
    table = gathered(every, [places], carried).table
    rows = table.to_pylist()
    return {row["text_hash"]: row["embedding"] for row in rows}


def all_vectors(texts: list[str]) -> dict[bytes, list[float]]:
    return {text_hash(text): vector_of(text_hash(text)) for text in texts}


@pytest.fixture
def plan(tmp_path: Path) -> JobPlan:
    """Twenty texts in two chunks of two row groups."""
    return plan_in(tmp_path, TEXTS)


def carried(plan: JobPlan) -> Carried:
    made = carried_of(plan)
    assert made is not None
    return made


def test_each_text_has_the_vector_of_its_line(plan: JobPlan) -> None:
    published(plan)
    files = old_files(plan)
    assert len(files) == 2
    asked = [*TEXTS[3:17:2], "nowhere"]
    assert found(files, carried(plan), asked) == all_vectors(asked[:-1])


def test_a_text_that_rows_repeat_side_by_side_has_one_line(tmp_path: Path) -> None:
    """A row that took over all of them would be there as often."""
    plan = plan_in(tmp_path, ["a", "a", "b", "b", "b", "a", "c"])
    published(plan)
    every, mine = old_files(plan).take([0]), carried(plan)
    keys = old_keys(every, mine)
    assert keys.lines.tolist() == [1] * 7
    high, low = numbers_of(b"".join(text_hash(text) for text in "abcab"))
    texts = in_order(TextKeys(high, low, np.array([0, 0, 0, 1, 1], np.uint32)))
    made = gathered(every, [join_partition(0, 1, [texts], [keys])[0]], mine)
    assert (made.numbers.tolist(), made.texts.tolist()) == ([0, 1], [3, 2])
    assert len(made.table) == 5


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x10
    _instead(path, bytes(content))


def cut(path: Path) -> None:
    _instead(path, path.read_bytes()[:-200])


def _instead(path: Path, content: bytes) -> None:
    """Another content under the etag that is listed: as a disk does it, and no writer."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def rewritten(path: Path) -> None:
    path.write_bytes(path.read_bytes())


@pytest.mark.parametrize("damage", [Path.unlink, flipped, cut, rewritten])
def test_what_is_wrong_with_one_file_costs_its_own_texts_at_most(
    damage: Callable[[Path], object], plan: JobPlan
) -> None:
    """A file that is gone, has another byte, is too short, or is another file by its etag."""
    first, _ = published(plan)
    damage(Path(first.url))
    vectors = found(old_files(plan), carried(plan), TEXTS)
    every = all_vectors(TEXTS)
    assert vectors.items() <= every.items()
    assert all_vectors(TEXTS[10:]).items() <= vectors.items()
    if damage is not flipped:
        assert len(vectors) == 10


def test_no_byte_of_a_file_gives_a_wrong_vector(plan: JobPlan) -> None:
    """Whatever byte is changed: the right vector, or none."""
    first, _ = published(plan)
    path, every = Path(first.url), all_vectors(TEXTS)
    whole = path.read_bytes()
    lost = 0
    # Arrow ends its process on some damaged footers: in a run that process is a task's.
    footer = len(whole) - int.from_bytes(whole[-8:-4], "little") - 8
    for place in range(4, footer, max(1, footer // 150)):
        content = bytearray(whole)
        content[place] ^= 0xFF
        _instead(path, bytes(content))
        vectors = found(old_files(plan), carried(plan), TEXTS)
        assert vectors.items() <= every.items()
        lost += len(vectors) < len(every)
    assert lost > 50


def test_files_of_another_recipe_give_nothing(plan: JobPlan) -> None:
    published(plan)
    files, mine = old_files(plan), carried(plan)
    assert found(files, replace(mine, fingerprint="e" * 64), TEXTS) == {}
    wider = mine.fields.set(0, pa.field("embedding", pa.list_(pa.float32(), WIDTH + 1)))
    assert found(files, replace(mine, fields=wider), TEXTS) == {}
    more = mine.fields.append(pa.field("router", pa.list_(pa.float32(), 2)))
    assert found(files, replace(mine, fields=more), TEXTS) == {}
    assert len(old_files(replace(plan, job=replace(plan.job, fingerprint="e" * 64)))) == 0


@pytest.mark.parametrize("vector_list", ["fixed", "variable"])
def test_lists_of_either_kind_are_taken_over(vector_list: Any, plan: JobPlan) -> None:
    published(plan, replace(output_spec(plan), vector_list=vector_list))
    assert found(old_files(plan), carried(plan), TEXTS) == all_vectors(TEXTS)


def test_codes_are_taken_over_under_equal_ranges_alone(plan: JobPlan) -> None:
    """int8 under other ranges is another vector."""
    job = plan.job
    encoder = job.config.encoder.model_copy(update={"vector_dtype": "int8"})
    plan = replace(
        plan, job=replace(job, config=job.config.model_copy(update={"encoder": encoder}))
    )
    assert carried_of(plan) is None, "no claim has ranges yet"
    ranges = Calibration([[-1.0] * WIDTH, [1.0] * WIDTH], 200)
    codes = np.zeros((10, WIDTH), np.int8)
    spec = replace(
        output_spec(plan), calibration=ranges, quantize=lambda vectors: codes[: len(vectors)] + 7
    )
    published(plan, spec)
    fields = pa.schema([spec.data.field(name) for name in ("embedding", "tokens", "truncated")])
    same = Carried(fields, spec.fingerprint, normalized=True, calibration=ranges)
    other = Calibration([[-1.0] * WIDTH, [1.0] * (WIDTH - 1) + [1.5]], 200)
    files = old_files(plan)
    assert found(files, same, TEXTS) == {text_hash(text): [7] * WIDTH for text in TEXTS}
    assert found(files, replace(same, calibration=other), TEXTS) == {}


def test_a_bad_rows_hash_is_nobodys(tmp_path: Path) -> None:
    """A null row has the hash of the empty text, and no vector."""
    plan = plan_in(tmp_path, [*TEXTS[:8], None, None], on_bad_row="null")
    published(plan)
    files = old_files(plan)
    [(_, file)] = files.take([0])
    assert file.nulls
    assert found(files, carried(plan), ["", *TEXTS[:8]]) == all_vectors(TEXTS[:8])


def test_a_vector_that_is_not_as_promised_is_not_taken_over(plan: JobPlan) -> None:
    """An output is somebody else's files: a norm of two would be this run's fault."""
    first, _ = published(plan)
    table = pq.read_table(first.url)
    rows = table["embedding"].to_pylist()
    rows[2], rows[4] = [2.0, 0.0, 0.0, 0.0], [float("nan")] * WIDTH
    place = table.schema.get_field_index("embedding")
    edited = table.set_column(
        place, table.schema.field(place), pa.array(rows, table.schema.field(place).type)
    )
    pq.write_table(edited, first.url)
    stored = stat(first.url)
    assert stored is not None
    files = OldFiles([_listed(stored, 10)])
    expected = all_vectors([text for number, text in enumerate(TEXTS[:10]) if number not in (2, 4)])
    assert found(files, carried(plan), TEXTS) == expected


def _listed(stored: Stored, rows: int) -> pa.Table:
    columns = {"url": [stored.url], "bytes": [stored.size], "etag": [stored.etag], "rows": [rows]}
    return pa.table(columns | {"nulls": [False]})


def test_each_file_is_opened_once_and_its_vectors_are_read_once(
    plan: JobPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its texts go to many chunks; a file of which none is wanted is not opened."""
    published(plan)
    files, mine = old_files(plan), carried(plan)
    every = files.take([0, 1])
    keys = old_keys(every, mine)
    opened: list[str] = []
    whole = old_vectors.open_unchanged

    @contextmanager
    def counted(file: Stored) -> Iterator[BinaryIO]:
        opened.append(file.name)
        with whole(file) as handle:
            yield handle

    monkeypatch.setattr(old_vectors, "open_unchanged", counted)
    wanted = [(chunk, text) for chunk in range(5) for text in TEXTS[:10]]
    high, low = numbers_of(b"".join(text_hash(text) for _, text in wanted))
    texts = in_order(TextKeys(high, low, np.array([chunk for chunk, _ in wanted], np.uint32)))
    made = gathered(every, [join_partition(0, 1, [texts], [keys])[0]], mine)
    assert len(opened) == 1
    assert (made.numbers.tolist(), made.texts.tolist()) == ([0, 1, 2, 3, 4], [10] * 5)
    assert made.table["chunk"].to_pylist() == sorted(made.table["chunk"].to_pylist())
    hashes = made.table["text_hash"].to_pylist()
    assert made.table["embedding"].to_pylist() == [vector_of(one) for one in hashes]


def test_lines_of_one_text_travel_together(plan: JobPlan) -> None:
    """A text of three lines: all of them, in order, wherever they are."""
    places = Places(
        *(np.array(column) for column in ([0, 0], [4, 9], [3, 1], [7, 2], [1, 2], [3, 4]))
    )
    lines, texts = old_vectors.gather_lines(places)
    assert (lines.tolist(), texts.tolist()) == ([4, 5, 6, 9], [0, 0, 0, 1])
    table = pa.table(
        {
            "text_hash": hashes_of(*(np.array([1, 1, 1, 2, 3, 3], np.uint64),) * 2),
            "part": pa.array([0, 1, 0, 0, 0, 1], pa.uint32()),
        }
    )
    assert old_vectors.starts_of_texts(table).tolist() == [0, 2, 3, 4]


class TestReuseFrom:
    """`output.reuse_from` names outputs of an equal fingerprint."""

    def job(self, plan: JobPlan, *outs: str) -> JobPlan:
        output = plan.job.config.output.model_copy(update={"reuse_from": outs})
        job = replace(plan.job, config=plan.job.config.model_copy(update={"output": output}))
        return replace(plan, job=job)

    def test_their_files_come_behind_ones_own(self, tmp_path: Path) -> None:
        mine, other = (plan_in(tmp_path / name, TEXTS) for name in ("mine", "other"))
        published(other)
        asks = self.job(mine, other.job.out)
        check_reuse_from(asks.job)
        assert found(old_files(asks), carried(asks), TEXTS) == all_vectors(TEXTS)
        published(mine)
        files = old_files(asks)
        assert [file.stored.url.startswith(mine.job.out) for _, file in files.take(range(4))] == [
            True,
            True,
            False,
            False,
        ]
        # A file that several snapshots list is there once.
        published_again = Snapshot(
            epoch=2, fingerprint=FINGERPRINT, files=_files_of(mine), shards=()
        )
        publish(mine.job.out, published_again)
        assert len(old_files(asks)) == 4

    def test_another_fingerprint_is_refused_with_both(self, tmp_path: Path) -> None:
        mine, other = (plan_in(tmp_path / name, TEXTS) for name in ("mine", "other"))
        asks = self.job(mine, other.job.out)
        with pytest.raises(OutputError, match="other/out has no snapshot"):
            check_reuse_from(asks.job)
        published(other, replace(output_spec(other), fingerprint="e" * 64))
        with pytest.raises(OutputError, match=f"fingerprint {'e' * 12}, and .* {FINGERPRINT[:12]}"):
            check_reuse_from(asks.job)

    def test_a_snapshot_that_is_gone_or_damaged_has_no_files(self, tmp_path: Path) -> None:
        mine, other = (plan_in(tmp_path / name, TEXTS) for name in ("mine", "other"))
        published(other)
        asks = self.job(mine, other.job.out)
        [head] = Path(other.job.out, "snapshots").glob("*.json")
        whole = head.read_text()
        head.write_text(json.dumps({"epoch": 1}))
        assert len(old_files(asks)) == 0
        head.write_text(whole)
        assert len(old_files(asks)) == 2
        head.unlink()
        assert len(old_files(asks)) == 0


def _files_of(plan: JobPlan) -> FileList:
    return read_snapshot(plan.job.out, 1).files


def test_an_old_file_names_what_is_to_be_opened() -> None:
    files = OldFiles([_listed(Stored("/out/data/a", 5, "e"), 3)])
    assert files.take([0]) == [(0, OldFile(Stored("/out/data/a", 5, "e"), 3, nulls=False))]
    assert (len(files), files.rows, len(OldFiles())) == (1, [3], 0)
