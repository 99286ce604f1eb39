"""A world for one output: runs and prunes that stop, die or sleep at any storage call of theirs.

Everything is real but Ray and the time: `embed` and `prune` work on a local output, and chunks are
committed without a model. One operation is active at a time; the others sleep where they were.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from embedjob import pipeline
from embedjob.config.job import Input
from embedjob.config.job_file import JobSource
from embedjob.errors import EmbedjobError
from embedjob.input import listing
from embedjob.input.chunks import Chunk, newest_first
from embedjob.input.columns import columns_of
from embedjob.input.decoders import DecodesFooters, decoders
from embedjob.input.footers import Wanted
from embedjob.input.listing import check_apart
from embedjob.input.reading import read_chunk
from embedjob.job import reusable
from embedjob.job.input_listing import list_input
from embedjob.job.options import Console, Options
from embedjob.job.output import claim_of, output_spec
from embedjob.job.planning import JobPlan, plan
from embedjob.job.result import Outcome, Outcomes, Result, StagesEnd
from embedjob.output import cleanup, lease
from embedjob.output.claim import put_claim
from embedjob.output.committing import commit
from embedjob.output.file_names import data_directory
from embedjob.output.manifest import SnapshotFile
from embedjob.output.snapshot import Snapshot, newest_snapshot, published, read_snapshot
from embedjob.stages import session
from embedjob.stages.reuse.merging import TAKEN, lines_of_texts, merged
from embedjob.storage import objects
from embedjob.storage.backend import Backend, Entry
from embedjob.text.conversations import text_hash
from tests.reusing import hashes_there, old_lines
from tests.shards import FINGERPRINT, WIDTH, finished, job_of

WATCH = 30.0
QUIET = Console(lambda _: None, lambda _: pytest.fail("nothing is shown"))


class Crash(BaseException):
    """The end of a process: nothing catches it, and no later call of it reaches storage."""


def vector_of(text: bytes) -> list[float]:
    """A unit vector for the hash of a text, in numbers that float32 has."""
    angle = int.from_bytes(text[:4], "little") / 2**32
    made = np.array([np.cos(angle), np.sin(angle), 0.0, 0.0], np.float32)
    return [float(one) for one in made]


@dataclass
class Operation:
    """A process: what it does, and the moment at which it stops, of two for each storage call.

    A run embeds the input of that name, and its chunk of that number `fails`. With `late` its
    deadline comes after so many chunks, those of the newest shards.
    """

    work: Callable[[], Any]
    stop_at: int | None = None
    how: str = "sleep"
    input: str = "in"
    fails: int | None = None
    late: int | None = None
    calls: int = 0
    result: Any = None
    code: int | None = None
    error: BaseException | None = None
    dead: bool = False
    shards: tuple[Any, ...] = ()
    stopped: threading.Event = field(default_factory=threading.Event)
    woken: threading.Event = field(default_factory=threading.Event)

    @property
    def asleep(self) -> bool:
        return self.thread.is_alive()

    def start(self) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        self._wait()

    def wake(self) -> None:
        self.stopped.clear()
        self.woken.set()
        self._wait()

    def _wait(self) -> None:
        assert self.stopped.wait(60), "an operation neither ended nor stopped"

    def _run(self) -> None:
        try:
            self.result = self.work()
        except BaseException as error:
            self.error = error
        self.stopped.set()

    def at_call(self) -> None:
        self.calls += 1
        if self.calls == self.stop_at and self.how == "die":
            self.dead = True
        elif self.calls == self.stop_at:
            self.stopped.set()
            self.woken.wait()
        if self.dead:
            raise Crash


class Gated:
    """A backend whose every call is a moment at which its operation may stop, before and after."""

    checks_reads = False

    def __init__(self, backend: Backend, world: "World") -> None:
        self._backend, self._world = backend, world

    def entries(self, path: str, pattern: Sequence[str]) -> Iterator[Entry]:
        return iter(self._call(lambda: [*self._backend.entries(path, pattern)]))

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self._call(partial(getattr(self._backend, name), *arguments))

    def _call(self, call: Callable[[], Any]) -> Any:
        operation = self._world.active
        if operation is None:
            return call()
        operation.at_call()
        answer = call()
        operation.at_call()
        return answer


class World:
    """An output, its inputs, and the operations on it.

    In a world that `reuses`, texts come again in other rows and shards, and runs take their vectors
    over; `encoded` are the hashes of those that the last run has embedded.
    """

    def __init__(self, folder: Path, out: str | None = None, *, reuses: bool = False) -> None:
        """Inputs lie in the folder, and so does the output, unless it is given: it may be on S3."""
        self.out, self.inputs, self.reuses = out or str(folder / "out"), folder, reuses
        self.texts: dict[tuple[str, str], dict[str, str]] = {}  # by url and etag, then by id
        self.encoded: set[bytes] = set()
        self.there: set[bytes] = set()
        self.lines: Mapping[str, pa.Table] = {}
        self.active: Operation | None = None
        self.sleeping: list[Operation] = []
        self.seconds = 0.0
        self.contents: dict[str, bytes] = {}
        self.good: dict[tuple[str, str], list[str]] = {}  # ids of good rows, by url and etag
        self.fingerprint = FINGERPRINT
        self.decode: DecodesFooters | None = None
        self.spoiled = 0  # the epoch of the last snapshot that somebody took a file from

    @contextmanager
    def running(self) -> Iterator["World"]:
        """The project's own functions, with this world's storage, clock and stages."""
        located, held, acquire = objects.locate, lease.held, lease.acquire

        def gated(url: str) -> tuple[Any, str, str]:
            backend, path, prefix = located(url)
            mine = f"{prefix}{path}".startswith(f"{self.out}/")
            return (Gated(backend, self) if mine else backend), path, prefix

        def taken_over(out: str, *, job: str, **_: Any) -> lease.Lease:
            last = lease.newest_lease(out)
            if last is not None and not last.released:
                self.seconds += WATCH
            return acquire(out, job=job, takeover=True)

        # One that decodes for several worlds is given.
        shared = nullcontext(self.decode) if self.decode else decoders(self.decoded, files=1)
        with pytest.MonkeyPatch.context() as patch, shared as decode:
            # One process decodes for all: a run of these takes less than its start.
            patch.setattr(listing, "decoders", lambda *_, **__: nullcontext(decode))
            patch.setattr(objects, "locate", gated)
            patch.setattr(lease, "_clock", lambda: self.seconds)
            for module in (lease, pipeline):
                patch.setattr(module, "held", partial(held, every=3600.0))
                patch.setattr(module, "acquire", taken_over)
            patch.setattr(pipeline, "require_create_only", lambda _: None)
            patch.setattr(pipeline, "plan_job", self._planned)
            patch.setattr(session, "run_stages", self._stages)
            patch.setattr(cleanup, "CLEANUP_THREADS", 1)
            patch.setattr(reusable, "SNAPSHOT_THREADS", 1)
            yield self
            for operation in self.sleeping:
                operation.dead = True
                operation.wake()

    @property
    def decoded(self) -> Wanted:
        """What footers are asked of the inputs' columns."""
        return columns_of(self.job_input("in")).wanted

    def job_input(self, name: str) -> Input:
        return Input(path=str(self.inputs / name), text="t", id="n")

    def write(self, name: str, rows: int, version: int) -> None:
        """A shard; its third row is bad."""
        path = self.inputs / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        own = [f"{name} {version} {row}" for row in range(rows)]
        if self.reuses:
            # Some stand side by side.
            own = [f"text {(7 * version + row - row // 4) % 40}" for row in range(rows)]
        texts = [None if row == 2 else text for row, text in enumerate(own)]
        columns = {"t": pa.array(texts, pa.string()), "n": [f"{version}-{r}" for r in range(rows)]}
        pq.write_table(pa.table(columns), path, row_group_size=5)
        [file] = objects.find(str(path))
        good = [row_id for row_id, text in zip(columns["n"], texts, strict=True) if text]
        self.good[file.url, file.etag] = good
        self.texts[file.url, file.etag] = dict(zip(columns["n"], own, strict=True))

    def operate(self, work: Callable[[], Any], **given: Any) -> Operation:
        """A process that is over, dead or asleep when this returns."""
        operation = Operation(work, **given)
        self._step(operation, operation.start)
        return operation

    def wake(self, number: int) -> Operation:
        operation = self.sleeping.pop(number)
        self._step(operation, operation.wake)
        return operation

    def _step(self, operation: Operation, step: Callable[[], None]) -> None:
        self.active = operation
        step()
        self.active = None
        if operation.asleep and not operation.dead:
            self.sleeping.append(operation)
        elif isinstance(operation.error, Exception):
            assert isinstance(operation.error, EmbedjobError), operation.error
            operation.code = operation.error.exit_code
        elif isinstance(operation.result, Result):
            operation.code = operation.result.exit_code

    def run(self, options: Options, **given: Any) -> Operation:
        """A run, which is over, dead or asleep; `given` are fields of its operation."""
        return self.operate(lambda: pipeline.embed(JobSource(()), options, QUIET), **given)

    def prune(self, *, keep: int = 1, **given: Any) -> Operation:
        """A prune without grace, likewise."""
        return self.operate(lambda: cleanup.prune(self.out, keep=keep, grace_seconds=0), **given)

    def _planned(self, _: JobSource, **__: bool) -> JobPlan:
        me = self.active
        assert me is not None
        job = job_of(self.job_input(me.input))
        config = job.config
        output = config.output.model_copy(update={"path": self.out})
        run = config.run.model_copy(update={"max_quarantined": 1.0})
        config = config.model_copy(update={"output": output, "run": run})
        job = replace(job, config=config, fingerprint=self.fingerprint)
        served = newest_snapshot(job.out)
        found = list_input(config.input, served)
        me.shards = found.shards
        check_apart(config.input.path, job.out, found.shards)
        listed = objects.list_files(data_directory(job.out, job.fingerprint))
        return plan(job, found, listed=listed, served=served)

    def _stages(
        self, plan: JobPlan, *_: Any, holder: lease.Holder, options: Options, **__: Any
    ) -> StagesEnd:
        if not plan.left:
            return StagesEnd()
        me = self.active
        assert me is not None
        put_claim(plan.job.out, claim_of(plan), new_fingerprint=options.new_fingerprint)
        self.lines = self._old_lines(plan) if self.reuses else {}
        todo = plan.left if me.late is None else newest_first(plan.left)[: me.late]
        ends = [self._chunk(plan, chunk, i == me.fails) for i, chunk in enumerate(todo)]
        # As the driver does while its stages run.
        holder.require()
        return StagesEnd(Outcomes(ends), late=None if me.late is None else "there was no time")

    def _old_lines(self, plan: JobPlan) -> Mapping[str, pa.Table]:
        """What chunks take over: of texts that have vectors before and after, none is left out."""
        self.encoded = set()
        before = self._there()
        lines = old_lines(plan)
        # A prune may have come between, while this run slept.
        self.there = before & self._there()
        return lines

    def _there(self) -> set[bytes]:
        me, self.active = self.active, None
        found = hashes_there(self.out)
        self.active = me
        return found

    def _chunk(self, plan: JobPlan, chunk: Chunk, fails: bool) -> Outcome:
        place = (chunk.key, chunk.shard.url, chunk.start, chunk.stop)
        if fails:
            return Outcome(*place, fault="this chunk fails")
        rows = read_chunk(chunk, plan.job.config.input)
        spec, table = output_spec(plan), finished(rows)
        if self.reuses:
            table = self._by_text(table, self.lines.get(chunk.key))
        done = commit(plan.job.out, chunk, table, rows_in=len(rows), spec=spec)
        return Outcome(*place, committed=done)

    def _by_text(self, table: pa.Table, reused: pa.Table | None) -> pa.Table:
        """Rows with the vectors of their texts, of which some are taken over."""
        table = table.drop_columns(["embedding"])
        first = lines_of_texts(table["text_hash"].to_pylist(), reused)
        first[table["reason"].is_valid().to_numpy()] = -1
        made, taken = (table.filter(pa.array(some)) for some in (first < 0, first >= 0))
        hashes = made["text_hash"].to_pylist()
        vectors = pa.array([*map(vector_of, hashes)], pa.list_(pa.float32(), WIDTH))
        bad = made["reason"].is_valid()
        vectors = pc.if_else(bad, pa.scalar(None, vectors.type), vectors)
        made = made.append_column("embedding", vectors)
        good = {one for one, is_bad in zip(hashes, bad.to_pylist(), strict=True) if not is_bad}
        assert not good & self.there, "a text is embedded that has its vector in a snapshot"
        self.encoded |= good
        if reused is None:
            return made
        places = pa.array(first[first >= 0], pa.uint32())
        return merged(made, taken.append_column(TAKEN, places), reused)

    def look(self) -> None:
        """What a reader, and the history of all names, show at this moment."""
        files = {file.url: file for file in objects.list_files(f"{self.out}/data")}
        for url in files:
            content = objects.read_bytes(url)
            assert self.contents.setdefault(url, content) == content, f"{url} was changed"
        epochs = published(self.out)
        snapshot = read_snapshot(self.out, epochs[-1]) if epochs else None
        # A prune publishes the newest list again, also where somebody took a file from it.
        if snapshot is not None and (snapshot.original or snapshot.epoch) > self.spoiled:
            for file in snapshot.files:
                stored = files.get(f"{self.out}/{file.path}")
                assert stored is not None, f"snapshot {snapshot.epoch}: {file.path} is gone"
                assert stored.etag == file.etag, f"snapshot {snapshot.epoch}: another {file.path}"

    def check_success(self, operation: Operation) -> None:
        """Exit 0 means that readers see exactly the good rows of the input as it was listed."""
        snapshot = newest_snapshot(self.out)
        assert snapshot is not None
        assert self.rows(snapshot) == sorted(self.good_rows(operation)), "exit 0, and other rows"
        if self.reuses:
            self._check_vectors(operation, snapshot)

    def _check_vectors(self, operation: Operation, snapshot: Snapshot) -> None:
        etags = {shard.url: shard.etag for shard in operation.shards}
        for file in snapshot.files:
            columns = ["shard", "id", "text_hash", "embedding"]
            for row in pq.read_table(f"{self.out}/{file.path}", columns=columns).to_pylist():
                text = self.texts[row["shard"], etags[row["shard"]]][row["id"]]
                assert row["text_hash"] == text_hash(text)
                assert row["embedding"] == vector_of(row["text_hash"]), (
                    "a text has another's vector"
                )

    def check_deadline(self, operation: Operation, before: Snapshot | None) -> None:
        """Exit 3: of each shard readers see all good rows as it was listed, or what they saw."""
        snapshot, listed = (
            newest_snapshot(self.out),
            {one.url: one.etag for one in operation.shards},
        )
        seen = self.by_shard(before)
        left = {one.shard for one in operation.result.left}
        assert left, "exit 3, and nothing is left"
        for url, ids in self.by_shard(snapshot).items():
            whole = sorted(self.good[url, listed[url]]) if url in listed else None
            if operation.result.summary.snapshot is None or url in left:
                # Somebody may have taken some of the files that were there before.
                assert {*ids} <= {*seen.get(url, ())}, f"{url}: rows that nobody published"
            else:
                assert ids == whole or url not in listed, f"{url}: not whole, and not left"

    def by_shard(self, snapshot: Snapshot | None) -> dict[str, list[str]]:
        """The ids that a reader of the snapshot sees, by shard, but for files that are lost."""
        ids: dict[str, list[str]] = {}
        for file in snapshot.files if snapshot else ():
            if Path(self.out, file.path).exists():
                ids.setdefault(file.shard, []).extend(self.ids(file))
        return {url: sorted(found) for url, found in ids.items()}

    def ids(self, file: SnapshotFile) -> list[str]:
        """The ids in a file of the output."""
        ids: list[str] = pq.read_table(f"{self.out}/{file.path}", columns=["id"])["id"].to_pylist()
        return ids

    def rows(self, snapshot: Snapshot) -> list[tuple[str, str]]:
        """(shard, id) of every row that a reader of the snapshot sees."""
        found: list[tuple[str, str]] = []
        for file in snapshot.files:
            content = pa.BufferReader(objects.read_bytes(f"{self.out}/{file.path}"))
            table = pq.read_table(content, columns=["shard", "id"])
            found += zip(table["shard"].to_pylist(), table["id"].to_pylist(), strict=True)
        return sorted(found)

    def good_rows(self, operation: Operation) -> Iterator[tuple[str, str]]:
        """(shard, id) of every good row of the input, in the versions that a run has listed."""
        for shard in operation.shards:
            for row_id in self.good[shard.url, shard.etag]:
                yield shard.url, row_id
